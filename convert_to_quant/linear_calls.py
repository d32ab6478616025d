"""Finds what a linear layer multiplies by its weight: the input of its call, or an activation of that input.

ComfyUI fuses the activation before a linear layer into the layer's call: `layer(x, input_act="swiglu")` in 0.39 and
later, and earlier, for INT8 layers, `comfy.ops.linear_input_act(layer, x, "swiglu")`, which does not call the layer at
all. A forward pre-hook gets x, or nothing. For SwiGLU, x is twice as wide as the weight; for GELU it has the same width
but another range. This module gives the input that the weight multiplies.

It refers to modules and functions of ComfyUI by name and imports none of them. Without ComfyUI, or in a version without
one of them, it does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import CalibrationError

Activation = Callable[[Tensor], Tensor]

ARGUMENTS = ("input_act", "act_weight", "act_eps", "residual", "residual_scale")
"""Arguments of ComfyUI's linear layers after the input, in order. The last two apply to the output."""

BLOCK_VALUES = 1 << 26
"""Input values whose activation is computed at a time: 128 MiB in 16 bits. The MLP of a video model has gigabytes."""


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def _situ(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, -1)
    return 25 * torch.tanh(hidden / 25) * (4 * torch.tanh(gate / 4) * torch.sigmoid(gate))


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "situ": _situ,
    "swiglu": _swiglu,
}
"""By ComfyUI's names; its own functions, `comfy.ops.INPUT_ACT_EAGER`, take precedence. "rms_norm" is made per call."""


def read_call(layer: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Activation | None]:
    """Read the arguments of a call of a linear layer; `layer` is its name, for errors.

    Returns:
        The input, [..., in_features], wider before a gated activation, None if the call has no tensor; and the
        activation that the layer applies to it, if any.

    Raises:
        CalibrationError: the activation is unknown.
    """
    tensors = (*args, *(value for name, value in kwargs.items() if name not in ARGUMENTS))
    x = next((value for value in tensors if isinstance(value, Tensor)), None)
    # In layers of other libraries the second argument is something else, such as the scale of a LoRA.
    given = args[1:] if len(args) > 1 and isinstance(args[1], str) else ()
    return x, _activation(layer, {**dict(zip(ARGUMENTS, given, strict=False)), **kwargs})


def multiplied(layer: str, in_features: int, x: Tensor, activation: Activation | None) -> Iterator[Tensor]:
    """The input that the weight multiplies, in blocks of rows [..., in_features].

    Raises:
        CalibrationError: its width is not that of the weight.
    """
    blocks: tuple[Tensor, ...] = (x,)
    if activation is not None:
        rows_RI = x.reshape(-1, x.shape[-1])
        blocks = torch.split(rows_RI, max(1, BLOCK_VALUES // rows_RI.shape[1]))
    for block in blocks:
        met = block if activation is None else activation(block)
        if met.shape[-1:] != (in_features,):
            raise CalibrationError(
                f"its input should be {in_features} wide, found {list(met.shape)}",
                tensor=layer,
                hint="the layer may change its input in a way that this version does not know",
            )
        yield met


def _activation(layer: str, named: Mapping[str, Any]) -> Activation | None:
    """The activation in a call's arguments."""
    name = named.get("input_act")
    if name is None or name == "none":
        return None
    if name == "rms_norm":
        weight, eps = named.get("act_weight"), named.get("act_eps", 0.0)
        return lambda x: functional.rms_norm(
            x, x.shape[-1:], weight=None if weight is None else weight.reshape(-1).to(x), eps=eps
        )
    known: dict[str, Activation] = {**ACTIVATIONS, **getattr(sys.modules.get("comfy.ops"), "INPUT_ACT_EAGER", {})}
    if name not in known:
        raise CalibrationError(
            f"called with an unknown activation {name!r}, not one of {', '.join(sorted([*known, 'rms_norm']))}",
            tensor=layer,
            hint="a newer convert_to_quant may know it",
        )
    return known[name]


Bypass = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], AbstractContextManager[None]]


@contextmanager
def comfyui_watched(bypass: Bypass, ran: Callable[[nn.Module], None]) -> Iterator[None]:
    """Watch linear layers that ComfyUI computes without calling them, while the block runs.

    Wraps two functions of `comfy.ops`. `bypass` gets the layer and the arguments of a call of `linear_input_act`, as if
    these called the layer, and returns a context for the call, in which the layer may be called or not. `ran` gets a
    layer whenever ComfyUI casts its weight to compute it.
    """
    ops = sys.modules.get("comfy.ops")
    fold, cast = getattr(ops, "linear_input_act", None), getattr(ops, "cast_bias_weight", None)

    def linear_input_act(linear: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with bypass(linear, (x, *args), kwargs):
            return fold(linear, x, *args, **kwargs)  # type: ignore[misc]

    def cast_bias_weight(s: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran(s)
        return cast(s, *args, **kwargs)  # type: ignore[misc]

    with ExitStack() as stack:
        for original, ours in ((fold, linear_input_act), (cast, cast_bias_weight)):
            if original is not None:
                setattr(ops, ours.__name__, ours)
                stack.callback(_restore, ops, ours, original)
        yield


def _restore(module: Any, ours: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Restore a function, unless other code has replaced ours."""
    if getattr(module, ours.__name__) is ours:
        setattr(module, ours.__name__, original)


def outside_allocation_graphs() -> AbstractContextManager[Any]:
    """A context whose allocations ComfyUI does not record.

    ComfyUI 0.35 and later records the allocations of a model's block on NVIDIA GPUs and replays them, which would
    overwrite a tensor that was allocated inside a block and kept.
    """
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
