"""Folding on the emoji model: exact, recorded in the file, and followed by adapters. Families: test_architectures."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from convert_to_quant import folding, names
from convert_to_quant.checkpoint import Checkpoint, open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.emoji import WEIGHTS
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged
from convert_to_quant.engines import denoiser
from convert_to_quant.engines import diffusers as engine
from convert_to_quant.errors import CheckpointError, LoraError
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.formats.record import narrow_bfloat16
from convert_to_quant.layers import find_layers
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.options import ConvertOptions, RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SIZE = Geometry(height=4, width=4, text_tokens=4)
SHOWN = RunOptions(samples=3, steps=2, height=64, width=64, text_tokens=4)
INT8 = ConvertOptions(format="int8-convrot")


@pytest.fixture(scope="module")
def spiky(tmp_path_factory):
    """The emoji model with a few channels hundreds of times larger than the others."""
    path = tmp_path_factory.mktemp("folding") / "spiky.safetensors"
    write_reranged(WEIGHTS, path, RERANGINGS["spiky"])
    return path


@pytest.fixture(scope="module")
def pair(spiky):
    """The model as it is, and with its channels evened out."""
    with open_checkpoint(spiky) as checkpoint:
        layers = [layer.name for layer, _ in plan_conversion(checkpoint, INT8).quantized]
        yield checkpoint, folding.fold(checkpoint, layers, SHOWN)


@pytest.fixture(scope="module")
def files(spiky, pair):
    """The model as it is, and both in INT8 ConvRot."""
    found = {"original": spiky}
    for source, name in zip(pair, ("int8", "folded"), strict=True):
        found[name] = spiky.with_name(f"{name}.safetensors")
        convert(source, plan_conversion(source, INT8), found[name])
    return found


def velocity(checkpoint: Checkpoint, lora: Path | None = None) -> torch.Tensor:
    model = denoiser.load(checkpoint, dtype=torch.float32, arithmetic="comfyui")
    latents, conditioning = engine.start(model, SIZE, 0, [1, 4])
    with ExitStack() as stack:
        if lora is not None:
            opened = load_lora(lora)
            stack.enter_context(opened.checkpoint)
            stack.enter_context(model.adapted(match_loras([opened], model.plan.table.shapes())))
        return model.velocity(latents, 0.7, conditioning, SIZE)


def db(of: Path | Checkpoint, wanted: torch.Tensor, lora: Path | None = None) -> float:
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(of)) if isinstance(of, Path) else of
        return float(sqnr_db(wanted, velocity(checkpoint, lora)).mean())


def test_folding_is_exact_and_evens_channels_out(pair, files):
    checkpoint, view = pair
    wanted = velocity(checkpoint)
    assert db(view, wanted) >= 120
    for name in view.computed:
        assert view.tensors[name].dtype in ("BF16", "F32"), name
        assert len(view.raw(name)) == view.tensors[name].nbytes, name
    assert db(files["int8"], wanted) < 30
    assert db(files["folded"], wanted) > 36


def test_factors_are_powers_of_two_and_none_of_a_modulation_is_under_one(pair):
    checkpoint, view = pair
    modulations = [group for group in folding.read_groups(view) if group.ones]
    assert modulations
    assert all(group.exponents.min() == 0 for group in modulations)
    for name in (name for name in view.computed if name.endswith(names.WEIGHT)):
        before = checkpoint.float32(name)
        ratio = view.float32(name)[before != 0] / before[before != 0]
        assert (np.frexp(ratio)[0] == 0.5).all(), name


def test_a_folded_file_says_what_was_done(files):
    with open_checkpoint(files["folded"]) as checkpoint, open_checkpoint(files["original"]) as original:
        again = folding.fold_checkpoint(original, folding.read_groups(checkpoint))
        assert again.metadata[names.FOLDING_KEY] == checkpoint.metadata[names.FOLDING_KEY]
        assert any("equalized" in note for note in find_layers(checkpoint).notes)
        with pytest.raises(CheckpointError, match="already folded"):
            folding.fold(checkpoint, [])


LORA = {
    "transformer.transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", 3),
    "transformer.transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.txt_attn.qkv", 3),
    "double_blocks.1.img_mod.lin": ("double_blocks.1.img_mod.lin", 1),
    "lora_unet_single_blocks_0_linear1": ("single_blocks.0.linear1", 1),
    "single_blocks.1.linear2": ("single_blocks.1.linear2", 1),
}
"""Names in the file -> the layer, and how many parts it is fused of."""


def lora_tensors(model: Path, dtype: str = "BF16") -> dict[str, tuple[str, np.ndarray]]:
    """Adapters on parts of fused layers, on a modulation, and on layers that read two things at once."""
    rng = np.random.default_rng(1)
    tensors = {}
    with open_checkpoint(model) as checkpoint:
        shapes = find_layers(checkpoint).shapes()
    for name, (layer, parts) in LORA.items():
        rows, inputs = shapes[layer][0] // parts, shapes[layer][1]
        for suffix, shape in ((".lora_A.weight", (4, inputs)), (".lora_B.weight", (rows, 4))):
            values = (rng.standard_normal(shape) / 40).astype(np.float32)
            tensors[name + suffix] = dtype, narrow_bfloat16(values) if dtype == "BF16" else values.astype(np.float16)
    return tensors


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_folded_lora_does_to_the_folded_file_what_it_does_to_the_original(dtype, pair, files, save, tmp_path):
    checkpoint, view = pair
    lora, converted = save("lora.safetensors", lora_tensors(files["original"], dtype)), tmp_path / "out.safetensors"
    opened = load_lora(lora)
    with opened.checkpoint:
        folding.fold_lora(opened, view, converted)
    wanted = velocity(checkpoint, lora)
    assert float(sqnr_db(velocity(checkpoint), wanted).mean()) < 30  # it does change the image
    assert db(view, wanted, converted) >= 115
    assert db(view, wanted, lora) < 20
    assert db(files["folded"], wanted, converted) > 35


def test_what_cannot_be_folded_is_refused(files, save, tmp_path):
    """The rest is in tests/cli/test_fold.py."""
    tensors, output = lora_tensors(files["original"]), tmp_path / "out.safetensors"
    with open_checkpoint(files["folded"]) as model, open_checkpoint(files["original"]) as original:
        folding.fold_lora(load_lora(save("lora.safetensors", tensors)), model, output)
        with pytest.raises(LoraError, match="it is folded for another file"):
            plan_conversion(original, INT8, [load_lora(output)])
        rows = len(tensors["double_blocks.1.img_mod.lin.lora_B.weight"][1])
        magnitude = {"double_blocks.1.img_mod.lin.dora_scale": np.ones((rows, 1), np.float32)}
        with pytest.raises(LoraError, match="DoRA is not supported"):
            folding.fold_lora(load_lora(save("dora.safetensors", tensors | magnitude)), model, output)


@pytest.mark.parametrize(
    "said",
    ["{}", '{"groups": 1}', '{"groups": [{}]}', "not JSON",
     '{"groups": [{"columns": [], "rows": [], "ones": [], "head": 0, "repeat": 1, "exponents": "AA=="}]}',
     '{"groups": [{"columns": [["a", -1, 0, 1]], "rows": [], "ones": [], "head": 1, "repeat": 1, "exponents": ""}]}',
     '{"groups": [{"columns": [], "rows": [], "ones": [], "head": 1, "repeat": 9e99, "exponents": "eJxjAAAAAQAB"}]}'],
)  # fmt: skip
def test_a_damaged_header_is_refused_in_one_sentence(said, save):
    path = save("model.safetensors", {"a": np.ones(2, np.float32)}, {names.FOLDING_KEY: said})
    with open_checkpoint(path) as model, pytest.raises(CheckpointError, match=r"entry for folding is (not|damaged)"):
        folding.read_groups(model)
