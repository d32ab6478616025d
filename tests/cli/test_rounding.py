"""`convert_to_quant --round`: by running the model, or with the moments of `observe --moments`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines import moments
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import ConvertOptions, RunOptions
from convert_to_quant.rounding import error_of

SMALL = ("--actcal-samples", 3, "--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4)
OBSERVED = [str(word).replace("actcal-", "") for word in SMALL]
SHOWN = RunOptions(samples=3, height=32, width=32, text_tokens=4)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_rounding_lowers_the_error_of_outputs(done, flux_file, tmp_path, name):
    out, plain = tmp_path / "round.safetensors", tmp_path / "plain.safetensors"
    done("-i", flux_file, "-o", plain, "--format", name)
    done("-i", flux_file, "-o", out, "--format", name, "--round", *SMALL)
    done("inspect", out, "--strict")
    with open_checkpoint(flux_file) as source, open_checkpoint(out) as rounded, open_checkpoint(plain) as nearest:
        assert '"round": true' in rounded.metadata["convert_to_quant"]
        plan = plan_conversion(source, ConvertOptions(format=name))
        layers = [layer for layer, _ in plan.quantized]
        gathering = moments.Gathering(source, plan.table, layers, SHOWN)
        errors = []
        for layer in layers:
            own, weight = gathering.moments_of(layer), torch.from_numpy(dequantize(source, layer))
            found = [find_layers(file).quantized[layer.name] for file in (rounded, nearest)]
            assert own is not None
            errors.append([
                float(error_of(weight, torch.from_numpy(dequantize(file, each)), own).sum())
                for file, each in zip((rounded, nearest), found, strict=True)
            ])  # fmt: skip
    assert all(ours <= theirs * 1.001 for ours, theirs in errors)
    assert sum(ours for ours, _ in errors) < 0.8 * sum(theirs for _, theirs in errors)


def test_a_mix_is_rounded_with_and_without_a_run(done, flux_file, tmp_path, monkeypatch):
    out, stats = tmp_path / "best.safetensors", tmp_path / "stats.safetensors"
    best = ("-i", flux_file, "-o", out, "--best", "--gpu", "rtx50", "--bits", 7, "--round")
    done(*best, *SMALL)
    done("inspect", out, "--strict")
    done("observe", flux_file, "-o", stats, "--trials", "--moments", *OBSERVED)
    monkeypatch.setattr(moments, "Gathering", None)  # no model runs
    done(*best, "--from", stats)
    done("inspect", out, "--strict")


@pytest.fixture
def observed(done, flux_file, tmp_path):
    """Statistics with second moments."""
    stats = tmp_path / "stats.safetensors"
    done("observe", flux_file, "-o", stats, "--moments", *OBSERVED)
    return stats


@pytest.fixture
def rounded(done, flux_file, contents):
    """rounded(words...): the tensors of a rounded file."""

    def run(*words: Any) -> dict[str, bytes]:
        out = flux_file.with_name("out.safetensors")
        done("-i", flux_file, "-o", out, "--format", "nvfp4", "--round", *words)
        return contents(out)

    return run


def test_saved_moments_round_like_a_run_and_merge(ctq, done, rounded, flux_file, observed, tmp_path, monkeypatch):
    wanted = rounded(*SMALL)
    twice, twin = tmp_path / "twice.safetensors", tmp_path / "twin.safetensors"
    done("observe", flux_file, "-o", twin, "--moments", *OBSERVED, "--seed", 42, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(moments, "Gathering", None)  # no model runs
        assert rounded("--from", observed) == wanted
        assert rounded("--from", observed, "--from", twin) == wanted
    done("observe", flux_file, "-o", twin, "--moments", *OBSERVED, "--seed", 1)
    done("merge", observed, twin, "-o", twice)
    assert rounded("--from", twice) == rounded("--from", twin, "--from", observed)
    assert ctq("merge", observed, twin, "-o", twin).code == 1  # whose moments it would replace as it reads them


def test_resume_gathers_only_the_missing_layers(done, flux_file, observed, monkeypatch):
    folder = observed.with_name(observed.name + ".moments")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    observed.unlink()
    lost = min(before)
    (folder / lost).unlink()
    gathered = []
    gather = moments.Gathering.gather
    monkeypatch.setattr(moments.Gathering, "gather", lambda self, names: gathered.extend(names) or gather(self, names))
    done("observe", flux_file, "-o", observed, "--moments", *OBSERVED, "--resume")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [f"{name}.safetensors" for name in gathered] == [lost]


@pytest.mark.parametrize(
    ("where", "old", "new", "said"),
    [
        (
            "stats.safetensors",
            b"quant.moments",
            b"quant.momentZ",
            "the file has no second moments (create it with observe",
        ),
        ("stats.safetensors", b"d.lin.safetensors", b"/d/in.safetensors", "without file names"),
        ("*/*", b"run", b"ruN", "its header entry for second moments is without its run or layers"),
        ("*/*", b"moments", b"momentZ", "not the second moments of stats.safetensors"),
    ],
)
def test_moments_that_are_missing_or_of_another_run_are_refused(
    ctq, flux_file, observed, tmp_path, where, old, new, said
):
    for path in tmp_path.glob(where):
        path.write_bytes(path.read_bytes().replace(old, new, 1))
    refused = ctq("-i", flux_file, "-o", tmp_path / "o.safetensors", "--format", "int8", "--round", "--from", observed)
    assert refused.code == 1
    assert said in refused.err
