"""Trial runs of the tiny Flux.1: what formats do to its velocity, one layer at a time and together."""

import itertools

import numpy as np
import pytest
import torch

from convert_to_quant.best import candidates, formats_for, input_scales
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.choose import CANDIDATES
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines import denoiser, diffusers
from convert_to_quant.engines.trials import (
    ARITHMETIC,
    Bench,
    Candidate,
    Moment,
    Simulated,
    damage_of,
    moments,
    relative_energies,
    run_trials,
)
from convert_to_quant.families.running import Geometry
from convert_to_quant.formats import FORMATS
from convert_to_quant.formats.record import GPUS
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions

SIZE = Geometry(height=3, width=4, frames=1, text_tokens=5)


@pytest.fixture
def layers(flux):
    """Those that can be quantized."""
    return {layer.name: layer for layer, _ in plan_conversion(flux, ConvertOptions(format="int8")).quantized}


@pytest.fixture
def bench(flux):
    model = denoiser.load(flux)
    return Bench(model, SIZE, moments(model, SIZE, images=4, levels=2, seed=3))


@pytest.fixture
def offered(flux, layers):
    """Everything that a Blackwell GPU multiplies, for every layer."""
    seen = diffusers.observe(
        flux, None, RunOptions(samples=3, steps=1, device="cpu"), geometry=SIZE, layers=list(layers)
    ).statistics
    return candidates(layers, input_scales(flux, layers, seen), formats_for(BestOptions(gpu="rtx50")))


def test_it_is_shown_every_way_of_conditioning_at_every_noise_level(bench):
    assert [(len(moment.latents), moment.sigma) for moment in bench.moments] == [(4, 1.0), (4, 0.5)]
    assert [images for _, images in bench.shown] == [2, 1, 1] * 2
    assert len({name for name, _ in bench.shown}) == 6


def test_shares_of_the_layers_add_up_to_the_whole(bench, offered):
    told = []
    whole = run_trials(bench, offered, progress=lambda done, of: told.append((done, of)))
    parts = [run_trials(bench, offered, share=(number, 2)) for number in range(2)]
    together = parts[0].plus(parts[1])

    assert told[-1] == (cells := sum(map(len, offered.values())), cells)
    assert (parts[0].count.any((1, 2)) ^ parts[1].count.any((1, 2))).all()
    assert np.array_equal(together.count, whole.count)
    for name in ("error", "damage"):
        assert np.allclose(
            getattr(together, name), getattr(whole, name), rtol=0.02, atol=0
        )  # batches differ in the last bits


def test_it_can_be_cancelled_at_every_evaluation(bench, offered):
    ran = []
    bench.denoiser.model.register_forward_pre_hook(lambda *_: ran.append(1))

    def cancel(*_):
        if len(ran) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trials(bench, offered, progress=cancel)
    assert len(ran) == 4


def test_of_the_formats_of_one_size_only_the_best_of_each_card_is_run_to_the_end(bench, offered):
    trials = run_trials(bench, offered)
    for row, layer in enumerate(trials.layers):
        ran = {name for place, name in enumerate(trials.formats) if trials.count[row, place].all()}
        error = dict(zip(trials.formats, trials.error[row].sum(1), strict=True))
        best = {
            min(of_one, key=lambda name: error[name])
            for gpu, bits in itertools.product(GPUS, (4.5, 6.5, 8, 8.25))
            if (
                of_one := [n for n in error if error[n] and (FORMATS[n].bits, gpu in FORMATS[n].native) == (bits, True)]
            )
        }
        assert ran == best, layer
        assert {"mxfp8", "nvfp4"} <= ran
    assert (trials.error[trials.count > 0] > 0).all()


def test_a_trial_that_begins_at_its_block_is_the_trial_of_the_whole_model(bench, offered):
    wanted = bench.run()
    found = run_trials(bench, {name: some[:1] for name, some in offered.items()})
    for layer, (candidate, *_) in offered.items():
        alone = damage_of(bench, {layer: candidate})
        assert found.mean_damage(layer, candidate.format.name) == pytest.approx(alone, rel=0.02), layer
    assert bench.place("single_blocks.0.linear1") == 1
    assert all("forward" not in vars(module) for module in bench.denoiser.model.modules())
    again = bench.run()
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@pytest.mark.parametrize("name", ["int8", "int8-convrot", "fp8", "mxfp8", "nvfp4"])
def test_damage_is_that_of_the_file_that_would_be_written(flux, bench, layers, tmp_path, name):
    scale = None if FORMATS[name].dynamic else 1.0
    found = damage_of(bench, dict.fromkeys(layers, Candidate(FORMATS[name], scale)))
    path = tmp_path / f"{name}.safetensors"
    convert(flux, plan_conversion(flux, ConvertOptions(format=name)), path)
    with open_checkpoint(path) as written, torch.no_grad():
        model = denoiser.load(written, arithmetic=ARITHMETIC)
        velocities = [model.velocity(m.latents, m.sigma, m.conditioning, SIZE) for m in bench.moments]
    wanted = relative_energies(bench.moments, bench.run(), velocities) / [images for _, images in bench.shown]
    assert np.isfinite(found).all()
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_weight_in_a_format_is_the_weight_that_would_be_written(save, name):
    weight = np.random.default_rng(0).standard_normal((128, 512), np.float32)
    with open_checkpoint(save("original.safetensors", {"blocks.0.x.weight": weight})) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions(format=name))
        convert(checkpoint, plan, checkpoint.path.with_name("written.safetensors"))
    simulated = Simulated(torch.from_numpy(weight), Candidate(FORMATS[name], full_precision=True))
    with open_checkpoint(checkpoint.path.with_name("written.safetensors")) as written:
        wanted = dequantize(written, find_layers(written).quantized["blocks.0.x"])
    assert [fmt.name for fmt in plan.formats] == [name]
    assert np.allclose(simulated.product(torch.eye(512)).T.numpy(), wanted, atol=1e-5)


def test_the_energy_of_an_error_is_relative_to_each_image_and_summed_by_way():
    wanted = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]])
    moment = Moment({"silent": 2, "strong": 1}, wanted, 1.0, {})
    found = relative_energies([moment], [wanted], [wanted + torch.tensor([0.0, 0.5])])
    assert found == pytest.approx([0.01 + 1, 0.25])
