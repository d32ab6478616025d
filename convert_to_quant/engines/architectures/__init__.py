"""What running a family of models takes, as data: its diffusers class, its configuration, and its inputs.

Why it exists. diffusers can run every family here, but asks for a configuration file from the internet and for inputs
that a pipeline prepares. Both follow from the checkpoint itself: sizes are tensor shapes, and the inputs of a
transformer are latents, a time and some conditioning, packed in one of a few ways.

How it works. An `Architecture` holds, for a family of `convert_to_quant.families`: the transformer class and its
single-file converter by name, a function from shapes to the class's configuration, the shapes of latents and of every
conditioning tensor, and a function that makes the arguments of `forward` from them. Conditioning tensors have the
names that the class's `forward` gives them.

Limits. Families detected by the names of a relative (HunyuanVideo 1.5, HunyuanImage, FramePack, Chroma Radiance, Wan
VACE and Animate, LTX-2) have tensors that these classes do not know: they are reported as such and not run here.
`engines.comfyui.inprocess` runs them inside ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Architecture, Config, Inputs
from .flux import CHROMA, FLUX_1, FLUX_2
from .image import LUMINA_2, QWEN_IMAGE, SD3, Z_IMAGE
from .video import HUNYUAN_VIDEO, LTX, WAN

ARCHITECTURES: Mapping[str, Architecture] = {
    "flux1": FLUX_1,
    "flux2": FLUX_2,
    "chroma": CHROMA,
    "sd3": SD3,
    "qwen-image": QWEN_IMAGE,
    "wan": WAN,
    "hunyuan-video": HUNYUAN_VIDEO,
    "ltx": LTX,
    "lumina2": LUMINA_2,
    "z-image": Z_IMAGE,
}
"""By family name of `convert_to_quant.families`."""

__all__ = ["ARCHITECTURES", "Architecture", "Config", "Inputs"]
