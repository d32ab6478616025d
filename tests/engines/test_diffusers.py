import numpy as np
import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.engines import noise
from convert_to_quant.errors import CalibrationError, OptionError, UnsupportedModelError
from convert_to_quant.families.running import Geometry, Signal
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.options import RunOptions

SIZE = Geometry(height=3, width=4, frames=1, text_tokens=5)


def shown(samples=3, steps=1, **more):
    return RunOptions(samples=samples, steps=steps, **{"device": "cpu", **more})


def in_blocks(layer):
    return "blocks" in layer


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def flux(reference_flux, save_model):
    """A small Flux.1 with its blocks in FP8."""
    with open_checkpoint(save_model(reference_flux(depth=1, singles=1).state_dict(), in_blocks)) as checkpoint:
        yield checkpoint


def flux_inputs(denoiser, batch=2):
    return engine.start(denoiser, SIZE, 7, range(1, 1 + batch))


def load_state_of(path, model):
    """Fill a model with the real weights of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        layers = {layer.weight.name: layer for layer in find_layers(checkpoint).linear()}
        state = {
            name: torch.from_numpy(dequantize(checkpoint, layers[name]) if name in layers else checkpoint.float32(name))
            for name in model.state_dict()
        }
    model.load_state_dict(state)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("size", [{"hidden": 32, "depth": 1, "singles": 1}, {"hidden": 48, "depth": 2, "singles": 3}])
def test_it_computes_what_an_independent_flux_computes(reference_flux, save_model, size, guidance):
    model = reference_flux(guidance=guidance, **size)
    with open_checkpoint(save_model(model.state_dict())) as checkpoint:
        denoiser = engine.load(checkpoint)
        latents, conditioning = flux_inputs(denoiser)
        found = denoiser.velocity(latents, 0.7, conditioning, SIZE)
        with torch.no_grad():
            wanted = model(
                latents, conditioning["encoder_hidden_states"], conditioning["pooled_projections"], 0.7, (3, 4)
            )
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_are_understood_and_kept_in_layer_names(reference_flux, save_model, prefix):
    path = save_model(reference_flux(depth=1, singles=1).state_dict(), in_blocks, prefix)
    with open_checkpoint(path) as checkpoint:
        seen = engine.observe(checkpoint, None, shown(), geometry=SIZE)
        assert tuple(seen.statistics.layers) == tuple(find_layers(checkpoint).quantized)
    assert all(name.startswith(prefix) for name in seen.statistics.layers)
    assert seen.unvisited == ()


def test_recorded_ranges_are_those_of_hooks_put_on_by_hand(reference_flux, save_model):
    model = reference_flux()
    path = save_model(model.state_dict(), in_blocks)
    load_state_of(path, model)
    absmax = {}

    def watch(name):
        return lambda _, inputs: absmax.__setitem__(name, max(absmax.get(name, 0.0), float(inputs[0].abs().max())))

    with open_checkpoint(path) as checkpoint:
        seen = engine.observe(checkpoint, None, shown(steps=2, seed=3), geometry=SIZE)
        layers = list(find_layers(checkpoint).quantized)
        denoiser = engine.load(checkpoint)
        for name, module in model.named_modules():
            if name in layers:
                module.register_forward_pre_hook(watch(name))
        for number in range(3):
            latents, conditioning = engine.start(denoiser, SIZE, 3, [number])
            text, pooled = conditioning["encoder_hidden_states"], conditioning["pooled_projections"]
            with torch.no_grad():
                for sigma in (1.0, 0.5):
                    latents = latents - 0.5 * model(latents, text, pooled, sigma, (3, 4))
    assert sorted(layers) == sorted(absmax)
    wanted = np.array([absmax[name] for name in seen.statistics.names])
    assert np.allclose(seen.statistics.absmax, wanted, rtol=1e-3)
    calls = dict(zip(seen.statistics.names, seen.statistics.calls, strict=True))
    assert set(calls.values()) == {6}  # three trajectories of two steps; a fused layer counts once


def test_a_checkpoint_without_fp8_layers_is_observed_whole(reference_flux, save_model):
    with open_checkpoint(save_model(reference_flux(depth=1, singles=1).state_dict())) as checkpoint:
        seen = engine.observe(checkpoint, None, shown(samples=1), geometry=SIZE)
        assert set(seen.statistics.layers) == set(find_layers(checkpoint).plain)
    assert seen.unvisited == ()


def test_a_seed_gives_the_same_statistics_and_leaves_the_global_random_state_alone(flux):
    before = torch.get_rng_state()
    one, two, other = (engine.observe(flux, None, shown(seed=seed), geometry=SIZE) for seed in (1, 1, 2))
    assert one.statistics == two.statistics
    assert one.statistics != other.statistics
    assert torch.equal(before, torch.get_rng_state())


def test_every_noise_level_and_the_layers_of_one_token_are_known_and_progress_ends_at_the_total(
    flux,
):
    assert engine.supports(flux) is None
    calls = []
    seen = engine.observe(flux, None, shown(4, 8), geometry=SIZE, progress=lambda *call: calls.append(call)).statistics
    assert (seen.sigma_count[:, :8] > 0).all()
    assert (seen.sigma_count[:, 8] == 0).all()
    one_row = {name for name, single in zip(seen.names, seen.one_row, strict=True) if single}
    assert one_row == {name for name in seen.names if name.endswith(".lin")}
    assert calls == sorted(calls)
    assert calls[-1] == (32, 32)


def test_layers_that_follow_the_conditioning_are_named(reference_flux, save_model):
    with open_checkpoint(save_model(reference_flux().state_dict(), lambda _: True)) as checkpoint:
        seen = engine.observe(checkpoint, None, shown(), geometry=SIZE)
    assert {"txt_in", "vector_in.in_layer"} <= set(seen.conditioned)
    assert not {"img_in", "time_in.in_layer"} & set(seen.conditioned)


def test_adapters_widen_the_ranges_to_the_model_with_and_without_them(reference_flux, save_model, save):
    state = reference_flux().state_dict()
    down, up = torch.randn(4, 32), torch.randn(96, 4)
    lora_path = save(
        "lora.safetensors",
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down.numpy(),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up.numpy(),
        },
    )
    merged = dict(state)
    merged["double_blocks.0.img_attn.qkv.weight"] = state["double_blocks.0.img_attn.qkv.weight"] + up @ down
    with open_checkpoint(save_model(state)) as checkpoint, open_checkpoint(save_model(merged)) as with_lora:
        table = find_layers(checkpoint)
        match = match_loras(
            [load_lora(lora_path)], {layer.name: (layer.out_features, layer.in_features) for layer in table.linear()}
        )
        both = engine.observe(checkpoint, table, shown(), geometry=SIZE, adapters=match).statistics
        plain = engine.observe(checkpoint, None, shown(), geometry=SIZE).statistics
        changed = engine.observe(with_lora, None, shown(), geometry=SIZE).statistics
    assert not np.allclose(plain.absmax, changed.absmax, rtol=1e-2)
    assert np.allclose(both.absmax, np.maximum(plain.absmax, changed.absmax), rtol=1e-4)


def test_weights_stay_in_the_file(flux):
    model = engine.load(flux).model
    assert [name for name, value in model.named_parameters() if value.ndim == 2] == []
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("options", "layers", "message"),
    [
        ({"device": "cuda:99"}, None, "device 'cuda:99' cannot be used"),
        ({"device": "xpu:99"}, None, "device 'xpu:99' cannot be used"),
        ({"device": "abacus"}, None, "unknown device 'abacus'"),
        ({"device": "mps"}, None, "device 'mps' cannot be used: it has no"),
        ({}, ["nowhere"], "nowhere: 1 layers do not exist"),
    ],
)
def test_devices_and_layers_that_are_not_there_are_refused(flux, options, layers, message):
    with pytest.raises((OptionError, CalibrationError), match=message):
        engine.observe(flux, None, shown(**options), geometry=SIZE, layers=layers)


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


def test_infinite_inputs_name_the_layer(reference_flux, save_model):
    state = reference_flux(depth=1, singles=1).state_dict()
    state["double_blocks.0.img_mlp.0.bias"] = torch.full_like(state["double_blocks.0.img_mlp.0.bias"], np.inf)
    with (
        open_checkpoint(save_model(state, in_blocks)) as checkpoint,
        pytest.raises(CalibrationError, match=r"double_blocks\.0\.img_mlp\.2: the inputs of"),
    ):
        engine.observe(checkpoint, None, shown(samples=1), geometry=SIZE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("single_blocks.1.linear2.bias"), "KeyError: 'single_blocks.1.linear2.bias'"),
        (lambda s: s.update({"extra.weight": torch.ones(4, 4)}), "extra.weight: diffusers' converter has no place"),
        (lambda s: s.update({"double_blocks.0.img_mlp.0.weight": torch.ones(64, 32)}), "shape [128, 32] was expected"),
    ],
)
def test_a_layout_that_diffusers_does_not_know_gives_a_reason(reference_flux, save_model, change, reason):
    state = reference_flux().state_dict()
    change(state)
    with open_checkpoint(save_model(state)) as checkpoint:
        assert reason in (engine.supports(checkpoint) or "")
        with pytest.raises(UnsupportedModelError):
            engine.load(checkpoint)


def test_an_unknown_model_gives_a_reason(save_model):
    with open_checkpoint(save_model({"a.weight": torch.ones(16, 16)})) as checkpoint:
        assert engine.supports(checkpoint) == "its tensor names fit no known family"


def test_a_foreign_format_gives_a_reason(reference_flux, save_model, save, build):
    tensors = {name: value.numpy() for name, value in reference_flux().state_dict().items()}
    layer = "double_blocks.0.img_mlp.0"
    tensors[layer + ".weight"] = np.ones((128, 16), np.uint8)
    tensors[layer + ".comfy_quant"] = build.mark(format="svdquant_w4a4")
    with open_checkpoint(save("svdquant.safetensors", tensors)) as checkpoint:
        assert engine.supports(checkpoint) == f"{layer}: 1 layer in svdquant_w4a4, which cannot be dequantized here"


def test_a_few_channels_of_a_stream_are_loud_and_none_of_a_vector():
    signals = {"stream": Signal((200, 256)), "vector": Signal((256,))}
    drawn = noise.conditioning(signals, noise.LOUD_CHANNELS, 1, 0)
    spread = drawn["stream"][0].std(0)
    assert int((spread > 10).sum()) == 256 / 64
    assert float(spread[spread > 10].mean()) == pytest.approx(noise.LOUD, rel=0.1)
    assert float(spread[spread < 10].mean()) == pytest.approx(1, rel=0.05)
    assert float(drawn["vector"].abs().max()) < 6


ENCODER = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0."


def test_a_text_encoder_in_the_same_file_is_neither_in_the_way_nor_recorded(reference_flux, save_model, save, build):
    """In FP8: scaled, raw, and in a format that is not read here."""
    tensors, _ = build.quantized([ENCODER + "SelfAttention.q"], "tensor")
    with open_checkpoint(save_model(reference_flux().state_dict(), in_blocks, "model.diffusion_model.")) as own:
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
        seen = engine.observe(checkpoint, table, shown(samples=1), geometry=SIZE)
    assert set(seen.statistics.layers) == set(table.diffusion) == set(table.quantized) - {ENCODER + "SelfAttention.q"}
    assert seen.unvisited == ()


def test_a_file_that_was_cast_to_fp8_whole_runs_on_its_codes_in_full_precision(reference_flux, save_model, save):
    state = {name: value.to(torch.float8_e4m3fn) for name, value in reference_flux().state_dict().items()}
    cast = save(
        "cast.safetensors", {name: ("F8_E4M3", value.view(torch.uint8).numpy()) for name, value in state.items()}
    )
    with (
        open_checkpoint(cast) as one,
        open_checkpoint(save_model({name: value.float() for name, value in state.items()})) as other,
    ):
        cast_model, wide = engine.load(one, arithmetic="comfyui"), engine.load(other)
        latents, conditioning = flux_inputs(wide)
        velocities = [model.velocity(latents, 0.5, conditioning, SIZE) for model in (cast_model, wide)]
        seen = [engine.observe(checkpoint, None, shown(), geometry=SIZE).statistics for checkpoint in (one, other)]
    assert torch.equal(*velocities)
    assert seen[0].layers.keys() == seen[1].layers.keys()
    np.testing.assert_array_equal(seen[0].absmax, seen[1].absmax)


@pytest.mark.parametrize("marked", [True, False])
def test_layers_marked_for_full_precision_quantize_no_input(reference_flux, save_model, marked):
    path = save_model(reference_flux().state_dict(), in_blocks, full_precision_matrix_mult=marked)
    with open_checkpoint(path) as checkpoint:
        denoiser = engine.load(checkpoint, arithmetic="comfyui")
        full = {name for name, module in denoiser.layers.items() if module.full_precision}
        table = find_layers(checkpoint)
    assert full == set(table.plain) | set(table.quantized if marked else ())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_ranges(flux):
    here, there = (
        engine.observe(flux, None, shown(device=device), geometry=SIZE, dtype=torch.float32).statistics
        for device in ("cpu", "cuda")
    )
    assert np.allclose(here.absmax, there.absmax, rtol=1e-3)
