"""Calls that are refused in one line before any work: contradictory options and impossible outputs."""

from __future__ import annotations

import shlex

import pytest

CONVERT = "-i flux.safetensors -o out.safetensors "
OBSERVE = "observe flux.safetensors -o s.safetensors "
COMFYUI = "comfyui observe --server http://127.0.0.1:9 --workflow workflow.json "
PIPELINE = "observe -o s.safetensors --pipeline d --prompts p "
CHECK = "check flux.safetensors flux.safetensors "
REPORT = "report stats.safetensors "

MISUSE = [
    # convert
    ("-i flux.safetensors", "no output: add -o OUT (or --in-place, or --dry-run)\n"),
    ("-i flux.safetensors --in-place", "--in-place needs --actcal\n"),
    ("-i flux.safetensors --in-place --actcal",
     "--in-place calibrates FP8 checkpoints only; use -o OUT to convert this one\n"),
    ("-i fp8.safetensors -o out.safetensors --in-place --actcal --actcal-engine layer",
     "--in-place changes fp8.safetensors, but -o names out.safetensors; give one\n"),
    (CONVERT + "--actcal-lora a", "--actcal-lora needs --actcal\n"),
    (CONVERT + "--actcal-samples 3", "--actcal-samples needs --actcal or --best or --round or --fold\n"),
    (CONVERT + "--actcal --actcal-seed -1", "a seed should not be negative, found -1\n"),
    ("-i none.safetensors --in-place --actcal --actcal-samples 0", "samples should be at least 1, found 0\n"),
    (CONVERT + "--enable-fp8-matmul", "--enable-fp8-matmul needs --actcal\n"),
    (CONVERT + "--float16-safe", "--float16-safe needs --actcal\n"),
    (CONVERT + "--actcal --no-input-scale", "--actcal and --no-input-scale cannot be combined"),
    (CONVERT + "--legacy --scaling-mode row", "legacy files support one scale per tensor only"),
    (CONVERT + "--block-size 0", "--block-size should be at least 1 and below 65536, found 0\n"),
    (CONVERT + "--exclude-layers '('",
     "--exclude-layers '(' is not a regular expression: missing ), unterminated subpattern at position 0\n"),
    (CONVERT + "--format fp9", "unknown or read-only format 'fp9' (one of fp8, "),
    (CONVERT + "--preset flxu1", "unknown preset 'flxu1' (did you mean 'flux1'? presets: auraflow, "),
    (CONVERT + "--bits 8", "--bits needs --best\n"),
    (CONVERT + "--size 1MB", "--size needs --best\n"),
    (CONVERT + "--gpu rtx40", "--gpu needs --best\n"),
    (CONVERT + "--from stats.safetensors", "--from needs --best or --round\n"),
    *((CONVERT + f"--best --{flag}", f"--best and --{flag.split()[0]} cannot be combined (--best chooses")
      for flag in ("format int8", "layer-format a=int8", "scaling-mode row", "weight-scale mse", "legacy", "actcal")),
    (CONVERT + "--best --actcal-margin 2", "--actcal-margin needs --actcal\n"),
    (CONVERT + "--best --actcal-lora a.safetensors", "--actcal-lora needs --actcal\n"),
    (CONVERT + "--best --bits 8 --size 1MB", "--bits and --size both limit the file size"),
    (CONVERT + "--best --bits 1", "--bits should be between 3 and 16, found 1"),
    (CONVERT + "--best --size '8 parsecs'", "--size '8 parsecs' is not a size"),
    (CONVERT + "--best --gpu voodoo", "unknown GPU 'voodoo'"),
    (CONVERT + "--best --formats int9", "unknown format 'int9'"),
    (CONVERT + "--best --gpu rtx20 --formats fp8", "rtx20 computes none of fp8 natively"),
    (CONVERT + "--round --weight-scale mse", "--round chooses the weight scales"),
    (CONVERT + "--round --merge-lora lora.safetensors", "--round and --merge-lora cannot be combined"),
    (CONVERT + "--round --fold --from stats.safetensors", "--fold and --from cannot be combined"),
    (CONVERT + "--fold", "--fold changes the inputs of FP8 layers, so --actcal has to measure their scales\n"),
    (CONVERT + "--fold --format int8 --merge-lora x.safetensors", "--fold and --merge-lora cannot be combined"),
    (CONVERT + "--fold --actcal --actcal-lora x.safetensors", "--fold and --actcal-lora cannot be combined"),
    (CONVERT + "--fold --format int8 --exclude-layers .", "no layer to quantize reads channels that can be folded"),
    ("-i fp8.safetensors -o out.safetensors --actcal --actcal-engine layer --merge-lora lora.safetensors",
     "--merge-lora cannot change weights that are already quantized"),
    ("--config none.toml", "none.toml: the configuration cannot be read: No such file or directory\n"),
    # observe
    ("observe -o s.safetensors", "expected a MODEL or --pipeline"),
    (OBSERVE + "--save-every -1", "--save-every should not be negative"),
    (OBSERVE + "--component unet", "--component needs --pipeline"),
    (OBSERVE + "--conditioning c --engine comfyui", "--conditioning cannot be combined with --engine"),
    (OBSERVE + "--engine diffusers --comfyui-dir c", "--comfyui-dir cannot be combined with --engine"),
    (OBSERVE + "--trials --lora a.safetensors", "--trials cannot be combined with --lora"),
    (OBSERVE + "--trials --engine comfyui", "--trials cannot be combined with --engine comfyui"),
    ("observe fp8.safetensors -o s.safetensors --trials", "no layer of this file can be quantized"),
    (PIPELINE + "--trials", "--trials cannot be combined with --pipeline"),
    (PIPELINE + "--lora l", "--lora cannot be combined with --pipeline"),
    (PIPELINE + "--comfyui-dir c", "--comfyui-dir cannot be combined with --pipeline"),
    (PIPELINE + "--engine comfyui", "--engine comfyui cannot be combined with --pipeline"),
    # comfyui
    (COMFYUI + "-o s.safetensors --seeds 0", "--seeds should be at least 1, found 0\n"),
    (COMFYUI + "-o s.safetensors --seed -1", "a seed should not be negative, found -1\n"),
    ("comfyui install .", "there is no folder"),
    ("comfyui", "the following arguments are required: ACTION\n"),
    # check
    (CHECK + "--at-least nan", "--at-least should be a finite number, found nan"),
    (CHECK + "--at-least inf --json -", "--at-least should be a finite number, found inf"),
    (CHECK + "--guidance inf", "--guidance should be a finite number, found inf"),
    (CHECK + "--steps 0", "steps should be at least 1, found 0"),
    (CHECK + "--seed -1", "a seed should not be negative"),
    (CHECK + "--device abacus", "unknown device 'abacus' (cpu, cuda, cuda:0 or xpu)\n"),
    (CHECK + "--device mps", "device 'mps' is not supported: it lacks float64, which the statistics need (cpu, "),
    (CHECK + "--prompts p.txt", "--prompts needs --pipeline"),
    (CHECK + "--save-conditioning c", "--save-conditioning needs --pipeline"),
    (CHECK + "--pipeline d", "--pipeline needs --prompts FILE"),
    (CHECK + "--pipeline d --prompts p --conditioning c", "--conditioning cannot be combined with --pipeline"),
    (CHECK + "--conditioning c --text-tokens 5", "--text-tokens is for noise"),
    # report
    ("report fp8.safetensors", "no statistics of the layer inputs of fp8.safetensors"),
    (REPORT + 2 * "stats.safetensors ", "expected at most two statistics files, found 3 (--merge"),
    ("report " + 3 * "fp8.safetensors ", "expected at most two checkpoints, found 3"),
    (REPORT + "stats.safetensors --against margin=2", "--against needs one statistics file"),
    (REPORT + "--against ' '", "--against needs options"),
    (REPORT + """--against "keep='a" """, "--against \"keep='a\" cannot be split into options"),
    (REPORT + "--against margin=0.5", "a margin should be at least 1, found 0.5"),
    (REPORT + "--against margn=2", "unknown option --margn (did you mean --margin?)"),
    (REPORT + "--margin 0.5", "a margin should be at least 1, found 0.5 (below 1 clips observed values)\n"),
    (REPORT + "-o -", "-o needs a file (only --csv and --json can write to stdout (-))"),
    (REPORT + "--png -", "--png needs a file"),
    (REPORT + "--csv - --json -", "--csv and --json cannot both write to stdout"),
    (REPORT + "-o r.PNG", "-o writes HTML, found r.PNG (use --png"),
]  # fmt: skip
IMPOSSIBLE = [
    *((f"{call} -o none/out", "none/out: cannot be written: the folder none does not exist\n") for call in (
        "-i flux.safetensors", "-i fp8.safetensors --actcal", "observe flux.safetensors", "merge stats.safetensors",
        COMFYUI, "apply fp8.safetensors stats.safetensors", "dequantize fp8.safetensors", "repair fp8.safetensors",
        "migrate fp8.safetensors --to legacy", "lora fold a --like fp8.safetensors", "report stats.safetensors",
    )),
    ("-i flux.safetensors -o .", ".: cannot be written: a folder, not a file\n"),
    ("-i flux.safetensors -o new/", "new/: cannot be written: expected a file, found the name of a folder\n"),
    ("-i flux.safetensors -o new.pt", "new.pt: cannot be written: .pt means a pickle (use .safetensors)\n"),
    (OBSERVE + "--json no/r.json", "no/r.json: cannot be written: the folder no does not exist\n"),
    (REPORT + "--png .", ".: cannot be written: a folder, not a file\n"),
    ("card flux.safetensors fp8.safetensors -o flux.safetensors", "the folder cannot be created: a file has"),
    ("demo -o flux.safetensors", "flux.safetensors: the folder cannot be created: a file has its name\n"),
    *((f"{call} -o {file}", f"{file}: the output is the same file as the input {file} (name another output)\n")
      for call, file in (
        ("-i flux.safetensors", "flux.safetensors"), ("observe flux.safetensors", "flux.safetensors"),
        ("merge stats.safetensors", "stats.safetensors"), ("dequantize fp8.safetensors", "fp8.safetensors"),
        ("report stats.safetensors", "stats.safetensors"), (COMFYUI, "workflow.json"),
    )),
    *((f"{call} -o fp8.safetensors", "fp8.safetensors: the output is the same file as the input fp8.safetensors "
       "(name another output, or add --in-place)\n") for call in (
        "-i fp8.safetensors --actcal", "apply fp8.safetensors stats.safetensors",
    )),
    (OBSERVE + "--json s.safetensors", "s.safetensors: --json and -o are the same file (name another file for --json)"),
    (REPORT + "fp8.safetensors --csv fp8.safetensors", "fp8.safetensors: --csv and STATS are the same file"),
    (REPORT + "-o r --png r", "r: --png and -o are the same file (name another file for --png)\n"),
    ("observe none.safetensors -o out.safetensors", "none.safetensors: no such file\n"),
    (CONVERT + "--best --from none.safetensors", "none.safetensors: no such file"),
    ("report none.safetensors", "none.safetensors: no such file"),
    ("apply flux.safetensors stats.safetensors --in-place", "the diffusion model in this file has no FP8"),
    (REPORT + "other.safetensors", "have no layer in common"),
    ("report other.safetensors fp8.safetensors", "made for another model"),
]  # fmt: skip


@pytest.fixture
def place(fp8_file, flux, statistics, lora, monkeypatch):
    """A folder with all files of the calls."""
    monkeypatch.chdir(fp8_file.parent)
    statistics(flux.linear).save("stats.safetensors")
    statistics({"other": (16, 32)}).save("other.safetensors")
    lora.rename("lora.safetensors")


@pytest.mark.parametrize(("call", "said"), MISUSE)
def test_usage_errors(ctq, place, folder, call, said):
    before = folder()
    outcome = ctq(*shlex.split(call))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert said in outcome.err
    assert folder() == before


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
@pytest.mark.parametrize(("call", "said"), IMPOSSIBLE)
def test_impossible_calls_fail_in_a_dry_run_too(ctq, place, folder, call, said, dry):
    before = folder()
    outcome = ctq(*shlex.split(call), *dry)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert said in outcome.err
    assert folder() == before
