"""Options from a file: their meaning, precedence and errors, and that saved options repeat a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from convert_to_quant import __version__
from convert_to_quant.cli import COMMANDS, build_parser, config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def recipe(tmp_path):
    """Write a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def options(path: Path, command: str, *words: str) -> dict[str, Any]:
    """The options of a command line with this file."""
    parsed, _, _ = config.parse(build_parser(command), ["--config", str(path), *words], command, list(COMMANDS))
    return vars(parsed)


def test_a_single_table_needs_no_command(done, recipe, flux_file):
    path = recipe(f"""
        [convert]
        input = "{flux_file.name}"
        output = "out.safetensors"
        scaling_mode = "row"
        """)
    done("--config", path)
    wanted = flux_file.with_name("wanted.safetensors")
    done("-i", flux_file, "-o", wanted, "--scaling-mode", "row")
    assert flux_file.with_name("out.safetensors").read_bytes() == wanted.read_bytes()


def test_every_kind_of_option_can_be_set(recipe, tmp_path):
    found = options(recipe("""
        [convert]
        input = "in.safetensors"
        actcal = true
        actcal-lora = ["a.safetensors:0.5", "/b.safetensors"]
        actcal_samples = 8
        actcal-margin = 1.5
        exclude-layers = "mlp"
        """), "convert")  # fmt: skip
    assert found["input"] == str(tmp_path / "in.safetensors")
    assert found["lora"] == [str(tmp_path / "a.safetensors:0.5"), "/b.safetensors"]
    assert (found["actcal"], found["samples"], found["margin"], found["exclude_layers"]) == (True, 8, 1.5, ["mlp"])
    assert (found["output"], found["engine"], found["legacy"]) == (None, "auto", False), "the rest is as ever"


def test_the_command_line_wins(recipe):
    path = recipe("""
        [convert]
        input = "in.safetensors"
        actcal = true
        actcal-lora = ["a.safetensors"]
        actcal-samples = 8
        legacy = true
        """)
    found = options(path, "convert", "-i", "other", "--actcal-samples", "9", "--actcal-lora", "b", "--no-actcal",
                    "--comfy-quant")  # fmt: skip
    assert (found["input"], found["samples"], found["lora"], found["actcal"]) == ("other", 9, ["b"], False)
    assert (found["comfy_quant"], found["legacy"]) == (True, False), "they exclude each other"
    assert options(path, "convert")["legacy"] is True


