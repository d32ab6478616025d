"""The documentation stays true: its examples run, its links lead somewhere, its flags exist.

Every command line and Python block in README.md, CONTRIBUTING.md, docs/ and the commands' own help runs in a folder of
tiny files with the names that the text uses. The tables below list what differs from the text, and what is only parsed.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfyui_server as double
import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tiny_flux import flux_model

from convert_to_quant import cli
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # from diffusers itself

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("convert_to_quant", "ctq")

# --- what differs from the text

SUBSTITUTIONS = {
    r"--device cuda\b": "--device cpu",
    r"--bits 6.5 --gpu rtx40\b": "--gpu rtx50 --actcal-samples 3 --actcal-height 32 --actcal-width 32",
    r"--actcal\b(?!-)": "--actcal --actcal-samples 3",
    r"(/path/to|~)/ComfyUI\b": "ComfyUI",
    r" \*\.safetensors": " flux_bf16.safetensors flux_fp8.safetensors",
    r"^source <\((.*)\)$": r"\1",
}
"""Regular expression -> what runs instead: no GPU, no shell, little time, and formats that support tiny layers."""

SMALL = ("--height", "32", "--width", "32", "--steps", "2", "--samples", "3")
ADDED = ("observe", "check", "card")
"""Commands that get these flags, for tiny images."""

ONLY_PARSED = {
    "demo": "runs a minute; tests/test_demo.py runs it",
    "observe .*--comfyui-dir": "needs a ComfyUI; tests/comfyui has tests with a real one",
}
"""Commands that do not run (regular expressions from the start), and why."""

OTHER_PROGRAMS = ("pip ", "python -m pip ", "python -m pytest", "python -m venv ", "source")
"""Other programs in examples, which do not run. Targets of make and our scripts must exist."""

FOREIGN_FLAGS = {
    "--constraint": "pip",
    "--supports-fp8-compute": "ComfyUI",
    "--cache-none": "ComfyUI",
    "--fast": "ComfyUI",
    "--nproc-per-node": "torchrun",
}
"""Flags of other programs in the text. Those of benchmarks are looked up in the scripts."""


# --- files that examples use


files = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
tiny = runpy.run_path(str(ROOT / "tests" / "cli" / "conftest.py"))
"""Builders of tiny models in other tests."""
screens = runpy.run_path(str(ROOT / "tests" / "cli" / "test_golden.py"))
"""Masks of what differs between runs."""

CALLED: dict[str, tuple[str, ...]] = {
    "flux_bf16": ("bf16", "flux", "flux1-dev", "demo/plain_bf16"),
    "flux_fp8": ("fp8", "mine", "theirs", "flux1-dev-fp8", "demo/plain_fp8_calibrated"),
    "embeddings": ("demo/prompts",),
    "stats": ("a", "b", "faces", "places", "portraits", "landscapes", "with_lora"),
}
"""Other names in the text for the model, its conversion, and statistics of it."""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder of tiny files with the names that examples use."""
    folder = tmp_path_factory.mktemp("stand-ins")
    with inside(folder):
        for name, tensors in {
            "flux_bf16": flux_model(files["to_bfloat16"]),
            "style": tiny["kohya"](),
            "embeddings": tiny["prompt_embeddings"](),
        }.items():
            Path(f"{name}.safetensors").write_bytes(files["file_bytes"](tensors))
        write_reranged(Path("flux_bf16.safetensors"), Path("flux_bf16.safetensors"), RERANGINGS["wild"])  # for --fold
        tiny["save_pipeline"](Path("FLUX.1-dev"))
        Path("prompts.txt").write_text("a red fish\na fish\n", encoding="utf-8")
        Path("ComfyUI/custom_nodes").mkdir(parents=True)
        Path("ComfyUI/models/diffusion_models").mkdir(parents=True)
        shutil.copy("flux_bf16.safetensors", "ComfyUI/models/diffusion_models")
        Path("demo").mkdir()
        observe = ["observe", "flux_fp8.safetensors", "-o", "stats.safetensors", *SMALL, "-q"]
        assert cli.main(["-i", "flux_bf16.safetensors", "-o", "flux_fp8.safetensors", "-q"]) == cli.main(observe) == 0
        fold = ["-i", "flux_bf16.safetensors", "-o", "flux_folded.safetensors", "--format", "int8", "--fold", "-q"]
        assert cli.main([*fold, "--actcal-samples", "3"]) == 0
        for name, others in CALLED.items():
            for other in others:
                shutil.copy(f"{name}.safetensors", f"{other}.safetensors")
    return folder


