"""The layer engine: simulated inputs against their definition."""

import numpy as np
import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import layer as engine
from convert_to_quant.engines.layer import Simulation, generator, input_range, percentile_of, simulate, unit_rows
from convert_to_quant.errors import TensorError
from convert_to_quant.layers import find_layers

OUT, IN = 100, 96
SCALES = {
    "tiny": np.float32(1e-30),
    "huge": np.float32(1e25),
    "row": np.geomspace(1e-3, 1e3, OUT).astype(np.float32)[:, None],
}


def fp8_layer(codes, scale, dtype="F8_E4M3", name="layer"):
    return {f"{name}.weight": (dtype, codes), f"{name}.weight_scale": np.asarray(scale, np.float32)}


def random_codes(shape=(OUT, IN), seed=0):
    """Finite codes of both signs, in either format."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 0x78, shape) | random.integers(0, 2, shape) << 7).astype(np.uint8)


def real_weight(codes, scale):
    """codes × scale in float64, by torch's cast."""
    return torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy() * np.float64(scale)


@pytest.mark.parametrize("scaling", SCALES)
def test_column_squares_do_not_leave_float64(save, scaling):
    codes = random_codes()
    with open_checkpoint(save("a.safetensors", fp8_layer(codes, SCALES[scaling]))) as checkpoint:
        (layer,) = find_layers(checkpoint).quantized.values()
        found = engine.column_squares(checkpoint, layer)
    np.testing.assert_allclose(found, np.sum(real_weight(codes, SCALES[scaling]) ** 2, axis=0), rtol=1e-5)


def range_of(save, tensors, lora=None, **options):
    with open_checkpoint(save("range.safetensors", tensors)) as checkpoint:
        (found,) = simulate(
            checkpoint, find_layers(checkpoint).quantized, Simulation(**options), lambda _: lora
        ).values()
        return found


def test_balanced_inputs_give_outputs_of_unit_variance_with_equal_shares_of_the_channels():
    random = np.random.default_rng(2)
    weight = random.standard_normal((400, 300)) * 10.0 ** random.uniform(-3, 3, 300)
    squares = np.sum(weight**2, 0)
    unit = random.standard_normal((2000, 300))
    x = unit * np.sqrt(400 / 300 / squares)
    # The engine's range at percentile 100 is the largest |x| of exactly these inputs.
    found = input_range(unit.astype(np.float32), squares, 400, 100)
    assert found == pytest.approx(np.abs(x).max(), rel=1e-5)
    assert np.var(x @ weight.T) == pytest.approx(1, rel=0.01)
    shares = [np.mean(np.outer(x[:, j], weight[:, j]) ** 2) for j in range(300)]
    assert np.mean(shares) == pytest.approx(1 / 300, rel=0.01)
    assert np.std(shares) < 0.1 * np.mean(shares)


def test_range_is_the_percentile_of_balanced_inputs_drawn_for_this_seed_and_layer(save):
    codes = random_codes()
    weight = real_weight(codes, 0.25)
    unit = generator(7, "layer").standard_normal((50, IN), dtype=np.float32)
    x = torch.from_numpy(unit * np.sqrt(OUT / IN / np.sum(weight**2, 0)))
    count = int(x.numel() * 0.97)
    expected = x.abs().flatten().kthvalue(count).values.item()
    assert range_of(save, fp8_layer(codes, 0.25), samples=50, percentile=97.0, seed=7) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("percentile", [0.001, 1, 50, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 999, 1000, 4096])
def test_percentiles_count_like_torch_kthvalue(size, percentile):
    values = np.random.default_rng(size).random(size, np.float32)
    rank = max(1, int(size * percentile / 100))
    assert percentile_of(values.copy(), percentile) == torch.from_numpy(values).kthvalue(rank).values.item()


