"""Sums of trial runs: they add up, and a file keeps them."""

from dataclasses import replace

import numpy as np
import pytest

from convert_to_quant.checkpoint import Entry, write_checkpoint
from convert_to_quant.errors import StatisticsError
from convert_to_quant.trials import Trials

FORMATS, MOMENTS = ("int8", "nvfp4"), ("noise, 1", "noise, 0.5", "loud, 1")


def trials(seed=0, layers=("a", "b")):
    """Every layer in INT8, and the first one in NVFP4."""
    random = np.random.default_rng(seed)
    found = Trials.empty(layers, FORMATS, MOMENTS)
    found.error[:] = random.uniform(size=found.error.shape)
    found.error[-1, 1] = 0
    found.count[:, 0], found.count[0, 1] = 4, 2
    found.damage[:] = found.count * random.uniform(size=found.damage.shape)
    return found


def test_damage_is_a_mean_over_images_where_it_was_measured():
    one, both = trials(), trials().plus(trials(1))
    damage = one.mean_damage("a", "nvfp4")
    assert damage is not None
    assert np.array_equal(damage, one.damage[0, 1] / 2)
    assert one.mean_damage("b", "nvfp4") is one.mean_damage("c", "int8") is one.mean_damage("a", "fp8") is None
    mean = both.mean_damage("a", "nvfp4")
    assert mean is not None
    assert mean == pytest.approx((one.damage[0, 1] + trials(1).damage[0, 1]) / 4)


def test_what_was_not_run_to_the_end_is_estimated_by_output_errors_within_a_size():
    found = replace(trials(), formats=("int8", "fp8"))  # of one size; FP8 was not run in the second layer
    found.error[1, 1] = 3 * found.error[1, 0]
    damage = found.mean_damage("b", "int8")
    assert damage is not None
    assert found.expected_damage("b", "fp8") == pytest.approx(3 * damage)
    assert trials().expected_damage("b", "nvfp4") is None, "of another size"
    assert found.expected_damage("c", "fp8") is found.expected_damage("a", "mxfp8") is None


def test_trials_of_other_layers_do_not_add_up():
    with pytest.raises(StatisticsError, match="trials of different layers cannot be added"):
        trials().plus(trials(layers=("a", "c")))


def test_a_file_keeps_them(tmp_path):
    path, kept = tmp_path / "trials.safetensors", trials()
    write_checkpoint(path, *kept.entries())
    found = Trials.load(path)
    assert found is not None
    assert (found.layers, found.formats, found.moments) == (kept.layers, kept.formats, kept.moments)
    for name in ("error", "damage", "count"):
        assert getattr(found, name).dtype == getattr(kept, name).dtype
        assert np.array_equal(getattr(found, name), getattr(kept, name))


def _without_moments(tensors, metadata):
    tensors_of_none, metadata_of_none = Trials.empty(("a", "b"), ("fp8", "nvfp4"), ()).entries()
    tensors.update(tensors_of_none)
    metadata.update(metadata_of_none)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, _: tensors.pop("trial_damage"), "not F64"),
        (lambda tensors, _: tensors.update(trial_count=tensors["trial_damage"]), "not I64"),
        (lambda _, metadata: metadata.update({"convert_to_quant.trials": "{}"}), "without their layers"),
        (lambda _, metadata: metadata.update({"convert_to_quant.trials": "["}), "damaged: the trials are"),
        (_without_moments, "without their layers, formats or moments"),
        (lambda tensors, _: tensors.update(trial_damage=Entry.of(np.full((2, 2, 3), np.nan))), "not finite"),
        (lambda tensors, _: tensors.update(trial_error=Entry.of(np.full((2, 2, 3), -1.0))), "or negative"),
    ],
)
def test_damaged_trials_are_refused(tmp_path, change, said):
    path, (tensors, metadata) = tmp_path / "trials.safetensors", trials().entries()
    change(tensors, metadata)
    write_checkpoint(path, tensors, metadata)
    with pytest.raises(StatisticsError, match=said):
        Trials.load(path)


def test_a_file_without_trials_has_none(statistics, tmp_path):
    statistics({"a": (4, 4)}).save(tmp_path / "stats.safetensors")
    assert Trials.load(tmp_path / "stats.safetensors") is None
