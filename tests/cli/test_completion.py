"""Shell completion: shells accept the scripts, and bash completes correctly."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from convert_to_quant.cli import COMMANDS
from convert_to_quant.cli.completion import SHELLS

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
complete -p "$1" >&2
function=$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(ctq, tmp_path):
    """complete(words...): bash's completions of the last word."""
    script = tmp_path / "completion.bash"
    script.write_text(ctq("completion", "bash").out, encoding="utf-8")

    def ask(*words: str, program: str = "convert_to_quant") -> set[str]:
        outcome = subprocess.run(["bash", "-c", ASK, "bash", str(script), program, *words],
                              capture_output=True, text=True, check=True, cwd=tmp_path)  # fmt: skip
        return {line.strip() for line in outcome.stdout.splitlines() if line.strip()}

    return ask


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_accepts_its_script(ctq, tmp_path, shell):
    outcome = ctq("completion", shell)
    assert (outcome.code, outcome.err) == (0, "")
    assert [name for name in COMMANDS if name not in outcome.out] == []
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed: only that its script is written was checked")
    script = tmp_path / "completion"
    script.write_text(outcome.out, encoding="utf-8")
    subprocess.run([program, "-n", str(script)], check=True)


def test_an_unknown_shell_suggests_one(ctq):
    outcome = ctq("completion", "basch")
    assert outcome.code == 2
    assert "invalid choice: 'basch' (did you mean bash?)" in outcome.err


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ins",), {"inspect"}),
        (("--actcal-l",), {"--actcal-lora"}),
        (("convert", "--actcal-l"), {"--actcal-lora"}),
        (("apply", "--full-precision-b"), {"--full-precision-budget"}),
        (("--scaling-mode", "r"), {"row"}),
        (("--format", "int8-t"), {"int8-tensor"}),
        (("check", "--arithmetic", "dynamic-"), {"dynamic-tensor", "dynamic-row"}),
        (("comfyui", "un"), {"uninstall"}),
        (("comfyui", "install", "--dry"), {"--dry-run"}),
        (("completion", "b"), {"bash"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bash_completes_commands_flags_and_choices(complete, words, offered):
    assert complete(*words) == offered
    assert complete(*words, program="ctq") == offered


@pytest.mark.parametrize("words", [("inspect", "m"), ("-i", "m"), ("convert", "--input", "m"), ("apply", "m", "m")])
def test_bash_completes_files_by_kind(complete, tmp_path, words):
    for name in ("model.safetensors", "model.safetensors.index.json", "model.txt", "model.toml"):
        (tmp_path / name).touch()
    (tmp_path / "models").mkdir()
    assert complete(*words) == {"model.safetensors", "model.safetensors.index.json", "models"}
    assert complete("inspect", "--config", "m") == {"model.toml", "models"}
    assert complete("demo", "-o", "m") == {"models"}


def test_hidden_options_are_not_offered(complete):
    assert "--no-actcal" not in complete("--no-")
