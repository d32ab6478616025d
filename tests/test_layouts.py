"""Layouts of released models: what each is, which layers are quantized, why others are kept, what runs it.

`data/layouts.json.xz` has names, dtypes and shapes as released. The expected results are docs/models.md, which
`PYTHONPATH=.:tests/doubles python tests/test_layouts.py` regenerates; read its diff line by line.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from released import Layout, hunyuan_authors, layouts
from torch import Tensor

from convert_to_quant import families
from convert_to_quant.checkpoint import Checkpoint, TensorInfo, open_checkpoint, serialize_header
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines import diffusers as model_engine
from convert_to_quant.engines.provenance import Piece, trace
from convert_to_quant.options import ConvertOptions

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8}

INTRODUCTION = """\
# Released models

For layouts of released models, at full size: what the file is recognized as, how many linear layers `convert` quantizes
to FP8, why it keeps the others, and which engine runs the model to calibrate it. Layouts named `d_` have diffusers'
names, `te_` are text encoders, `x_` differ a little from a released file. Models without an engine run with
`observe --comfyui-dir` if ComfyUI supports them. `tests/test_layouts.py` generates this page, and fails if it is
outdated.

| layout | model | variant | quantized | kept | engine |
|---|---|---|---|---|---|
"""


@contextmanager
def opened(layout: Layout, folder: Path) -> Iterator[Checkpoint]:
    """A file with this header whose data is a hole."""
    tensors, end = [], 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        tensors.append(TensorInfo(name, dtype, tuple(shape), start, end))
    path, header = folder / "layout.safetensors", serialize_header(tensors, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


def row(name: str, folder: Path) -> str:
    """The row of the page for a layout."""
    layout = layouts()[name]
    with opened(layout, folder) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions())
        runs = "diffusers" if model_engine.supports(checkpoint, plan.table) is None else "–"
    stays = [each.reason for each in plan.decisions if not each.format]
    reasons = Counter(re.sub(r"^\d+ × \d+: ", "", reason).partition(":")[0] for reason in stays)
    already, quantized = len(plan.table.quantized), len(plan.decisions) - len(stays)
    kept = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    done = f", {already} FP8 already" if already else ""
    found, engine = plan.identity, "none: never calibrated" if plan.identity.encoder else runs
    cells = (name, found.title, found.variant, f"{quantized} of {len(plan.decisions)}{done}", kept, engine)
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", layouts())
def test_a_released_layout_is_what_the_page_says(name, tmp_path):
    expected = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert [row(name, tmp_path)] == expected


CONVERTERS = {
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "flux1_dev": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2_dev": "convert_flux2_transformer_checkpoint_to_diffusers",
    "hunyuanvideo": "convert_hunyuan_video_transformer_to_diffusers",
    "ltxv_13b": "convert_ltx_transformer_checkpoint_to_diffusers",
    "full_ltx2_dev": "convert_ltx2_transformer_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "mochi": "convert_mochi_transformer_checkpoint_to_diffusers",
    "sd15_unet": "convert_ldm_unet_checkpoint",
    "sd35_medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "sdxl_unet": "convert_ldm_unet_checkpoint",
    "wan21_i2v_14b": "convert_wan_transformer_to_diffusers",
    "wan21_vace_14b": "convert_wan_transformer_to_diffusers",
    "z_image": "convert_z_image_transformer_checkpoint_to_diffusers",
}
"""Layouts in their authors' names -> diffusers' converter."""


AUTHORS: dict[str, Callable[[str], str]] = {
    "chroma": lambda tensor: re.sub(r"(_guidance_layer\.norms\.\d+)\.weight", r"\1.scale", tensor),
    "hunyuan-video": hunyuan_authors,
}
"""Families whose layouts have ComfyUI's names -> the names that the converter expects."""


@pytest.mark.parametrize("name", CONVERTERS)
def test_rules_for_names_move_the_rows_that_diffusers_converter_moves(name, tmp_path):
    from diffusers.loaders import single_file_utils

    with opened(layouts()[name], tmp_path) as checkpoint:
        plan = model_engine.plan(checkpoint)
        shapes = {bare: checkpoint.tensors[full].shape for bare, full in plan.full_names.items()}
    authors = AUTHORS.get(plan.family, str)
    unet = name.endswith("_unet")

    def convert(fed: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {single_file_utils.LDM_UNET_KEY * unet + authors(tensor): values for tensor, values in fed.items()}
        options = [{**plan.config, "layers_per_block": 2}] if unet else []
        return getattr(single_file_utils, CONVERTERS[name])(named, *options)

    used = {piece.tensor for pieces in plan.sources.values() for piece in pieces}
    assert plan.sources == trace(convert, {tensor: shapes[tensor] for tensor in shapes if tensor in used})


@pytest.mark.parametrize("name", CONVERTERS)
def test_module_names_mean_these_rows_whatever_the_family(name, tmp_path):
    with opened(layouts()[name], tmp_path) as checkpoint:
        plan = model_engine.plan(checkpoint)
    layers = {layer.name.removeprefix(plan.table.prefix): layer.shape for layer in plan.table.plain.values()}
    targets = families.diffusers_targets(layers)
    compared = set()
    for tensor, pieces in plan.sources.items():
        layer = pieces[0].tensor.removesuffix(".weight")
        target = targets.get(tensor.removesuffix(".weight"))
        if layer in layers and target is not None:
            first, stop = target.rows or (0, layers[layer][0])
            middle = (first + stop) // 2
            spans = [(middle, stop), (first, middle)] if target.swap_halves else [(first, stop)]
            assert pieces == tuple(Piece(f"{target.layer}.weight", *span) for span in spans)
            compared.add(layer)
    assert len(compared) >= 0.9 * len(layers)


def test_the_page_has_a_row_for_each_layout_and_nothing_else():
    rows = PAGE.read_text(encoding="utf-8").removeprefix(INTRODUCTION).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == list(layouts())


if __name__ == "__main__":  # regenerates the page
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(INTRODUCTION + "".join(f"{row(each, Path(place))}\n" for each in layouts()), encoding="utf-8")