class Pipe:
    """The `pipe` of Python blocks: its transformer runs for each prompt."""

    transformer = torch.nn.Sequential(torch.nn.Linear(16, 16))

    def __call__(self, prompt: str) -> Any:
        return self.transformer(torch.full((1, 4, 16), float(len(prompt))))


# --- examples


SERVER = "http://127.0.0.1:8188"
"""The ComfyUI in the text; the tests run a double on a free port."""
comfyui, serve, flux, wan = double.comfyui, double.serve, double.flux, double.wan


Example = tuple[str, str]
"""Language ("console" for one command line, "python" for a block, "toml" for a file), and text."""

SHELL = ("console", "bash", "sh")
PROGRAM = re.compile(rf"([A-Z]+=\S* )*({'|'.join(OURS)}|python|pip|make|source)\b")


def tokens_of(text: str) -> list[Token]:
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in blocks for token in (block, *(block.children or []))]


def lines_of(text: str) -> list[Example]:
    """The command lines of a block."""
    lines = map(str.strip, re.sub(r"\\\n\s*", "", text).splitlines())
    return [("console", line) for line in lines if line and not line.startswith("#")]


def examples_of(text: str) -> list[Example]:
    """The examples of a page, in order."""
    found: list[Example] = []
    for token in tokens_of(text):
        language = token.info.split()[0] if token.type == "fence" and token.info else ""
        if language in SHELL or (token.type == "code_block" and PROGRAM.match(token.content.lstrip())):
            found += lines_of(token.content)
        elif language in ("python", "toml"):
            found.append((language, token.content))
    return found


def below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its actions."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from below(choice)


PARSERS = {command: list(below(cli.build_parser(command))) for command in cli.COMMANDS}


def help_examples(command: str) -> list[Example]:
    lines = [line for parser in PARSERS[command] for line in lines_of(parser.epilog or "")]
    return [line for line in lines if PROGRAM.match(line[1])]


DOCUMENTS = {
    **{str(page.relative_to(ROOT)): examples_of(page.read_text(encoding="utf-8")) for page in PAGES},
    **{f"help {command}": help_examples(command) for command in PARSERS},
}


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def run_line(line: str) -> None:
    """Run our commands in a command line; check that other programs are known."""
    for pattern, replacement in SUBSTITUTIONS.items():
        line = re.sub(pattern, replacement, line)
    for part in re.split(r" (?:&&|\|) ", line):
        words = shlex.split(re.sub(r"^([A-Z]+=\S* )*(\S*/)?", "", part.partition(" > ")[0]), comments=True)
        if words[:2] == ["python", "-m"] and words[2] in OURS:
            words = words[2:]
        command, said = words[1:], " ".join(words)
        if words[0] in OURS and any(re.match(pattern, " ".join(command)) for pattern in ONLY_PARSED):
            parse(command)
        elif words[0] in OURS:
            assert cli.main([*command, *(SMALL if command[:1] and command[0] in ADDED else ())]) == 0, f"{said}: fails"
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{said}: no such target"
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{said}: no such script"
        else:
            assert said.startswith(OTHER_PROGRAMS), f"{said}: an unknown program"


def parse(words: list[str]) -> None:
    """Check a call without running it."""
    if words[0] == "help":
        assert words[1:] in ([], ["COMMAND"], *([command] for command in PARSERS)), f"{words}: is misused"
        return
    named = words[0] in PARSERS
    try:
        PARSERS[words[0] if named else cli.DEFAULT_COMMAND][0].parse_args(list(map(cli.flag_spelling, words[named:])))
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(f"{words}: is misused") from stop


