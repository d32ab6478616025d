from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convert_to_quant import fidelity
from convert_to_quant.engines import noise
from convert_to_quant.errors import CalibrationError, OptionError
from convert_to_quant.families.running import Geometry, Signal
from convert_to_quant.fidelity import EXACT_DB, velocity_fidelity

SIZE = Geometry(height=2, width=3, frames=1, text_tokens=4)


class Line:
    """A model that notes what it is shown, and whose velocity is a multiple of its latents.

    Args:
        slope: what they are multiplied by, and by 1 + the mean of the prompt.
        change: makes another velocity of that one, the noise level, and the mean of each prompt.
    """

    def __init__(self, slope, change=lambda velocity, _sigma, _text: velocity):
        self.slope, self.change, self.shown, self.linears = slope, change, [], {}

    def latent_shape(self, geometry):
        return (geometry.height * geometry.width, 8)

    def velocity(self, latents, sigma, conditioning, _):
        self.shown.append(conditioning)
        text = conditioning["text"].mean((1, 2), keepdim=True)
        return self.change(latents * self.slope * (1 + text), sigma, text)


def prompts(count):
    return {"text": torch.full((count, 4, 5), 0.25)}


def compare(reference, other, **options):
    return velocity_fidelity(reference, other, options.pop("prompts", prompts(3)), SIZE, **options)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_velocity_that_is_ten_percent_off_has_20_db_everywhere(guidance):
    found = compare(Line(0.5), Line(0.55), steps=4, guidance=guidance)
    assert [level.sigma for level in found.levels] == [1.0, 0.75, 0.5, 0.25]
    assert [level.sqnr_db for level in found.levels] == pytest.approx([20.0] * 4, abs=1e-4)
    assert found.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert found.standard_error_db == pytest.approx(0, abs=1e-4)


def test_the_quantized_model_is_asked_at_the_references_states():
    # Its own states would differ more and more; the ratio at the reference's states follows from the slopes alone.
    found = compare(Line(0.5), Line(0.5, lambda velocity, sigma, _: velocity * (1 + 0.1 * sigma)), steps=4)
    wanted = [-20 * math.log10(0.1 * sigma) for sigma in (1.0, 0.75, 0.5, 0.25)]
    assert [level.sqnr_db for level in found.levels] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("steps", "guidance", "factor"), [(4, 1.0, 1.25), (1, 3.0, 1.75)])
def test_final_latents_are_those_of_each_models_own_steps(steps, guidance, factor):
    # slopes: 1.25 times with the prompt, 1 without; guided: 1 + 3 * 0.25
    found = compare(Line(0.5), Line(0.55), steps=steps, guidance=guidance, prompts=prompts(1), batch=1)
    start = fidelity.check_latents(Line(1), SIZE, 1, 43).double()
    reference, own = (start * (1 - slope * factor / steps) ** steps for slope in (0.5, 0.55))
    peak = float(reference.max() - reference.min())
    assert found.psnr_db == pytest.approx(10 * math.log10(peak**2 / float((reference - own).square().mean())), abs=1e-3)
    assert found.psnr_standard_error_db == 0.0


def test_prompts_start_from_the_same_noise_in_any_batch():
    other = Line(0.5, lambda velocity, sigma, _: velocity * (1 + 0.3 * sigma))
    one, many = (compare(Line(0.5), other, prompts=prompts(5), batch=size) for size in (1, 4))
    assert one.sqnr_db == pytest.approx(many.sqnr_db, abs=1e-4)
    assert one.psnr_db == pytest.approx(many.psnr_db, abs=1e-4)


def test_the_empty_prompt_keeps_masks_and_numbers():
    reference = Line(0.5)
    given = {**prompts(1), "mask": torch.ones(1, 4, dtype=torch.int64), "guidance": torch.full((1,), 3.5)}
    compare(reference, Line(0.5), steps=1, guidance=2.0, prompts=given)
    seen = reference.shown[0]
    assert seen["text"].flatten(1).amax(1).tolist() == [0.25, 0.0]
    assert seen["mask"].tolist() == [[1, 1, 1, 1]] * 2
    assert seen["guidance"].tolist() == [3.5, 3.5]


