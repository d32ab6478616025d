"""Another program with our module's name is told about, once, wherever it is installed."""

from __future__ import annotations

import re
import sys

import pytest

from convert_to_quant.cli import build_parser
from convert_to_quant.cli.neighbour import FLAGS

THEIRS = """\
[console_scripts]
convert-to-quant = convert_to_quant.convert_to_quant:main
convert_to_quant = convert_to_quant.convert_to_quant:main
ctq = convert_to_quant.convert_to_quant:main
"""
OURS = "[console_scripts]\nconvert_to_quant = convert_to_quant.cli:main\nctq = convert_to_quant.cli:main\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a distribution look installed, behind a missing folder and a file on the path."""

    def make(name: str, entry_points: str | None) -> None:
        info = tmp_path / "site packages" / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").touch()
        if entry_points is not None:
            (info / "entry_points.txt").write_text(entry_points)
        places = [tmp_path / "none", info / "METADATA", info.parent]
        monkeypatch.setattr(sys, "path", [*map(str, places), *sys.path])

    return make


@pytest.mark.parametrize("entry_points", [THEIRS, None])
def test_the_other_program_is_told_in_one_line(entry_points, install, ctq, done, fp8_file):
    install("convert_to_quant-1.3.4", entry_points)
    outcome = done("inspect", fp8_file)
    assert re.fullmatch(
        r"note: another program, convert-to-quant 1\.3\.4, is installed under our module's name, .*"
        r"pip uninstall convert-to-quant, then install calibrated-quant again\n",
        outcome.err,
    )
    assert ctq("inspect", fp8_file, "--quiet").err == ""
    assert ctq("inspect", "--help").err == ""


@pytest.mark.parametrize("name", ["calibrated_quant-0.1.0", "convert_to_quant-0.1.0"])
def test_ours_under_either_name_is_not_told(name, install, ctq, fp8_file):
    install(name, OURS)
    assert ctq("inspect", fp8_file).err == ""


THEIR_FLAGS = """
--actcal --actcal-device --actcal-lora --actcal-percentile --actcal-samples --actcal-seed --add-keys --anima
--block-size --boogu --calib-cpu --calib-samples --cleanup-fp8-scaled --comfy-quant --convert-fp8-scaled
--convert-int8-scaled --convrot --convrot-group-size --custom-block-size --custom-convrot
--custom-convrot-group-size --custom-fpmm --custom-full-precision-mm --custom-heur --custom-layers
--custom-scaling-mode --custom-simple --custom-type --device --distillation-large --distillation-small --dry-run
--dynamic-convrot --early-stop-loss --early-stop-lr --early-stop-stall --edit-quant --exclude-layers --extract-lora
--fallback --fallback-block-size --fallback-simple --flux2 --full-matrix --full-precision-matrix-mult
--full-precision-mm --fullmatch --gemma4 --generic-text --group-size --help-advanced --help-experimental
--help-filters --help-learned --help-lora --help-modes --heur --hp-filter --hunyuan --ideogram4 --input
--input-scale --input-scales --int8 --krea2 --layer-config --legacy-input-add --lens --lora-ar-threshold
--lora-depth --lora-output --lora-rank --lora-target --low-memory --lr --lr-adaptive-mode --lr-cooldown --lr-factor
--lr-gamma --lr-min --lr-patience --lr-schedule --lr-shape-influence --lr-threshold --lr-threshold-mode --ltxv2
--make-hybrid-mxfp8 --manual-seed --max-k --min-k --minimaxh3 --mistral --mxfp8 --nerf-large --nerf-small
--no-normalize-scales --num-iter --nvfp4 --optimizer --output --output-dtype --preserve-layers --quant-filter --qwen
--qwen-vlm --qwen35 --radiance --remove-keys --save-quant-metadata --scale-optimization --scale-refinement
--scaled-fp8-marker --scaling-mode --simple --t5xxl --tensor-scales --top-p --use-speed --verbose --verbose-pinned
--visual --wan --zimage --zimage-refiner -esloss -eslr -esstall -fpmm -i -lm -o
"""
"""Of its version 1.3.4, with dashes, which both programs take for underscores."""


def test_every_flag_of_the_other_program_is_ours_or_answered():
    ours = set(build_parser("convert")._option_string_actions)
    assert [flag for flag in THEIR_FLAGS.split() if flag not in ours and flag not in FLAGS] == []
    assert ours.isdisjoint(FLAGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_the_other_program_and_their_values_are_answered(ctq, flag):
    spelled = "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag
    outcome = ctq("-i", "in.safetensors", "-v", spelled)
    what = f"{flag} is another program's option" if flag.startswith("-") else f"unexpected argument {flag!r}"
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, f"error: {what} ({FLAGS[flag]})")
