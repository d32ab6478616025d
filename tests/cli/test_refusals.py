"""Calls that contradict themselves, or whose outputs cannot be: refused in one line, before any work."""

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
    ("-i flux.safetensors", "name the new file with -o OUT (or --in-place, or --dry-run)\n"),
    ("-i flux.safetensors --in-place", "--in-place needs --actcal: only scales can be written in place\n"),
    ("-i flux.safetensors --in-place --actcal",
     "--in-place calibrates a model that is FP8 already, and this one is not; use -o OUT\n"),
    ("-i fp8.safetensors -o out.safetensors --in-place --actcal --actcal-engine layer",
     "--in-place changes fp8.safetensors; leave -o out, or drop --in-place to write out.safetensors\n"),
    (CONVERT + "--actcal-lora a", "--actcal-lora needs --actcal\n"),
    (CONVERT + "--actcal-samples 3", "--actcal-samples needs --actcal\n"),
    (CONVERT + "--actcal-text-tokens 3", "--actcal-text-tokens needs --actcal\n"),
    (CONVERT + "--actcal --actcal-seed -1", "a seed should not be negative, found -1\n"),
    ("-i none.safetensors --in-place --actcal --actcal-samples 0", "samples should be at least 1, found 0\n"),
    (CONVERT + "--enable-fp8-matmul",
     "--enable-fp8-matmul needs --actcal: without input scales FP8 products would use 1.0\n"),
    (CONVERT + "--float16-safe", "--float16-safe needs --actcal: it is about the input scales that --actcal finds\n"),
    (CONVERT + "--actcal --no-input-scale", "--no-input-scale leaves out what --actcal is asked to find\n"),
    (CONVERT + "--legacy --scaling-mode row", "legacy files support one scale per tensor only"),
    (CONVERT + "--block-size 0", "--block-size should be at least 1 and below 65536, found 0\n"),
    (CONVERT + "--exclude-layers '('",
     "--exclude-layers '(' is no regular expression: missing ), unterminated subpattern at position 0\n"),
    (CONVERT + "--format fp9", "unknown or read-only format 'fp9' (one of fp8, "),
    (CONVERT + "--preset flxu1", "unknown preset 'flxu1' (did you mean 'flux1'? presets: auraflow, "),
    (CONVERT + "--bits 8", "--bits needs --best\n"),
    (CONVERT + "--size 1MB", "--size needs --best\n"),
    (CONVERT + "--gpu rtx40", "--gpu needs --best\n"),
    (CONVERT + "--from stats.safetensors", "--from needs --best or --round\n"),
    (CONVERT + "--best --format int8", "--format and --best both say what layers become"),
    (CONVERT + "--best --layer-format a=int8", "--layer-format and --best both"),
    (CONVERT + "--best --scaling_mode row", "--scaling-mode and --best both"),
    (CONVERT + "--best --weight-scale mse", "--weight-scale and --best both"),
    (CONVERT + "--best --legacy", "--legacy and --best both"),
    (CONVERT + "--best --actcal", "--actcal and --best both"),
    (CONVERT + "--best --actcal-margin 2", "--actcal-margin is for --actcal, and --best would not use it\n"),
    (CONVERT + "--best --actcal-lora a.safetensors", "--actcal-lora is for --actcal"),
    (CONVERT + "--best --bits 8 --size 1MB", "--bits and --size both limit the file size"),
    (CONVERT + "--best --bits 1", "--bits should be between 3 and 16, found 1"),
    (CONVERT + "--best --size '8 parsecs'", "--size '8 parsecs' is not a size"),
    (CONVERT + "--best --gpu voodoo", "unknown GPU 'voodoo'"),
    (CONVERT + "--best --formats int9", "unknown format 'int9'"),
    (CONVERT + "--best --gpu rtx20 --formats fp8", "rtx20 computes none of fp8 natively"),
    (CONVERT + "--round --weight-scale mse", "--round chooses the weight scales"),
    (CONVERT + "--round --merge-lora lora.safetensors", "--merge-lora and --round cannot be combined"),
    (CONVERT + "--round --fold --from stats.safetensors", "--fold changes what --from was observed of"),
    (CONVERT + "--best --fold --from stats.safetensors", "--fold changes what --from was observed of"),
    (CONVERT + "--fold", "--fold changes what FP8 layers receive, so their input scales have to be measured"),
    (CONVERT + "--fold --format int8 --merge-lora x.safetensors", "--fold takes no LoRA"),
    (CONVERT + "--fold --actcal --actcal-lora x.safetensors", "--fold takes no LoRA"),
    (CONVERT + "--fold --format int8 --exclude-layers .", "no layer to quantize reads channels that can be folded"),
    ("-i fp8.safetensors -o out.safetensors --actcal --actcal-engine layer --merge-lora lora.safetensors",
     "--merge-lora changes weights, and the input is quantized already"),
    ("--config none.toml", "none.toml: the configuration cannot be read: No such file or directory\n"),
    # observe
    ("observe -o s.safetensors", "name a MODEL, or a --pipeline"),
    (OBSERVE + "--save-every -1", "--save-every should not be negative"),
    (OBSERVE + "--component unet", "--component needs --pipeline"),
    (OBSERVE + "--conditioning c --engine comfyui", "--conditioning does not go with --engine"),
    (OBSERVE + "--engine diffusers --comfyui-dir c", "--comfyui-dir does not go with --engine"),
    (OBSERVE + "--trials --lora a.safetensors", "--trials does not go with --lora"),
    (OBSERVE + "--trials --engine comfyui", "--trials does not go with --engine comfyui"),
    ("observe fp8.safetensors -o s.safetensors --trials", "no layer of this file can be quantized"),
    (PIPELINE + "--trials", "--trials does not go with --pipeline"),
    (PIPELINE + "--lora l", "--lora does not go with --pipeline"),
    (PIPELINE + "--comfyui-dir c", "--comfyui-dir does not go with --pipeline"),
    (PIPELINE + "--engine comfyui", "--engine comfyui does not go with"),
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
    (CHECK + "--pipeline d --prompts p --conditioning c", "--conditioning does not go with --pipeline"),
    (CHECK + "--conditioning c --text-tokens 5", "--text-tokens is for noise"),
    # report
    ("report fp8.safetensors", "no statistics: nothing says what the layers of fp8.safetensors receive"),
    (REPORT + 2 * "stats.safetensors ", "3 statistics files: at most two can be compared (--merge"),
    ("report " + 3 * "fp8.safetensors ", "3 checkpoints: at most two can be compared"),
    (REPORT + "stats.safetensors --against margin=2", "--against compares two ways to solve"),
    (REPORT + "--against ' '", "--against needs options"),
    (REPORT + """--against "keep='a" """, "--against \"keep='a\" cannot be split into options"),
    (REPORT + "--against margin=0.5", "a margin should be at least 1, found 0.5"),
    (REPORT + "--against margn=2", "unknown option --margn (did you mean --margin?)"),
    (REPORT + "--margin 0.5", "a margin should be at least 1, found 0.5 (below 1 clips observed values)\n"),
    (REPORT + "-o -", "-o needs a file (only --csv and --json go to stdout, as -)"),
    (REPORT + "--png -", "--png needs a file"),
    (REPORT + "--csv - --json -", "--csv and --json cannot both go to stdout"),
    (REPORT + "-o r.PNG", "-o writes an HTML page, and r.PNG ends otherwise (--png"),
]  # fmt: skip
IMPOSSIBLE = [
    *((f"{call} -o none/out", "none/out: cannot be written: the folder none does not exist\n") for call in (
        "-i flux.safetensors", "-i fp8.safetensors --actcal", "observe flux.safetensors", "merge stats.safetensors",
        COMFYUI, "apply fp8.safetensors stats.safetensors", "dequantize fp8.safetensors", "repair fp8.safetensors",
        "migrate fp8.safetensors --to legacy", "lora fold a --like fp8.safetensors", "report stats.safetensors",
    )),
    ("-i flux.safetensors -o .", ".: cannot be written: a folder, not a file\n"),
    ("-i flux.safetensors -o new/", "new/: cannot be written: a file was expected, and this names a folder\n"),
    (OBSERVE + "--json no/r.json", "no/r.json: cannot be written: the folder no does not exist\n"),
    (REPORT + "--png .", ".: cannot be written: a folder, not a file\n"),
    ("card flux.safetensors fp8.safetensors -o flux.safetensors", "the folder cannot be made: a file is there\n"),
    ("demo -o flux.safetensors", "flux.safetensors: the folder cannot be made: a file is there\n"),
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
    ("apply flux.safetensors stats.safetensors --in-place", "flux.safetensors: no FP8 layers"),
    (REPORT + "other.safetensors", "have no layer in common"),
    ("report other.safetensors fp8.safetensors", "made for another model"),
]  # fmt: skip


@pytest.fixture
def place(fp8_file, flux, statistics, lora, monkeypatch):
    """A folder with all that the calls name."""
    monkeypatch.chdir(fp8_file.parent)
    statistics(flux.linear).save("stats.safetensors")
    statistics({"other": (16, 32)}).save("other.safetensors")
    lora.rename("lora.safetensors")


@pytest.mark.parametrize(("call", "said"), MISUSE)
def test_misuse_is_told(ctq, place, folder, call, said):
    before = folder()
    outcome = ctq(*shlex.split(call))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert said in outcome.err
    assert folder() == before


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
@pytest.mark.parametrize(("call", "said"), IMPOSSIBLE)
def test_what_cannot_be_done_is_told_and_a_dry_run_tells_it_too(ctq, place, folder, call, said, dry):
    before = folder()
    outcome = ctq(*shlex.split(call), *dry)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert said in outcome.err
    assert folder() == before