def test_positional_arguments_have_their_names_in_the_help(recipe, tmp_path):
    path = recipe('[apply]\nmodel = "m"\nstats = ["a", "b"]\noutput = "o"')
    found = options(path, "apply")
    assert (found["input"], found["statistics"]) == (str(tmp_path / "m"), [str(tmp_path / "a"), str(tmp_path / "b")])
    found = options(path, "apply", "n", "c")
    assert (found["input"], found["statistics"], found["output"]) == ("n", ["c"], str(tmp_path / "o"))
    found = options(path, "apply", "n")
    assert (found["input"], found["statistics"]) == ("n", [str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_value_is_never_a_flag(recipe, monkeypatch):
    monkeypatch.chdir(recipe('[inspect]\nmodel = "--strict"').parent)
    found = options(Path("recipe.toml"), "inspect")
    assert (found["inputs"], found["strict"]) == (["--strict"], False)


def test_values_that_are_not_paths_are_not_resolved(recipe):
    found = options(recipe('[check]\nreference = "/a"\nquantized = "/b"\njson = "-"\nconditioning = "noise"'), "check")
    assert (found["json"], found["conditioning"]) == ("-", ["noise"])


@pytest.mark.parametrize("named", [[], ["comfyui"], ["comfyui", "install"]])
def test_actions_have_tables_of_their_own(ctq, recipe, tmp_path, named):
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    outcome = ctq(*named, "--config", recipe('[comfyui.install]\ndir = "ComfyUI"\ndry_run = true'))
    assert (outcome.code, "dry run: " in outcome.err) == (0, True), outcome.err


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("[convert]\nactcal-sampels = 3", ["-i", "a"],
         "[convert] actcal-sampels: unknown key (did you mean actcal-samples?)"),
        ("[convert]\nmodel = 3", ["-i", "a"], "[convert] model: unknown key (see convert_to_quant help convert)"),
        ("[convert]\nconfig = 'x'", ["-i", "a"], "[convert] config: unknown key (see convert_to_quant help convert)"),
        ("[convert]\nactcal-samples = 'many'", ["-i", "a"], "[convert] actcal-samples: invalid int value: 'many'"),
        ("[convert]\nactcal-samples = [3]", ["-i", "a"],
         "[convert] actcal-samples: expected a string or a number, found a list"),
        ("[convert]\nactcal-samples = true", ["-i", "a"],
         "[convert] actcal-samples: expected a string or a number, found True"),
        ("[convert]\nactcal-samples = 0x" + 5000 * "f", ["-i", "a"], "invalid TOML: Exceeds the limit"),
        ("[convert]\nactcal-samples = " + 5000 * "1", ["-i", "a"], "invalid TOML: Exceeds the limit"),
        ("[convert]\noutput = 'a\\u0000b'".replace("'", '"'), ["-i", "a"], "[convert] output: found a NUL character"),
        ("[convert]\nactcal = 1", ["-i", "a"], "[convert] actcal: expected true or false, found 1"),
        ("[convert]\nscaling-mode = 'rwo'", ["-i", "a"],
         "[convert] scaling-mode: invalid choice: 'rwo' (did you mean row?)"),
        ("[convert]\nlegacy = true\ncomfy-quant = true", ["-i", "a"], "[convert] legacy: not allowed with"),
        ("[completion]\nshell = 'bsah'", [], "[completion] shell: invalid choice: 'bsah' (did you mean bash?)"),
        ("[apply]", ["-i", "a"], "the file has no table [convert]"),
        ("[convert", [], "invalid TOML: Expected ']' at the end of a table declaration (at end of document)"),
        ("[convert]\nk = " + "[" * 3000, [], "invalid TOML: nested too deeply"),
        ("[convert]\nactcal = " + "[" * 100 + "]" * 100, [],
         "[convert] actcal: expected true or false, found a list"),
        ("[convert]\n" + "a." * 20_000 + "a = 1", [], "invalid TOML: more than 500 dots in a line"),
        ("#" * 100_000, [], "the configuration cannot be read: larger than 65,536 bytes"),
        ("", [], "the file has 0 tables, so the command is ambiguous (name it: "),
        ("[convert]\n[apply]", [], "the file has 2 tables, so the command is ambiguous"),
        ("input = 'x'", [], "'input' is not in a table (add a line [convert] above it)"),
        ("[aply]", [], "[aply] is not a command (did you mean apply?)"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_a_usage_error(ctq, recipe, text, words, said):
    path = recipe(text)
    outcome = ctq("--config", path, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {path}: {said}")


def test_errors_in_typed_options_do_not_name_the_file(ctq, recipe):
    outcome = ctq("--config", recipe("[convert]\ninput = 'a'\nactcal-samples = 3"), "--actcal-samples", "many")
    assert outcome.err.startswith("error: --actcal-samples: invalid int value: 'many'\n")


def test_a_name_that_is_not_utf8_is_not_saved(ctq, fp8_file):
    path, saved = fp8_file.rename(fp8_file.with_name(os.fsdecode(b"\xff.safetensors"))), fp8_file.with_name("c.toml")
    outcome = ctq("inspect", path, "--save-config", saved)
    assert (outcome.code, saved.exists()) == (1, False)
    assert outcome.err == f"error: {saved}: TOML cannot contain a file name that is not UTF-8\n"


def test_a_saved_command_can_be_repeated(done, tmp_path, flux_file):
    outputs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    folder = tmp_path / "recipes"
    folder.mkdir()
    saved = folder / "saved.toml"
    words = ("--actcal", "--actcal-engine", "layer", "--actcal-seed", 7, "--exclude-layers", "txt_mlp", "-q")
    done("-i", flux_file, "-o", outputs[0], *words, "--save-config", saved)
    text = saved.read_text(encoding="utf-8")
    assert text.startswith(f"# convert_to_quant {__version__}\n[convert]\n")
    assert 'input = "../flux.safetensors"' in text
    done("--config", saved, "-o", outputs[1])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_failed_or_dry_run_saves_nothing(ctq, done, folder, flux_file):
    before = folder()
    saved = flux_file.with_name("saved.toml")
    output = flux_file.with_name("out.safetensors")
    done("-i", flux_file, "-o", output, "--dry-run", "--save-config", saved)
    assert ctq("-i", flux_file, "-o", flux_file, "--save-config", saved).code == 1
    assert folder() == before


@pytest.mark.parametrize("link", [Path.hardlink_to, Path.symlink_to])
@pytest.mark.parametrize("flag", ["--json", "--save-config"])
def test_reports_and_saved_options_replace_no_file_of_the_command(refused, flux_file, flag, link):
    path = flux_file.with_name("link.safetensors")
    link(path, flux_file)
    message = f"{path}: {flag} and MODEL are the same file (name another file for {flag})\n"
    refused(message, "inspect", flux_file, flag, path)


TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(TEXTS | st.booleans() | NUMBERS, lambda values: st.lists(values, max_size=3), max_leaves=4))
@example('a\x7f\x1f\n"\\')
def test_values_survive_toml(value):
    assert tomllib.loads(f"x = {config._toml(value)}") == {"x": value}
