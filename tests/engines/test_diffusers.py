import math

import numpy as np
import pytest
import torch
from tiny_flux import QUANTIZED, random_flux
from torch.nn import functional

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines import noise
from convert_to_quant.errors import CalibrationError, OptionError
from convert_to_quant.families.running import Geometry, Signal
from convert_to_quant.formats import DEFAULT_GRID
from convert_to_quant.layers import find_layers
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.options import RunOptions

SIZE = Geometry(height=3, width=4, frames=1, text_tokens=5)


def observe(checkpoint, table=None, *, samples=3, steps=1, seed=42, device="cpu", **how):
    shown = RunOptions(samples=samples, steps=steps, seed=seed, device=device)
    return engine.observe(checkpoint, table, shown, geometry=SIZE, **how)


def in_blocks(layer):
    return "blocks" in layer


@pytest.fixture
def flux(save_model):
    """A small Flux.1 with its blocks in FP8."""
    with open_checkpoint(save_model(random_flux(), in_blocks)) as checkpoint:
        yield checkpoint


def independent_flux(state, image, text, vector, sigma, size):
    """Flux.1 as published: image [B, height · width, channels], text [B, T, text], vector [B, vector] -> as image."""
    axes = (4, 6, 6)
    height, width = size
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(0.0, height), torch.arange(0.0, width))
    positions = torch.cat([torch.zeros(text.shape[1], 3), positions])
    angles = [positions[:, [n]] / 10000 ** (torch.arange(0, axis, 2) / axis) for n, axis in enumerate(axes)]
    rotation = torch.polar(torch.ones(len(positions), sum(axes) // 2), torch.cat(angles, -1))

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def embedded(name, x):
        return linear(f"{name}.out_layer", functional.silu(linear(f"{name}.in_layer", x)))

    def clock(value):
        angle = 1000 * value * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return torch.cat([angle.cos(), angle.sin()]).expand(len(image), -1)

    def modulation(name, count):
        return linear(name, functional.silu(steering))[:, None].chunk(count, -1)

    def normed(x, shift, scale):
        return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(name, qkv):
        q, k, v = qkv.unflatten(-1, (3, -1, sum(axes))).permute(2, 0, 3, 1, 4)
        return rms(q) * state[f"{name}.query_norm.scale"], rms(k) * state[f"{name}.key_norm.scale"], v

    def attend(q, k, v):
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation for x in (q, k))
        q, k = (torch.view_as_real(x).flatten(-2) for x in (q, k))
        return ((q @ k.mT / math.sqrt(sum(axes))).softmax(-1) @ v).transpose(1, 2).flatten(2)

    steering = embedded("time_in", clock(sigma)) + embedded("vector_in", vector)
    if "guidance_in.in_layer.weight" in state:
        steering = steering + embedded("guidance_in", clock(3.5))
    streams = {"txt": linear("txt_in", text), "img": linear("img_in", image)}
    blocks = sorted({".".join(name.split(".")[:2]) for name in state if "_blocks." in name})
    for block in (name for name in blocks if name.startswith("double")):
        steps = {stream: modulation(f"{block}.{stream}_mod.lin", 6) for stream in streams}
        parts = [
            heads(f"{block}.{stream}_attn.norm", linear(f"{block}.{stream}_attn.qkv", normed(x, *steps[stream][:2])))
            for stream, x in streams.items()
        ]
        mixed = attend(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)))
        for stream, y in zip(streams, mixed.split([text.shape[1], image.shape[1]], 1), strict=True):
            _, _, gate, shift, scale, mlp_gate = steps[stream]
            x = streams[stream] + gate * linear(f"{block}.{stream}_attn.proj", y)
            hidden = functional.gelu(linear(f"{block}.{stream}_mlp.0", normed(x, shift, scale)), approximate="tanh")
            streams[stream] = x + mlp_gate * linear(f"{block}.{stream}_mlp.2", hidden)
    x = torch.cat([*streams.values()], 1)
    for block in (name for name in blocks if name.startswith("single")):
        shift, scale, gate = modulation(f"{block}.modulation.lin", 3)
        qkv, hidden = linear(f"{block}.linear1", normed(x, shift, scale)).split([3 * x.shape[-1], 4 * x.shape[-1]], -1)
        mixed = attend(*heads(f"{block}.norm", qkv))
        x = x + gate * linear(f"{block}.linear2", torch.cat([mixed, functional.gelu(hidden, approximate="tanh")], -1))
    shift, scale = modulation("final_layer.adaLN_modulation.1", 2)
    return linear("final_layer.linear", normed(x[:, text.shape[1] :], shift, scale))


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("size", [{"hidden": 32, "depth": 1, "singles": 1}, {"hidden": 48, "depth": 2, "singles": 3}])
def test_it_computes_what_an_independent_flux_computes(save_model, size, guidance):
    state = {name: torch.from_numpy(values) for name, values in random_flux(guidance=guidance, **size).items()}
    state |= {name: values + 0.3 * torch.randn(values.shape) for name, values in state.items() if "norm" in name}
    with open_checkpoint(save_model(state)) as checkpoint:
        denoiser = engine.load(checkpoint)
        latents, conditioning = engine.start(denoiser, SIZE, 7, [1, 2])
        found = denoiser.velocity(latents, 0.7, conditioning, SIZE)
    given = (conditioning[name] for name in ("encoder_hidden_states", "pooled_projections"))
    wanted = independent_flux(state, latents, *given, 0.7, (SIZE.height, SIZE.width))
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_are_understood_and_kept_in_layer_names(save_model, prefix):
    with open_checkpoint(save_model(random_flux(), in_blocks, prefix)) as checkpoint:
        seen = observe(checkpoint)
        assert list(seen.statistics.layers) == list(find_layers(checkpoint).quantized)
    assert set(seen.statistics.layers) == {prefix + name for name in QUANTIZED}
    assert seen.unvisited == ()