def test_the_first_step_is_not_computed_twice():
    quantized = Line(0.5)
    compare(Line(0.5), quantized, steps=3, prompts=prompts(1))
    assert len(quantized.shown) == 5


def test_the_spread_is_the_standard_error_over_prompts():
    text = {"text": torch.tensor([0.0, 1.0, 3.0])[:, None, None].expand(3, 4, 5)}
    uneven = Line(0.5, lambda velocity, _, text: velocity * (1.01 + 0.01 * text))
    found = compare(Line(0.5), uneven, steps=1, prompts=text)
    ratios = [-20 * math.log10(0.01 * (1 + value)) for value in (0.0, 1.0, 3.0)]
    assert found.sqnr_db == pytest.approx(np.mean(ratios), abs=1e-3)
    assert found.standard_error_db == pytest.approx(np.std(ratios, ddof=1) / math.sqrt(3), abs=1e-3)


def test_the_worst_is_that_of_one_prompt_at_one_level_at_any_size():
    def scene(size, *texts):
        text = {"text": torch.tensor(texts)[:, None, None].expand(len(texts), 4, 5)}
        shape = Line(1).latent_shape(size)
        return fidelity.Scene(torch.ones(len(texts), *shape), text, size)

    worse = Line(0.1, lambda velocity, sigma, text: velocity * (1 + 0.01 * (text + sigma)))
    scenes = [scene(SIZE, 0.0, 1.0), scene(Geometry(1, 2, 1, 4), 3.0)]
    found = fidelity.scenes_fidelity(Line(0.1), worse, scenes, steps=2)
    errors = np.array([[text + sigma for sigma in (1.0, 0.5)] for text in (0.0, 1.0, 3.0)])
    wanted = -20 * np.log10(0.01 * errors)
    assert found.worst_db == pytest.approx(wanted.min(), abs=1e-3)
    assert found.sqnr_db == pytest.approx(wanted.mean(), abs=1e-3)
    assert [level.worst_db for level in found.levels] == pytest.approx(wanted.min(0), abs=1e-3)
    assert [size.geometry for size in found.sizes] == [one.geometry for one in scenes]
    assert [size.sqnr_db for size in found.sizes] == pytest.approx([wanted[:2].mean(), wanted[2:].mean()], abs=1e-3)
    assert [size.worst_db for size in found.sizes] == pytest.approx([wanted[:2].min(), wanted[2:].min()], abs=1e-3)
    assert found.prompts == 3


class Taker(Line):
    """Takes a stream of tokens, a vector and a mask."""

    def signals(self, size):
        return {
            "text": Signal((size.text_tokens, 512)),
            "pooled": Signal((512,)),
            "mask": Signal((size.text_tokens,), "mask"),
        }


@pytest.mark.parametrize("seed", [0, 42, 43])
def test_a_check_shows_nothing_that_a_calibration_could_see(seed):
    """Fails if the noise of `check` becomes that of calibration: in numbers, kind, or size."""
    model, size, count = Taker(1), Geometry(4, 6, 1, 16), 12
    scenes = fidelity.noise_scenes(model, size, count, seed=seed)
    assert [scene.geometry for scene in scenes] == [size, Geometry(2, 3, 1, 4)]
    magnitudes = []
    for scene in scenes:
        calibrated = [
            noise.latents(model.latent_shape(scene.geometry), one, n) for one in (seed, 42) for n in range(99)
        ]
        ways = [
            noise.conditioning(model.signals(scene.geometry), way, one, number)
            for one in (seed, 42) for way in noise.CONDITIONINGS for number in range(count)
        ]  # fmt: skip
        for number in range(count):
            start = scene.latents[number].flatten()
            assert not any(torch.equal(start, other.flatten()) for other in calibrated)
            text = scene.conditioning["text"][number]
            full = text.abs().amax(-1) > 0
            tokens = text[full].flatten()
            assert full[: int(full.sum())].all(), "zeros only behind the text"
            magnitudes.append((len(full) - int(full.sum()), float(tokens.std()), float(text[0].abs().amax())))
            for way in ways:
                shown = way["text"][0].flatten()
                cosine = torch.nn.functional.cosine_similarity(text.flatten(), shown, 0)
                assert abs(float(cosine)) < 0.3, "another stream of random numbers"
    fixed = {way.magnitude for way in noise.CONDITIONINGS}
    spread = [size for _, size, _ in magnitudes]
    assert not any(abs(one - other) < 0.01 * other for one in spread for other in fixed), "other magnitudes"
    assert max(spread) > 2 * min(spread)
    assert 0.4 < min(spread) < max(spread) < 3.3
    assert all(loudest < 6 * size for _, size, loudest in magnitudes), "no loud channels"
    assert any(padded for padded, _, _ in magnitudes)
    assert scenes[0].conditioning["pooled"].std(1).max() < 1.2 * noise.VECTOR_MAGNITUDE
    assert (scenes[0].conditioning["mask"] == 1).all()


