"""What linear layers multiply by their weights where ComfyUI folds an activation into the call."""

import sys
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from convert_to_quant import linear_calls
from convert_to_quant.errors import CalibrationError
from convert_to_quant.linear_calls import ACTIVATIONS
from convert_to_quant.recorder import record

WIDTH, HIDDEN = 8, 16
EAGER = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "swiglu": lambda x: x[..., :HIDDEN] * torch.sigmoid(x[..., :HIDDEN]) * x[..., HIDDEN:],
    "situ": lambda x: 25 * torch.tanh(x[..., :HIDDEN] / 25) * 4 * torch.tanh(x[..., HIDDEN:] / 4)
    * torch.sigmoid(x[..., HIDDEN:]),
}  # fmt: skip
"""Written out."""


class Linear(nn.Linear):
    """ComfyUI's as of 0.39: it applies an activation to its input, and adds its output to a residual.

    Attributes:
        met: what was multiplied by the weight.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.met = []

    def forward(
        self, input, input_act = None, act_weight = None, act_eps = 0.0,  # noqa: A002
        residual = None, residual_scale = None,
    ):  # fmt: skip
        if input_act == "rms_norm":
            assert act_weight is not None
            input = input * (input.square().mean(-1, keepdim=True) + act_eps).rsqrt() * act_weight  # noqa: A001
        elif input_act is not None:
            input = EAGER[input_act](input)  # noqa: A001
        self.met.append(input.detach())
        output = super().forward(input)
        return output if residual is None else torch.addcmul(residual, output, residual_scale)


class FeedForward(nn.Module):
    """As in Wan (GELU) and MiniMax H3 (SwiGLU)."""

    def __init__(self, call, gated):
        super().__init__()
        self.norm = nn.Parameter(1 + torch.rand(HIDDEN))
        self.fc1, self.fc2 = Linear(WIDTH, 2 * HIDDEN if gated else HIDDEN), Linear(HIDDEN, WIDTH)
        self.call = call

    def forward(self, x):
        return self.call(self, 30 * self.fc1(x), x)


HALF = torch.tensor(0.5)
CALLS = {
    "Wan": (False, lambda m, h, _: m.fc2(h, input_act="gelu_tanh")),
    "MiniMax H3": (True, lambda m, h, _: m.fc2(h, input_act="swiglu")),
    "MOSS-Image": (True, lambda m, h, _: m.fc2(h, input_act="situ")),
    "positional": (True, lambda m, h, _: m.fc2(h, "swiglu")),
    "input by keyword": (True, lambda m, h, _: m.fc2(input_act="swiglu", input=h)),
    "norm": (False, lambda m, h, _: m.fc2(h, input_act="rms_norm", act_weight=m.norm, act_eps=1e-6)),
    "positional norm": (False, lambda m, h, _: m.fc2(h, "rms_norm", m.norm, 1e-6)),
    "residual": (False, lambda m, h, x: m.fc2(h, residual=1e6 * x, residual_scale=HALF)),
    "residual first": (True, lambda m, h, x: m.fc2(residual=x, residual_scale=HALF, input_act="swiglu", input=h)),
    "all positional": (True, lambda m, h, x: m.fc2(h, "swiglu", None, 0.0, x, HALF)),
}


@pytest.mark.parametrize("name", CALLS)
def test_ranges_are_those_of_what_the_weight_meets(name, monkeypatch):
    monkeypatch.setattr(linear_calls, "BLOCK_VALUES", 5 * 2 * HIDDEN)  # several blocks, the last one shorter
    torch.manual_seed(0)
    gated, call = CALLS[name]
    model = FeedForward(call, gated)
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        plain = model(x)
        (met,) = model.fc2.met
        with record(model) as recording:
            recorded = model(x)
    statistics = recording.statistics()
    second = statistics.index("fc2")

    assert torch.equal(recorded, plain)
    assert met.abs().max() > 2
    assert statistics.absmax[second] == pytest.approx(met.abs().max().item(), rel=1e-6)
    assert statistics.count[second] == met.numel()
    assert statistics.sum_of_squares[second] == pytest.approx(float((met.double() ** 2).sum()), rel=1e-5)
    assert statistics.row_histogram[second].sum() == 18
    assert (statistics.rows[second], statistics.calls[second], statistics.rows_per_sample[second]) == (18, 1, 9)
    assert statistics.unseen == ()


def test_own_activations_are_what_they_are_written_out_and_comfyuis_go_before_them(
    monkeypatch,
):
    x = 5 * torch.randn(7, 2 * HIDDEN, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for name, written_out in EAGER.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), written_out(x))
    assert torch.equal(x, before)

    ops = ModuleType("comfy.ops")
    ops.INPUT_ACT_EAGER = {"swiglu": lambda x: x[..., ::2] * 0 + 7}
    monkeypatch.setitem(sys.modules, "comfy.ops", ops)
    for name, value in (("swiglu", 7.0), ("situ", float(EAGER["situ"](x).abs().max()))):
        linear = Linear(HIDDEN, WIDTH)
        linear.forward = lambda *_, **__: None
        with record(linear) as recording:
            linear(x, input_act=name)
        assert recording.statistics().absmax.tolist() == [pytest.approx(value)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, h, _: m.fc2(h, input_act="tanhshrink"),
         r"fc2: called with an unknown activation 'tanhshrink', not one of gelu_tanh, rms_norm, situ, swiglu "
         r"\(a newer convert_to_quant may know it\)"),
        (lambda m, h, _: m.fc2(h, input_act=3), "fc2: called with an unknown activation 3"),
        (lambda m, h, _: m.fc2(h, input_act="gelu_tanh"), r"fc2: its input should be 16 wide, found \[18, 32\]"),
        (lambda m, h, _: m.fc2(h[..., :-2], input_act="swiglu"), r"fc2: its input should be 16 wide, found \[18, 15\]"),
        (lambda m, h, _: m.fc2(h), r"fc2: its input should be 16 wide, found \[2, 9, 32\] \(the layer may change"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(call, message):
    model = FeedForward(call, gated=True)
    with pytest.raises(CalibrationError, match=message), torch.no_grad(), record(model):
        model(torch.randn(2, 9, WIDTH))


def test_second_arguments_of_other_libraries_are_no_activations():
    class Adapted(nn.Linear):
        def forward(self, x, scale=1.0, *_, **__):
            return super().forward(x) * scale

    model = Adapted(WIDTH, WIDTH)
    with record(model) as recording:
        model(torch.ones(3, WIDTH), 0.5, torch.zeros(2), adapter_names=["x"])
    assert recording.statistics().count.tolist() == [3 * WIDTH]


# ---------------------------------------------------------------- layers that ComfyUI computes without calling them


@pytest.fixture
def ops(monkeypatch):
    """`comfy.ops` with what computes INT8 layers, as in 0.33, and what every layer's weight goes through."""
    module = ModuleType("comfy.ops")

    def cast_bias_weight(linear, _x, **_):
        return linear.weight, linear.bias

    def linear_input_act(linear, x, input_act, *args, **kwargs):
        if not getattr(linear, "int8", False):
            return linear(EAGER[input_act](x), *args, **kwargs)
        weight, bias = module.cast_bias_weight(linear, x, offloadable=True)
        met = EAGER[input_act](x)
        linear.met.append(met.detach())
        return functional.linear(met, weight, bias)

    module.cast_bias_weight, module.linear_input_act = cast_bias_weight, linear_input_act
    monkeypatch.setitem(sys.modules, "comfy.ops", module)
    return module


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize(("act", "gated"), [("gelu_tanh", False), ("swiglu", True)])
def test_layers_that_are_computed_without_a_call_are_recorded_once(ops, int8, act, gated):
    model = FeedForward(lambda m, h, _: ops.linear_input_act(m.fc2, h, act), gated)
    model.fc2.int8 = int8
    functions = (ops.linear_input_act, ops.cast_bias_weight)
    with torch.no_grad(), record(model) as recording:
        assert functions != (ops.linear_input_act, ops.cast_bias_weight)
        model(torch.randn(2, 9, WIDTH))
        model(torch.randn(2, 9, WIDTH))
    assert functions == (ops.linear_input_act, ops.cast_bias_weight)
    statistics = recording.statistics()
    assert statistics.calls.tolist() == [2, 2]
    met = torch.stack(model.fc2.met)
    assert statistics.absmax[1] == pytest.approx(met.abs().max().item(), rel=1e-6)
    assert statistics.count[1] == met.numel()
    assert statistics.unseen == ()