def test_a_checkpoint_without_fp8_layers_is_observed_whole(save_model):
    with open_checkpoint(save_model(random_flux())) as checkpoint:
        seen = observe(checkpoint)
        assert set(seen.statistics.layers) == set(find_layers(checkpoint).plain)
    assert seen.unvisited == ()
    assert {"txt_in", "vector_in.in_layer"} <= set(seen.conditioned), "they follow the conditioning"
    assert not {"img_in", "time_in.in_layer"} & set(seen.conditioned)


def test_a_seed_gives_the_same_statistics_and_leaves_the_global_random_state_alone(flux):
    before = torch.get_rng_state()
    one, two, other = (observe(flux, seed=seed).statistics for seed in (1, 1, 2))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


def test_every_noise_level_and_the_layers_of_one_token_are_known_and_progress_ends_at_the_total(flux):
    calls = []
    seen = observe(flux, samples=4, steps=8, progress=lambda *call: calls.append(call)).statistics
    assert (seen.sigma_count[:, :8] > 0).all()
    assert (seen.sigma_count[:, 8] == 0).all()
    one_row = {name for name, single in zip(seen.names, seen.one_row, strict=True) if single}
    assert one_row == {name for name in seen.names if name.endswith(".lin")}
    assert calls == sorted(calls)
    assert calls[-1] == (32, 32)
    assert set(seen.calls) == {24}  # eight steps of three batches; a fused layer counts once


def test_adapters_widen_the_ranges_to_the_model_with_and_without_them(save_model, save):
    layer, state, random = "double_blocks.0.img_attn.qkv", random_flux(), np.random.default_rng(0)
    down, up = np.float32(random.standard_normal((4, 32))), np.float32(random.standard_normal((96, 4)))
    name = "lora_unet_" + layer.replace(".", "_")
    lora = save("lora.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    merged = state | {f"{layer}.weight": state[f"{layer}.weight"] + up @ down}
    with open_checkpoint(save_model(state)) as checkpoint, open_checkpoint(save_model(merged)) as with_lora:
        table = find_layers(checkpoint)
        match = match_loras([load_lora(lora)], table.shapes())
        both = observe(checkpoint, table, adapters=match).statistics.absmax
        plain, changed = (observe(one).statistics.absmax for one in (checkpoint, with_lora))
    assert not np.allclose(plain, changed, rtol=1e-2)
    assert np.allclose(both, np.maximum(plain, changed), rtol=1e-4)


def test_weights_stay_in_the_file(flux):
    model = engine.load(flux).model
    assert [name for name, value in model.named_parameters() if value.ndim == 2] == []
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "xpu:99"}, "device 'xpu:99' cannot be used"),
        ({"layers": ["nowhere"]}, "nowhere: no such layer in the checkpoint"),
    ],
)
def test_devices_and_layers_that_are_not_there_are_refused(flux, how, message):
    with pytest.raises((OptionError, CalibrationError), match=message):
        observe(flux, **how)


def test_what_diffusers_cannot_import_is_a_reason(flux, monkeypatch):
    diffusers = pytest.importorskip("diffusers")

    def broken(_, name):
        raise RuntimeError(f"Failed to import {name} because of the following error:\nno module named torchvision")

    monkeypatch.delitem(vars(diffusers), "FluxTransformer2DModel", raising=False)
    monkeypatch.setattr(type(diffusers), "__getattr__", broken)
    assert engine.supports(flux) == "diffusers cannot build it: no module named torchvision"


