"""Recording through ComfyUI's wrappers: exact, silent, and gone afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from convert_to_quant.comfyui_nodes.recording import KEY, Recorder
from convert_to_quant.errors import CalibrationError, StatisticsError
from convert_to_quant.recorder import find_linears


class Cancelled(BaseException):
    """ComfyUI's cancelling is no Exception."""


def test_it_records_every_layer_and_leaves_the_latents_as_they_are(comfyui, noise):
    model = comfyui.model()
    plain = comfyui.guider(model).sample(noise, (1.0,))
    recorder = Recorder()

    recorded = comfyui.guider(recorder.attach(model)).sample(noise, (1.0,))

    statistics = recorder.statistics()
    assert torch.equal(recorded, plain)
    assert statistics.layers == comfyui.shapes
    assert statistics.absmax.tolist() == [noise.abs().max().item() * magnitude for magnitude in (1, 2, 4)]
    assert statistics.count.tolist() == [noise.numel()] * 3
    assert statistics.rows_per_sample.tolist() == [5] * 3
    assert statistics.samples == 2
    assert statistics.provenance == {
        "engine": ("comfyui",), "model": ("Model",), "conditioning": ("workflow",), "weights": ("high precision",)
    }  # fmt: skip


def test_hooks_are_there_only_while_it_samples(comfyui, noise):
    model = comfyui.model()
    attached = Recorder().attach(model)
    during = []

    comfyui.guider(attached, lambda _: during.append(comfyui.hooks(model))).sample(noise)

    assert min(during) > 0
    assert comfyui.hooks(model) == 0
    assert model.wrappers == {}


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt, Cancelled])
def test_samplings_that_end_early_leave_no_hook_and_add_nothing(comfyui, noise, error):
    model, recorder = comfyui.model(), Recorder()
    attached = recorder.attach(model)

    def happen(step: int) -> None:
        if step == 1:
            raise error

    with pytest.raises(error):
        comfyui.guider(attached, happen).sample(noise)
    assert comfyui.hooks(model) == 0
    with pytest.raises(CalibrationError, match="nothing was recorded yet"):
        recorder.statistics()
    comfyui.guider(attached).sample(noise)
    assert recorder.statistics().samples == 2


def test_a_sampling_inside_of_a_sampling_is_counted_once(comfyui, noise):
    model, recorder = comfyui.model(), Recorder()
    attached = recorder.attach(model)
    inner = comfyui.guider(attached)

    comfyui.guider(attached, lambda _: inner.sample(noise, (0.25,))).sample(noise, (1.0,))

    assert recorder.statistics().calls.tolist() == [2, 2, 2]
    assert recorder.statistics().samples == 2


def test_the_last_recorder_attached_is_the_one_that_records_and_says_so(comfyui, noise, caplog):
    first, second = Recorder(), Recorder()
    before = first.attach(comfyui.model())
    assert not caplog.messages
    attached = second.attach(before)
    assert [text for text in caplog.messages if "Only the last one records" in text] == caplog.messages != []
    comfyui.guider(attached).sample(noise)

    assert second.statistics().samples == 2
    with pytest.raises(CalibrationError, match="nothing was recorded yet"):
        first.statistics()
    assert {kind: list(by_key) for kind, by_key in attached.wrappers.items()} == {
        "outer_sample": [KEY],
        "apply_model": [KEY],
    }


def test_wrappers_of_others_stay(comfyui):
    model = comfyui.model()
    model.add_wrapper_with_key("outer_sample", "another pack", print)

    assert Recorder().attach(model).wrappers["outer_sample"]["another pack"] == [print]


def levels(statistics: Any) -> list[int]:
    found: list[int] = np.flatnonzero(statistics.sigma_count.sum(0)).tolist()
    return found


def test_weights_that_comfyui_casts_to_fp8_are_told(comfyui, noise):
    recorder, model = Recorder(), comfyui.model()
    for module in find_linears(model.model.diffusion_model).values():
        module.weight.data = module.weight.to(torch.float8_e4m3fn)
    comfyui.guider(recorder.attach(model)).sample(noise)
    assert recorder.statistics().provenance["weights"] == ("float8_e4m3fn",)


def test_noise_levels_are_told_of_flow_models_only(comfyui, noise):
    found = []
    for sampling in (comfyui.CONST, comfyui.EPS):
        recorder = Recorder()
        comfyui.guider(recorder.attach(comfyui.model(sampling=sampling))).sample(noise, (1.0, 0.5))
        found.append(levels(recorder.statistics()))
    assert found == [[3, 7], [8]]


def test_totals_add_up_and_go_on_from_statistics(comfyui, noise):
    model, recorder = comfyui.model(), Recorder()
    attached = recorder.attach(model)
    comfyui.guider(attached).sample(noise)
    comfyui.guider(attached).sample(3 * noise)
    twice = recorder.statistics()

    later = Recorder(twice)
    comfyui.guider(later.attach(model)).sample(noise)

    assert (twice.samples, later.statistics().samples) == (4, 6)
    assert twice.calls.tolist() == [4, 4, 4]
    assert later.statistics().calls.tolist() == [6, 6, 6]
    assert (later.statistics().absmax == twice.absmax).all()


def test_copies_on_further_gpus_are_recorded_with_the_model(comfyui, noise):
    alone, together = Recorder(), Recorder()
    comfyui.guider(alone.attach(comfyui.model())).sample(noise)
    model, copy = comfyui.model(), comfyui.model()
    model.copies = [copy]
    during = []

    def happen(_: int) -> None:
        during.append((comfyui.hooks(model), comfyui.hooks(copy)))

    comfyui.guider(together.attach(model), happen).sample(noise)

    wanted, found = alone.statistics(), together.statistics()
    assert min(min(hooks) for hooks in during) > 0
    assert (comfyui.hooks(model), comfyui.hooks(copy)) == (0, 0)
    assert found.samples == wanted.samples == 2
    assert found.calls.tolist() == [4, 4, 4]  # each step calls the model and its copy
    for column in ("histogram", "absmax", "sigma_count", "rows", "rows_per_sample"):
        assert (getattr(found, column) == getattr(wanted, column)).all(), column


def test_statistics_of_another_model_are_refused_before_sampling(comfyui, noise, statistics):
    recorder, model = Recorder(), comfyui.model()
    comfyui.guider(recorder.attach(model)).sample(noise)
    seen = recorder.statistics()
    Recorder(seen).attach(model)
    weights = {name: module.weight.mul_(-1) for name, module in find_linears(model.model.diffusion_model).items()}
    assert weights.keys() == seen.weights.keys()
    for other in (statistics({"other": (4, 4)}), seen):
        with pytest.raises(StatisticsError, match=r"made for another model .* 3 linear layers"):
            Recorder(other).attach(model)


def test_a_model_without_linear_layers_is_refused(comfyui):
    with pytest.raises(CalibrationError, match="no linear layers"):
        Recorder().attach(comfyui.model({}))
