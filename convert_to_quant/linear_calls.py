"""What a linear layer multiplies by its weight: the input of its call, or an activation of that input.

ComfyUI folds the activation before a linear layer into the layer's call: `layer(x, input_act="swiglu")` in 0.39 and
later, and before that, for INT8 layers, `comfy.ops.linear_input_act(layer, x, "swiglu")`, which does not call the layer
at all. A forward pre-hook sees x, or nothing. x is twice as wide as the weight for SwiGLU; for GELU it is as wide, and
its range is another. This module gives what the weight meets instead.

It knows ComfyUI by the names of its modules and functions, and imports none of them: outside of ComfyUI, and in a
version that lacks one of them, nothing happens.
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
"""Arguments of ComfyUI's linear layers after the input, in order. The last two are added to the output."""

BLOCK_VALUES = 1 << 26
"""Values of an input whose activation is computed at a time: 128 MiB in 16 bits. A video's MLP has gigabytes."""


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
"""By ComfyUI's names; its own functions, `comfy.ops.INPUT_ACT_EAGER`, go before these. "rms_norm" is made per call."""


def read_call(layer: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Activation | None]:
    """Read the arguments of a call of a linear layer.

    Args:
        layer: its name, for errors.
        args: positional arguments of the call.
        kwargs: the others.

    Returns:
        What it is called with, [..., in_features], or wider if a gated activation follows, None if no tensor is; and
        what the layer applies to it, None if nothing.

    Raises:
        CalibrationError: the call names an activation that is not known here.
    """
    tensors = (*args, *(value for name, value in kwargs.items() if name not in ARGUMENTS))
    x = next((value for value in tensors if isinstance(value, Tensor)), None)
    # The second argument of other libraries' layers is something else, such as the scale of a LoRA.
    told = args[1:] if len(args) > 1 and isinstance(args[1], str) else ()
    return x, _activation(layer, {**dict(zip(ARGUMENTS, told, strict=False)), **kwargs})


def multiplied(layer: str, in_features: int, x: Tensor, activation: Activation | None) -> Iterator[Tensor]:
    """What the weight is multiplied by, in blocks of rows [..., in_features].

    Raises:
        CalibrationError: it is not as wide as the weight.
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
                hint="the layer may apply something to its input that this version does not know",
            )
        yield met


def _activation(layer: str, named: Mapping[str, Any]) -> Activation | None:
    """The activation that a call names."""
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
            f"called with the activation {name!r}, which is none of {', '.join(sorted([*known, 'rms_norm']))}",
            tensor=layer,
            hint="a newer convert_to_quant may know it",
        )
    return known[name]


Bypass = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], AbstractContextManager[None]]


@contextmanager
def comfyui_watched(bypass: Bypass, ran: Callable[[nn.Module], None]) -> Iterator[None]:
    """Learn of linear layers that ComfyUI computes without calling them, while the block runs.

    Two functions of `comfy.ops` are replaced by ones that call them.

    Args:
        bypass: told the layer and the arguments of a call of `linear_input_act`, as if the layer were called with them;
            what it gives is entered around the call, inside of which the layer may be called or not.
        ran: told the layer whenever its weight is cast, which ComfyUI does to compute it.
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
                stack.callback(_put_back, ops, ours, original)
        yield


def _put_back(module: Any, ours: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Put a function back, unless someone else has replaced ours meanwhile."""
    if getattr(module, ours.__name__) is ours:
        setattr(module, ours.__name__, original)


def outside_allocation_graphs() -> AbstractContextManager[Any]:
    """A context whose allocations ComfyUI does not record.

    ComfyUI 0.35 and later records the allocations of a model's block on NVIDIA cards and replays them; a tensor that
    is made inside a block and kept would be overwritten.
    """
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