def test_lora_rows_appear_with_noise_and_both_signs_at_unit_variance():
    a = np.random.default_rng(4).standard_normal((6, 200)).astype(np.float32) * 1e-3 + 5e-4
    rows = unit_rows(np.random.default_rng(0), Simulation(), 200, a)
    assert rows.shape == (4 * 6, 200)
    assert rows.dtype == np.float32
    assert rows.std() == pytest.approx(1, rel=1e-5)
    clean, noisy, noisier, negated = rows.reshape(4, 6, 200)
    np.testing.assert_array_equal(negated, -clean)
    np.testing.assert_allclose(clean / a, np.full_like(a, (clean / a).mean()), rtol=1e-5)
    spread = clean.std()
    for copy, level in ((noisy, 0.1), (noisier, 0.2)):
        assert (copy - clean).std() / spread == pytest.approx(level, rel=0.1)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_lora_rows_of_any_magnitude_give_the_same_inputs(magnitude):
    a = np.random.default_rng(5).standard_normal((3, 50)).astype(np.float32)
    expected = unit_rows(np.random.default_rng(0), Simulation(), 50, a)
    found = unit_rows(np.random.default_rng(0), Simulation(), 50, a * np.float32(magnitude))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    rows = unit_rows(np.random.default_rng(0), Simulation(), 8, np.full((2, 8), magnitude, np.float32))
    assert rows.std() == pytest.approx(1), "also of one constant value"


def test_lora_rows_of_zeros_are_no_directions_and_random_rows_take_their_place():
    rows = unit_rows(np.random.default_rng(0), Simulation(samples=5), 8, np.zeros((2, 8), np.float32))
    np.testing.assert_array_equal(rows, np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32))


@pytest.fixture
def equals(save):
    """A file of twelve layers of one weight."""
    layers = [fp8_layer(random_codes(), 0.25, name=f"blocks.{number}") for number in range(12)]
    with open_checkpoint(
        save("equals.safetensors", {key: value for each in layers for key, value in each.items()})
    ) as file:
        yield file


def test_layers_draw_their_own_numbers_whatever_the_order_the_threads_and_the_other_layers(equals, monkeypatch):
    layers, told = find_layers(equals).quantized, []
    expected = simulate(equals, layers, Simulation(), progress=told.append)
    assert sum(told) == 12 * OUT * IN
    assert list(expected) == list(layers)
    assert len(set(expected.values()) | set(simulate(equals, layers, Simulation(seed=2)).values())) == 24
    assert list(expected.values()) == pytest.approx([expected["blocks.0"]] * 12, rel=0.3)
    for cores in (1, 3, None):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert simulate(equals, layers, Simulation()) == expected
    backwards = simulate(equals, dict(reversed(layers.items())), Simulation())
    assert list(backwards.items()) == list(reversed(expected.items()))
    assert simulate(equals, {"blocks.7": layers["blocks.7"]}, Simulation()) == {"blocks.7": expected["blocks.7"]}


def test_lora_rows_are_asked_for_by_layer_name(equals):
    rows = {"blocks.3": np.eye(2, IN, dtype=np.float32)}
    layers = find_layers(equals).quantized
    without, with_lora = (simulate(equals, layers, Simulation(), get) for get in (None, rows.get))
    assert {name for name in layers if without[name] != with_lora[name]} == {"blocks.3"}


def test_channels_of_zeros_are_left_out_and_do_not_blow_up_the_range(save):
    codes = random_codes()
    half = codes.copy()
    half[:, ::2] = 0
    half[:, 1] = 0x80  # -0 is zero as well
    found = range_of(save, fp8_layer(half, 0.25), samples=200)
    assert np.isfinite(found)
    # Fewer channels share the output's variance: each is larger by about sqrt(2).
    assert found == pytest.approx(range_of(save, fp8_layer(codes, 0.25), samples=200) * np.sqrt(2), rel=0.1)


@pytest.mark.parametrize(
    ("shape", "code", "scale"),
    [((32, 16), 0x00, 1.0), ((32, 16), 0x80, 1.0), ((32, 16), 0x38, 0.0), ((0, 16), 0, 1.0), ((32, 0), 0, 1.0)],
    ids=["zeros", "minus zeros", "a scale of zero", "no rows", "no columns"],
)
def test_all_zero_and_empty_weights_have_no_range(save, shape, code, scale):
    assert range_of(save, fp8_layer(np.full(shape, code, np.uint8), scale)) == 0


@pytest.mark.parametrize(
    ("dtype", "code"), [("F8_E4M3", 0x7F), ("F8_E4M3", 0xFF), ("F8_E5M2", 0x7C), ("F8_E5M2", 0xFE)]
)
def test_a_weight_with_nan_or_infinity_is_refused_by_name(save, dtype, code):
    codes = random_codes()
    codes[77, 5] = code
    with pytest.raises(TensorError) as caught:
        range_of(save, fp8_layer(codes, 0.25, dtype), percentile=50)
    assert str(caught.value).endswith("range.safetensors: layer.weight: the weight has NaN or infinite values")