def run(examples: list[Example], folder: Path) -> None:
    """Run a document's examples in order, in one folder."""
    names = {"pipe": Pipe(), "prompts": ["a red fish", "a fish"]}
    with inside(folder):
        for language, text in examples:
            if language == "python":
                exec(compile(text, "example", "exec"), names)
            elif language == "toml":  # the first line is the file's name
                Path(text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
            else:
                run_line(text)


@pytest.mark.parametrize(
    "examples", [pytest.param(examples, id=name) for name, examples in DOCUMENTS.items() if examples]
)
def test_every_example_runs(examples, stand_ins, tmp_path, request):
    folder = tmp_path / "here"
    shutil.copytree(stand_ins, folder)
    if any(SERVER in text for _, text in examples):
        address = request.getfixturevalue("serve")().address
        examples = [(language, text.replace(SERVER, address)) for language, text in examples]
        for name in ("flux", "wan"):
            workflow = json.dumps(request.getfixturevalue(name))
            (folder / f"{name}_api.json").write_text(workflow, encoding="utf-8")
    run(examples, folder)


@pytest.mark.parametrize("width", [80, 120])
def test_the_first_session_on_a_terminal(width, golden, terminal, stand_ins, tmp_path, monkeypatch):
    """Output of the README's commands, in order, with digits masked and without progress bars.

    Omitted: the demo (see tests/cli/test_golden.py), the best mix (nearly a tie with tiny layers), and the pipeline
    (other libraries print).
    """
    folder, screen = tmp_path / "here", terminal()
    shutil.copytree(stand_ins, folder)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(cli.output, "SECONDS_BETWEEN_LINES", float("inf"))
    monkeypatch.setattr(cli.output, "_bar", lambda *_: nullcontext(lambda *_: None))
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with inside(folder):
        for _, line in DOCUMENTS["README.md"]:
            if line.startswith(OURS) and not re.search(" demo| --best| --pipeline", line):
                screen.write(f"$ {line}\n")
                run_line(line)
                screen.write("\n")
    text = screens["mask"](screens["readable"](screen.getvalue()), folder)
    golden(f"session {width}", screens["without_digits"](text))


def test_the_documents_have_examples():
    assert sum(map(len, DOCUMENTS.values())) > 40


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("```console\nconvert_to_quant inspect no_such_file.safetensors\n```", "fails"),
        ("```bash\nconvert_to_quant inspect flux_fp8.safetensors && nonsense x\n```", "an unknown program"),
        ("text\n\n    python -m convert_to_quant demo --bad\n", "is misused"),
    ],
)
def test_a_broken_example_is_found(broken, said, stand_ins):
    with pytest.raises(AssertionError, match=said):
        run(examples_of(broken), stand_ins)


def test_examples_are_found_in_every_form():
    text = "\n".join([
        "```console", "convert_to_quant -i a \\", "  -o b  # c", "```", "", "- in a list:", "", "      make test", "",
        "    Load → Save", "", "```text", "not this", "```",
    ])  # fmt: skip
    assert [line for _, line in examples_of(text)] == ["convert_to_quant -i a -o b  # c", "make test"]


# --- commands and flags within sentences


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_are_valid(page):
    tokens = tokens_of(page.read_text(encoding="utf-8"))
    for before, token in pairwise(tokens):
        words = token.content.split()
        is_role = before.content.endswith("}")  # {option}`...`, which Sphinx checks
        if token.type == "code_inline" and not is_role and words[0] in OURS and len(words) > 2:
            parse(words[1:])


def test_every_flag_in_the_pages_exists():
    actions = [action for parsers in PARSERS.values() for parser in parsers for action in parser._actions]
    known = {option for action in actions for option in action.option_strings}
    paths = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("f*/*.py")]
    scripts = "".join(path.read_text(encoding="utf-8") for path in paths)
    known |= set(re.findall(r"\"(--[a-z][\w-]+)\"", scripts)) | FOREIGN_FLAGS.keys()
    for page in PAGES:
        text = re.sub(r".* -m pip .*", "", page.read_text(encoding="utf-8"))
        flags = {cli.flag_spelling(flag) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)}
        assert flags <= known, (page.name, flags - known)


# --- links


def anchors(text: str) -> set[str]:
    """Anchors of headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_exist(page):
    tokens = tokens_of(page.read_text(encoding="utf-8"))
    targets = [str(token.attrGet("href") or token.attrGet("src") or "") for token in tokens]
    for target in targets:
        if not target or "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target