def test_layers_that_ran_unseen_are_named_and_the_others_are_not(ops):
    class Model(FeedForward):
        def __init__(self):
            super().__init__(lambda m, h, _: functional.linear(h, *ops.cast_bias_weight(m.fc2, h)), gated=False)
            self.idle, self.norm_like = nn.Linear(3, 3), nn.LayerNorm(3)

    model = Model()
    with torch.no_grad(), record(model, names=lambda name: f"net.{name}") as recording:
        model(torch.randn(2, 9, WIDTH))
        ops.cast_bias_weight(nn.Linear(2, 2), torch.ones(1, 2))
    assert recording.unseen == ("net.fc2",)
    statistics = recording.statistics(samples=2)
    assert statistics.unseen == ("net.fc2",)
    assert statistics.provenance == {"unseen": ("net.fc2",)}
    assert [name for name, seen in zip(statistics.names, statistics.visited, strict=True) if not seen] == [
        "net.fc2", "net.idle"
    ]  # fmt: skip
    recording.clear()
    assert recording.unseen == ()


def test_functions_that_others_replaced_meanwhile_stay_and_ours_tell_nothing_more(ops):
    model = FeedForward(lambda m, h, _: ops.linear_input_act(m.fc2, h, "swiglu"), gated=True)
    with record(model) as recording:
        ours = ops.linear_input_act
        ops.linear_input_act = theirs = partial(ours)
    assert ops.linear_input_act is theirs
    with torch.no_grad():
        model(torch.randn(2, 9, WIDTH))
    assert recording.statistics().calls.tolist() == [0, 0]