def test_progress_counts_prompts_and_levels():
    calls = []
    compare(Line(1), Line(1), steps=2, batch=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize(("option", "none"), [("steps", 0), ("batch", 0), ("prompts", prompts(0))])
def test_options_below_one_are_refused(option, none):
    with pytest.raises(OptionError, match="at least 1, found 0"):
        compare(Line(1), Line(1), **{option: none})


def test_no_scenes_are_refused():
    with pytest.raises(OptionError, match="at least 1, found 0"):
        fidelity.scenes_fidelity(Line(1), Line(1), [])


def turning(value):
    """A model that turns bad at sigma 0.5."""

    def change(velocity, sigma, _):
        if sigma == 0.5:
            velocity[-1].reshape(-1)[0] = value
        return velocity

    return Line(0.5, change)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_refused_with_its_side_and_level(value):
    for pair, side in (((turning(value), Line(0.5)), "reference"), ((Line(0.5), turning(value)), "quantized model")):
        with pytest.raises(CalibrationError, match=f"the velocity in the {side} is not finite at sigma 0.5"):
            compare(*pair, steps=4)


def test_latents_that_overflow_are_refused():
    for pair, side in (((Line(2e38), Line(1)), "reference"), ((Line(1), Line(2e38)), "quantized model")):
        with pytest.raises(CalibrationError, match=f"in the {side} is not finite"):
            compare(*pair, steps=2)


def test_ratios_are_finite_or_nan_and_never_exact_by_mistake():
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    bad = [torch.full((1, 2), value) for value in (math.nan, math.inf, -math.inf)]
    for ratio in (fidelity.sqnr_db, fidelity.psnr_db):
        assert ratio(zero, zero).item() == EXACT_DB
        assert ratio(zero, one).item() == -EXACT_DB
        for value in bad:
            assert ratio(one, value).isnan().all()
            assert ratio(value, one).isnan().all()
            assert ratio(value, value).isnan().all()


def test_a_lost_row_shows_in_the_worst_rows_and_not_in_the_whole():
    errors = fidelity._TokenErrors()
    wanted = torch.ones(1000, 4)
    wanted[0] = 1e4
    found = wanted.clone()
    found[1:11] = 0  # ten of a thousand rows are lost
    errors.add("layer", wanted[:500], found[:500])
    errors.add("layer", wanted[500:], found[500:])
    (result,) = errors.results()
    assert result.rows == 1000
    assert result.worst == pytest.approx(1, rel=0.05)
    assert result.mean == pytest.approx(0.01, rel=1e-3)
    assert result.whole < 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_errors_of_rows_are_finite_wherever_outputs_are(scale):
    errors = fidelity._TokenErrors()
    errors.add("layer", torch.full((8, 4), scale), torch.full((8, 4), 3e38))
    (result,) = errors.results()
    assert 1 < result.mean < math.inf
    assert 1 < result.worst < math.inf
    assert 1 < result.whole < math.inf