def test_an_unknown_arithmetic_is_refused(flux):
    with pytest.raises(OptionError, match="unknown arithmetic 'guess'"):
        engine.load(flux, arithmetic="guess")


def test_a_foreign_format_gives_a_reason(save_model, save, build):
    tensors = random_flux()
    layer = "double_blocks.0.img_mlp.0"
    tensors[layer + ".weight"] = np.ones((128, 16), np.uint8)
    tensors[layer + ".comfy_quant"] = build.mark(format="svdquant_w4a4")
    with open_checkpoint(save("svdquant.safetensors", tensors)) as checkpoint:
        assert engine.supports(checkpoint) == f"{layer}: 1 layer in svdquant_w4a4, which cannot be dequantized here"


def test_a_few_channels_of_a_stream_are_outliers_and_none_of_a_vector():
    signals = {"stream": Signal((200, 256)), "vector": Signal((256,))}
    drawn = noise.conditioning(signals, noise.OUTLIERS, 1, 0)
    spread = drawn["stream"][0].std(0)
    assert int((spread > 10).sum()) == 256 / 64
    assert float(spread[spread > 10].mean()) == pytest.approx(noise.OUTLIER_FACTOR, rel=0.1)
    assert float(spread[spread < 10].mean()) == pytest.approx(1, rel=0.05)
    assert float(drawn["vector"].abs().max()) < 6


ENCODER = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0."


def test_a_text_encoder_in_the_same_file_is_neither_in_the_way_nor_recorded(save_model, save, build):
    """In FP8: scaled, raw, and in a format that is not read here."""
    tensors, _ = build.quantized([ENCODER + "SelfAttention.q"], "tensor")
    with open_checkpoint(save_model(random_flux(), in_blocks, "model.diffusion_model.")) as own:
        tensors |= {name: (info.dtype, own.bits(name).copy()) for name, info in own.tensors.items()}
    tensors |= {
        ENCODER + "SelfAttention.k.weight": ("F8_E4M3", np.ones((16, 32), np.uint8)),
        ENCODER + "layer_norm.weight": ("F8_E4M3", np.ones(32, np.uint8)),
        ENCODER + "SelfAttention.v.weight": np.ones((16, 16), np.uint8),
        ENCODER + "SelfAttention.v.comfy_quant": build.mark(format="svdquant_w4a4"),
    }
    with open_checkpoint(save("all.safetensors", tensors)) as checkpoint:
        table = find_layers(checkpoint)
        assert table.foreign
        seen = observe(checkpoint, table, samples=1)
    assert set(seen.statistics.layers) == set(table.diffusion) == set(table.quantized) - {ENCODER + "SelfAttention.q"}
    assert seen.unvisited == ()


def test_a_file_that_was_cast_to_fp8_whole_runs_on_its_codes_in_full_precision(save_model, save, build):
    codes = {name: build.fp8(values)[1] for name, values in random_flux().items()}
    cast = save("cast.safetensors", {name: ("F8_E4M3", values) for name, values in codes.items()})
    wide = save_model({name: DEFAULT_GRID.decode(values) for name, values in codes.items()})
    with open_checkpoint(cast) as one, open_checkpoint(wide) as other:
        cast_model, wide = engine.load(one, arithmetic="comfyui"), engine.load(other)
        latents, conditioning = engine.start(wide, SIZE, 7, [1, 2])
        velocities = [model.velocity(latents, 0.5, conditioning, SIZE) for model in (cast_model, wide)]
        seen = [observe(checkpoint).statistics for checkpoint in (one, other)]
    assert torch.equal(*velocities)
    assert seen[0].layers.keys() == seen[1].layers.keys()
    np.testing.assert_array_equal(seen[0].absmax, seen[1].absmax)


@pytest.mark.parametrize("flagged", [True, False])
def test_layers_declared_as_full_precision_quantize_no_input(save_model, flagged):
    path = save_model(random_flux(), in_blocks, full_precision_matrix_mult=flagged)
    with open_checkpoint(path) as checkpoint:
        denoiser = engine.load(checkpoint, arithmetic="comfyui")
        full = {name for name, module in denoiser.layers.items() if module.full_precision}
        table = find_layers(checkpoint)
    assert full == set(table.plain) | set(table.quantized if flagged else ())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_ranges(flux):
    here, there = (observe(flux, device=device, dtype=torch.float32).statistics for device in ("cpu", "cuda"))
    assert np.allclose(here.absmax, there.absmax, rtol=1e-3)