# ---------------------------------------------------------------- ComfyUI's allocation graphs


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Graph(TorchDispatchMode):
    """Keeps what is allocated while a block runs and the recording of allocations is not paused."""

    def __init__(self):
        super().__init__()
        self.depth = 0
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {storage(value) for value in args if isinstance(value, Tensor)}
        if self.depth == 0 and isinstance(made, Tensor) and storage(made) not in given:  # no view, not in place
            self.made.append(made)
        return made

    @contextmanager
    def pause(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def kept(recording):
    """Storages of what a recording keeps."""
    tensors = [*recording._sigma_bins.values()]
    for totals in recording._totals.values():
        tensors += [*totals.channel_bits, *(value for value in vars(totals).values() if isinstance(value, Tensor))]
    assert tensors
    return {storage(tensor) for tensor in tensors}


@pytest.mark.parametrize("pausable", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_kept_is_not_made_inside_of_a_block(monkeypatch, pausable, dims):
    """Before the block where the model's input tells the device; paused where ComfyUI can."""
    graph = Graph()
    if pausable:
        prefetch = ModuleType("comfy.model_prefetch")
        prefetch.pause_malloc_graph = graph.pause
        monkeypatch.setitem(sys.modules, "comfy.model_prefetch", prefetch)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            with graph:
                return self.block(x)

    model, x = Model(), torch.randn((2, 3, WIDTH)[3 - dims :])
    with torch.no_grad():
        model(x)
        model(x)
    allocated = len(graph.made)
    graph.made.clear()
    with torch.no_grad(), record(model, sigma=lambda *_: torch.tensor(0.5)) as recording:
        model(x)
        model(x)
    inside = kept(recording) & {storage(tensor) for tensor in graph.made}
    assert bool(inside) == (dims == 2 and not pausable)
    assert (len(graph.made) == allocated) == pausable  # nor anything else
