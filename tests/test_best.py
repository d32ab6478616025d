"""The best mix of formats under a size, on the tiny Flux.1."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_flux import ONE_ROW

from convert_to_quant import speeds
from convert_to_quant.best import Best, TrialModel, _best_of_size, candidates_of, load_measured, plan_best
from convert_to_quant.checkpoint import Checkpoint, Spec, open_checkpoint
from convert_to_quant.choose import CANDIDATES, Mixes, stored_bytes
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines import denoiser
from convert_to_quant.engines.trials import Bench, Candidate, damage_of, moments
from convert_to_quant.errors import OptionError, StatisticsError, UnsupportedModelError
from convert_to_quant.families.running import Geometry
from convert_to_quant.formats import FORMATS, WRITTEN
from convert_to_quant.layers import find_layers, input_scale
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions
from convert_to_quant.trials import decibels

SHOWN = RunOptions(samples=12, steps=2, height=32, width=32, text_tokens=4)
GPU = "rtx50"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, build, flux_tensors):
    """The open model."""
    path = tmp_path_factory.mktemp("best") / "flux.safetensors"
    path.write_bytes(build.file_bytes(flux_tensors()))
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def first(checkpoint):
    """A choice for which the model was run."""
    return plan_best(checkpoint, ConvertOptions(), BestOptions(gpu=GPU), SHOWN)


@pytest.fixture
def choose(checkpoint, first):
    """choose(bits=6): another choice, from what was measured then."""

    def choose(exclude: tuple[str, ...] = (), **options: Any) -> Best:
        asked = BestOptions(**{"gpu": GPU, **options})
        return plan_best(checkpoint, ConvertOptions(exclude=exclude), asked, measured=(first.statistics, first.trials))

    return choose


def written(checkpoint: Checkpoint, best: Best, folder: Path) -> Path:
    path = folder / "best.safetensors"
    convert(checkpoint, best.plan, path)
    return path


@pytest.mark.parametrize("bits", [5.6, 6.0, 7.0, 8.0, 10.0])
def test_weights_and_their_scales_take_no_more_bits_than_asked_for(checkpoint, choose, tmp_path, bits):
    best = choose(bits=bits)
    with open_checkpoint(written(checkpoint, best, tmp_path)) as file:
        stored = sum(
            info.nbytes
            for layer in best.mixes.weights
            for name, info in file.tensors.items()
            if name.startswith((f"{layer}.weight", f"{layer}.weight_scale"))
        )
        mixed = {layer.name: layer.format.name for layer in find_layers(file).quantized.values() if layer.format}
    assert 8 * stored / best.mixes.elements == best.bits
    assert stored <= best.mixes.limit_bytes(bits)
    assert mixed == {layer: fmt for layer, fmt in best.mixes.by_layer(best.choice).items() if fmt}
    assert bits > 8 or len(set(mixed.values())) > 1


def test_files_are_never_larger_than_asked_for(checkpoint, choose, tmp_path):
    smallest = written(checkpoint, choose(bits=5.6), tmp_path).stat().st_size
    expected_db = []
    for size in np.linspace(smallest, checkpoint.path.stat().st_size, 12).astype(int).tolist():
        best = choose(file_size=f"{size}B")
        assert size - 4000 < written(checkpoint, best, tmp_path).stat().st_size <= size
        expected_db.append(best.expected_db)
    assert expected_db == sorted(expected_db)


def test_sizes_that_ask_for_too_much_or_nothing_are_refused(checkpoint, choose):
    with pytest.raises(
        OptionError, match=r"even the smallest formats take 4\.\d\d bits per weight, more than --bits 3"
    ):
        choose(bits=3.0)
    with pytest.raises(OptionError, match=r"even the smallest formats make a file of \d+,\d+ bytes, more than 9,000"):
        choose(file_size="9kB")
    for enough in ({"bits": 16.0}, {"file_size": "1GB"}):
        with pytest.raises(OptionError, match="nothing would be quantized: the layers fit as they are"):
            choose(**enough)


def test_the_smallest_file_is_found_where_an_equally_large_mix_has_a_longer_header():
    damage = np.array([[[0.2, 0.1, 0.0]]])
    mixes = Mixes({"a": Spec("BF16", (2, 2))}, ("int8", "int8-convrot", ""), damage, damage,
                  np.array([np.zeros((1, 3)), [[4, 4, 8]]]))  # fmt: skip
    calls = itertools.count()

    def written(plan):
        assert next(calls) < 20
        return int(mixes.total_bytes(plan)) + 100 + int(plan[0])

    def made(choice):
        return SimpleNamespace(plan=choice, choice=choice)

    def found(size):
        return _best_of_size(mixes, size, made, written)

    assert [found(size).choice.tolist() for size in (104, 105, 110)] == [[0], [1], [2]]


def test_the_mix_is_better_than_any_one_format_of_its_size(checkpoint, choose):
    model, size = denoiser.load(checkpoint), Geometry(height=2, width=2, frames=1, text_tokens=4)
    bench = Bench(model, size, moments(model, size, images=6, levels=2, seed=9))  # other noise than it was chosen on

    def kept(mix: dict[str, Candidate]) -> float:
        return decibels(damage_of(bench, mix))

    mixes = choose().mixes
    for fmt in (FORMATS[name] for name in ("int8", "int8-convrot", "fp8", "mxfp8", "nvfp4")):
        stored = sum(stored_bytes(fmt, weight.shape) for weight in mixes.weights.values())
        best = choose(bits=8 * (stored - mixes.limit_bytes(0)) / mixes.elements)
        assert mixes.total_bytes(best.choice) <= stored
        # Damages of layers add up only roughly, so a uniform format may be as good.
        assert kept(candidates_of(best.plan)) > kept(dict.fromkeys(mixes.weights, Candidate(fmt))) - 0.2, fmt.name


def test_what_is_measured_and_estimated_is_near_what_layers_in_formats_keep_all_together(checkpoint, first):
    model = denoiser.load(checkpoint)
    size = TrialModel(checkpoint, first.plan, SHOWN).geometry
    bench = Bench(model, size, moments(model, size, images=6, levels=2, seed=9))
    kept = decibels(damage_of(bench, candidates_of(first.plan)))
    least, most = first.results["measured_db"]
    assert least - 2 < kept < most + 2
    assert {"fp8", "int8", "int8-convrot", "nvfp4"} <= first.mixes.uniform.keys(), "whatever was run to the end"
    for name, (_, expected_db) in first.mixes.uniform.items():
        alike = decibels(damage_of(bench, dict.fromkeys(first.mixes.weights, Candidate(FORMATS[name]))))
        assert abs(expected_db - alike) < 4, name


def test_formats_are_those_of_the_gpu_or_requested(choose):
    for gpu in ("any", GPU):
        chosen = set(choose(gpu=gpu, bits=10.0).counts()) - {""}
        assert all(gpu in FORMATS[name].native for name in chosen)
    assert set(choose(only="nvfp4", bits=9.0).counts()) == {"nvfp4", ""}
    with pytest.raises(OptionError, match="rtx20 computes none of fp8, nvfp4 natively"):
        choose(gpu="rtx20", only="fp8,nvfp4")


@pytest.mark.parametrize("seed", range(6))
def test_more_formats_to_choose_from_never_make_a_mix_worse(seed):
    random, layers = np.random.default_rng(seed), 12
    formats = (*CANDIDATES, "")
    bits = np.array([FORMATS[name].bits if name else 16 for name in formats])
    nbytes = 32 * random.choice([9, 12, 36], (layers, 1)) * bits
    damage = 10 ** random.uniform(-4, -1, (layers, 1)) * 4.0 ** (8 - bits)
    damage = damage * 10 ** random.uniform(-2, 2, (5, layers, len(formats)))
    damage[:, :, -1] = 0
    costs = np.array([np.zeros_like(nbytes), nbytes])

    def best_db(gpu: str, share: float) -> float:
        native = [not name or gpu in FORMATS[name].native for name in formats]
        mixes = Mixes({"": Spec("BF16", (1, 1))}, formats, np.where(native, damage, np.inf), damage, costs)
        return mixes.point(mixes.choose(share * nbytes[:, -1].sum()))[1]

    for share in (0.3, 0.4, 0.55):
        db = [best_db(gpu, share) for gpu in ("rtx20", "any", "h100", "rtx50")[share < 0.5 :]]
        assert db == sorted(db)


@pytest.fixture(scope="module")
def on_l40s(checkpoint):
    """A choice under a speed."""
    return plan_best(checkpoint, ConvertOptions(), BestOptions(gpu="l40s", speed=1.5), SHOWN)


def test_a_mix_is_as_fast_as_asked_for_and_no_larger(checkpoint, on_l40s):
    measured = on_l40s.statistics, on_l40s.trials
    free = plan_best(checkpoint, ConvertOptions(), BestOptions(gpu="l40s", only="fp8,int8-convrot"), measured=measured)
    assert on_l40s.results["speed"] >= 1.5
    assert set(on_l40s.counts()) <= {"fp8", "int8-convrot", ""}
    assert on_l40s.mixes.total_bytes(on_l40s.choice) <= on_l40s.mixes.limit_bytes(8)
    assert on_l40s.expected_db <= free.expected_db
    assert "× as fast as in 16 bits on NVIDIA L40S (published: " in on_l40s.summary()
    by_size = BestOptions(gpu="l40s", speed=1.5, file_size="1MB")
    again = plan_best(checkpoint, ConvertOptions(), by_size, measured=measured)
    assert again.results["speed"] >= 1.5
    with pytest.raises(OptionError, match="no mix of formats meets both limits on size and speed"):
        plan_best(checkpoint, ConvertOptions(), BestOptions(gpu="l40s", speed=2.1), measured=measured)


def test_the_speed_of_a_gpu_without_measurements_is_not_assumed(choose):
    with pytest.raises(OptionError, match=r"there are none for GeForce RTX 40 \(Ada\).*known: h100 \(measured\), l40s"):
        choose(gpu="rtx40", speed=1.2)
    with pytest.raises(OptionError, match="computes none of int8 natively at a known speed"):
        choose(gpu="l40s", only="int8", speed=1.2)


def test_products_cost_what_was_measured_at_the_nearest_shape():
    assert speeds.microseconds("h100", "fp8", (9216, 3072)) == 469
    assert speeds.microseconds("h100", "", (3072, 24576)) == pytest.approx(548 * 24576 / 15360)
    assert speeds.microseconds("l40s", "", (64, 64)) / speeds.microseconds("l40s", "fp8", (64, 64)) == 1.27


def test_fp8_layers_have_the_input_scales_that_were_measured(checkpoint, choose, tmp_path):
    best = plan_best(checkpoint, ConvertOptions(), BestOptions(only="fp8", gpu=GPU, bits=8.1), SHOWN)
    with open_checkpoint(written(checkpoint, best, tmp_path)) as file:
        found = {
            name: (input_scale(file, layer), layer.full_precision)
            for name, layer in find_layers(file).quantized.items()
        }
    decided = [each for each in best.plan.decisions if each.format]
    assert found == {each.layer.name: (np.float32(each.input_scale), each.full_precision) for each in decided}
    assert any(full for _, full in found.values())


def test_layers_that_see_one_token_per_image_compute_in_full_precision_where_readers_heed_it(choose):
    decisions = [each for each in choose(bits=6.0).plan.decisions if each.format]
    one_token = [each for each in decisions if each.layer.name in ONE_ROW]
    assert one_token
    assert all(each.full_precision == each.format.heeds_full_precision for each in one_token)
    assert all((each.input_scale is None) == each.format.dynamic for each in decisions)


def test_excluded_layers_stay_as_they_are(choose):
    best = choose(exclude=("double_blocks",))
    assert best.mixes.weights
    assert all(layer.startswith("single_blocks") for layer in best.mixes.weights)


def test_the_curve_rises_and_json_says_the_same(choose):
    best = choose(bits=7.0)
    curve = [db for _, db in best.mixes.curve]
    said = best.to_json()
    assert curve == sorted(curve)
    assert [db for _, db in said["curve"]] == pytest.approx(curve, abs=0.01)
    assert said["bits"] == pytest.approx(best.bits, abs=0.001)
    assert {name: each["format"] for name, each in said["layers"].items()} == (best.mixes.by_layer(best.choice))
    assert set(said["uniform"]) <= set(WRITTEN)
    assert said["more"] > [said["bits"], said["expected_db"]]
    assert best.summary().endswith(f"{best.bits:.2f} bits per weight, {best.expected_db:.1f} dB expected on noise")


def test_trials_of_other_layers_or_formats_are_refused(checkpoint, first, choose, tmp_path):
    first.statistics.save(tmp_path / "stats.safetensors")
    with pytest.raises(StatisticsError, match="the file has no trials of formats"):
        load_measured(tmp_path / "stats.safetensors")
    few = first.statistics, replace(first.trials, layers=("a", *first.trials.layers[1:]))
    with pytest.raises(StatisticsError, match=rf"{first.trials.layers[0]} was not tried in fp8, int8"):
        plan_best(checkpoint, ConvertOptions(), BestOptions(gpu=GPU), measured=few)
    with pytest.raises(StatisticsError, match=r"was not tried in fp8 .*run the trials again"):
        choose(only="fp8", bits=9.0)


def test_a_model_that_is_quantized_already_is_refused(checkpoint, tmp_path):
    path = tmp_path / "int8.safetensors"
    convert(checkpoint, plan_conversion(checkpoint, ConvertOptions(format="int8")), path)
    with open_checkpoint(path) as other, pytest.raises(OptionError, match="no layer of this file can be quantized"):
        plan_best(other, ConvertOptions(), BestOptions())


def test_incompatible_libraries_are_reported(checkpoint, monkeypatch):
    def supports(*_: Any) -> None:
        raise ImportError("no AutoImageProcessor\nin this version")

    monkeypatch.setattr("convert_to_quant.engines.diffusers.supports", supports)
    with pytest.raises(UnsupportedModelError, match="diffusers cannot be imported here: no AutoImageProcessor in this"):
        plan_best(checkpoint, ConvertOptions(), BestOptions())
