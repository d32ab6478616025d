"""Recording: what the hooks record, for which layers, and that they leave nothing behind."""

import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from convert_to_quant.errors import CalibrationError
from convert_to_quant.kernels import accumulate
from convert_to_quant.kernels.reference import Totals
from convert_to_quant.recorder import all_reduce, find_linears, record
from convert_to_quant.stats import Statistics


class Duck(nn.Module):
    """Has the attributes of a linear layer, like ComfyUI's quantized layers."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, hidden):
        return hidden @ self.weight.T.to(hidden.dtype)


class Model(nn.Module):
    """Tokens and a vector per image, as a diffusion transformer has them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.time = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "o": Duck(8, 8)})])
        self.idle = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x, timestep):
        vector = self.time(torch.stack([timestep * k for k in range(4)], -1))
        y = self.embed(x) + vector[:, None]
        for block in self.blocks:
            y = y + block["o"](hidden=block["q"](self.norm(y)) * torch.tanh(block["k"](self.norm(y))))
        return y


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def inputs(batch=2, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 6, generator=generator), torch.full((batch,), 0.6)


def by_hand(model, *args):
    """Inputs of the layers, from hooks of the test's own."""
    seen = {}

    def hook(name, _, args, kwargs):
        seen.setdefault(name, []).append((args or tuple(kwargs.values()))[0].detach().clone())

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "in_features"):
                stack.callback(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True).remove)
        model(*args)
    return seen


def assert_recorded(statistics, seen):
    for layer, inputs in seen.items():
        number = statistics.index(layer)
        rows = torch.cat([x.float().reshape(-1, x.shape[-1]) for x in inputs])
        assert statistics.absmax[number] == rows.abs().max()
        assert statistics.count[number] == rows.numel()
        assert statistics.rows[number] == len(rows)
        assert statistics.calls[number] == len(inputs)
        bins = (rows.abs().amax(1).view(torch.int32) >> 19).long()
        assert statistics.row_histogram[number].tolist() == torch.bincount(bins, minlength=4096).tolist()
        assert statistics.sum_of_squares[number] == pytest.approx(float((rows.double() ** 2).sum()), rel=1e-6)
        assert statistics.channel_absmax[number].tolist() == rows.abs().amax(0).tolist()


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


def test_every_linear_is_recorded_like_with_hooks_by_hand(model):
    args = inputs()
    with torch.no_grad(), record(model) as recording:
        expected = model(*args)
    statistics = recording.statistics(samples=2, seed=7)
    assert statistics.rows_per_sample.tolist() == [5, 1, 5, 5, 5, 0]
    assert statistics.names == ("embed", "time", "blocks.0.q", "blocks.0.k", "blocks.0.o", "idle")
    assert statistics.layers["embed"] == (8, 6)
    assert statistics.layers["blocks.0.o"] == (8, 8)
    assert_recorded(statistics, by_hand(model, *args))
    assert statistics.visited.tolist() == [True] * 5 + [False]
    assert (statistics.samples, statistics.provenance) == (2, {"seed": ("7",)})
    assert torch.equal(model(*args), expected)


@pytest.mark.parametrize(
    ("rows", "batch", "most"), [(6, 6, 1), (6, None, 6), (3, 2, 2), (4, 3, 2), (7, 3, 3), (2, 3, 1)]
)
def test_samples_of_unequal_length_count_as_the_longest_that_one_must_be(rows, batch, most):
    linear = nn.Linear(4, 4)
    with record(linear) as recording:
        recording.batch = batch
        linear(torch.randn(rows, 4))
        linear(torch.randn(1, 4))
    assert recording.statistics().rows_per_sample.tolist() == [most]
    assert recording.statistics().one_row.tolist() == [most == 1]


class Inner(nn.Module):
    """Gives its linear layer what a function makes of the model's inputs."""

    def __init__(self, make):
        super().__init__()
        self.make, self.inner = make, nn.Linear(4, 4)

    def forward(self, *inputs):
        return self.inner(self.make(*inputs))


def test_the_batch_is_read_off_lists_and_else_off_the_layers_input(model):
    for make, inputs_, most in (
        (torch.cat, ([torch.randn(3, 4), torch.randn(3, 4)],), [3]),  # a list of images
        (lambda tokens, batch: tokens.reshape(batch, -1, 4), (torch.randn(6, 4), 3), [2]),  # of all samples in a row
    ):
        wrapped = Inner(make)
        with record(wrapped) as recording:
            wrapped(*inputs_)
        assert recording.statistics().rows_per_sample.tolist() == most
    with torch.no_grad(), record(model) as recording:
        recording.batch = 1  # two images of five tokens are one sample
        model(*inputs(batch=2))
    assert recording.statistics().rows_per_sample.tolist() == [10, 2, 10, 10, 10, 0]


def test_totals_of_several_devices_add_up():
    linear = nn.Linear(4, 4)
    with record(linear) as recording:
        linear(torch.full((2, 4), 2.0))
        elsewhere = Totals([4, 0], torch.device("cpu"))  # those of another GPU
        accumulate(elsewhere, 0, elsewhere.sigma_numbers[8:9], torch.full((1, 4), -1.0))
        recording._totals[torch.device("cuda", 1)] = elsewhere
    statistics = recording.statistics()
    assert (statistics.absmax[0], statistics.count[0], statistics.sum_of_squares[0]) == (2.0, 12, 36.0)


def test_hooks_leave_with_the_block_whatever_ends_it(model):
    with record(model):
        assert len(hooks_of(model)) == 7
    assert not hooks_of(model)
    with pytest.raises(ZeroDivisionError), record(model) as recording:  # noqa: PT012  # the block is what is tested
        model(*inputs())
        raise ZeroDivisionError
    assert not hooks_of(model)
    assert recording.statistics().calls.sum() == 5
    with pytest.raises(CalibrationError, match=r"embed: its input should be 6 wide, found \[1, 2, 5\]"), record(model):
        model(torch.randn(1, 2, 5), torch.zeros(1))
    assert not hooks_of(model)


def test_modules_feed_layers_of_other_names(model):
    args = inputs()
    layers = {"img.qkv": (16, 8), "img.out": (8, 8), "also.out": (8, 8), "elsewhere": (1, 1)}
    names = {"blocks.0.q": "img.qkv", "blocks.0.k": "img.qkv", "blocks.0.o": ["img.out", "also.out"]}
    with torch.no_grad(), record(model, layers, names) as recording:
        model(*args)
        assert len(hooks_of(model)) == 3  # the model, and one module per input: k shares q's
    statistics = recording.statistics()
    seen = by_hand(model, *args)
    assert dict(statistics.layers) == layers
    fed = {"img.qkv": "blocks.0.q", "img.out": "blocks.0.o", "also.out": "blocks.0.o"}
    assert_recorded(statistics, {layer: seen[module] for layer, module in fed.items()})
    assert not statistics.visited[statistics.index("elsewhere")]
    assert statistics.histogram[statistics.index("elsewhere")].sum() == 0


def test_names_can_be_a_function_and_layers_a_choice(model):
    with record(model, names=lambda name: f"net.{name}" if "blocks" in name else None) as recording:
        assert list(recording.layers) == ["net.blocks.0.q", "net.blocks.0.k", "net.blocks.0.o"]
    with record(model, layers=(name for name in ("time", "embed"))) as recording:
        assert recording.layers == {"time": (8, 4), "embed": (8, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"norm": "x"}}, r"norm: no linear module of that name in the model \(1 of 1\)"),
        ({"names": {}}, "none of the model's 6 linear modules has a layer to record"),
        ({"layers": ["embed", "nowhere"]}, "nowhere: no module feeds this layer"),
        ({"layers": {"nowhere": (1, 1)}}, "none of the model's 6 linear modules"),
    ],
)
def test_names_that_fit_nothing_are_refused(model, options, message):
    with pytest.raises(CalibrationError, match=message), record(model, **options):
        raise AssertionError("not reached")
    assert not hooks_of(model)


def test_parts_of_a_wrapped_layer_and_second_names_of_a_layer_are_not_layers():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(4, 4)
            self.lora_A = nn.Linear(4, 1)
            self.in_features = 4
            self.weight = self.base_layer.weight

    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": Wrapper(), "b": shared, "c": shared})
    assert list(find_linears(model)) == ["a", "b"]
    nested = nn.ModuleDict({"one": nn.ModuleDict({"x": shared}), "two": nn.ModuleDict({"x": shared})})
    assert list(find_linears(nested)) == ["one.x"]
    assert list(find_linears(shared)) == [""]


def level_of(statistics):
    """Columns of the noise levels that each layer was seen at."""
    return [np.flatnonzero(row).tolist() for row in statistics.sigma_count]


@pytest.mark.parametrize(
    ("sigma", "column"),
    [
        *[(1.0, 7), (0, 0), (None, 8), (torch.tensor(0.3), 2), (torch.full((2, 1), 0.125), 0), (torch.tensor(1.0), 7)],
        *[(torch.tensor([0.3, 0.31]), 8), (torch.tensor(float("nan")), 8), (torch.tensor([700]), 8)],
        *[(torch.tensor(0.9, dtype=torch.bfloat16), 7), (torch.tensor(0.12501), 1), (torch.tensor(-0.1), 8)],
    ],
)
def test_noise_levels_are_numbers_or_tensors(sigma, column):
    linear = nn.Linear(4, 4)
    with record(linear) as recording:
        recording.at(sigma)
        linear(torch.ones(2, 4))
    assert level_of(recording.statistics()) == [[column]]
    assert recording.statistics().sigma_mean_square[0, column] == 1.0


def test_the_noise_level_of_each_call_can_come_from_its_arguments(model):
    with torch.no_grad(), record(model, sigma=lambda _, kwargs: kwargs["timestep"]) as recording:
        model(inputs()[0], timestep=torch.tensor([0.6, 0.6]))
        model(inputs()[0], timestep=torch.tensor([0.2, 0.2]))
    assert level_of(recording.statistics())[0] == [1, 4]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_do_not_matter_and_can_change_between_blocks(model, mode):
    with record(model) as recording:
        with torch.inference_mode():
            model(*inputs(seed=1))
        with mode():
            model(*inputs(seed=2))
        model(*inputs(seed=3))
    assert recording.statistics().calls.tolist() == [3] * 5 + [0]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")  # torch's own, about its own modules
@pytest.mark.parametrize("when", ["before", "inside"])
def test_compiled_models_are_recorded(model, when):
    import torch._dynamo  # what compiling imports

    args = inputs()
    compiled = torch.compile(model, backend="eager") if when == "before" else model
    with torch.no_grad():
        expected = compiled(*args)
        with record(compiled) as recording:
            run = compiled if when == "before" else torch.compile(model, backend="eager")
            assert torch.equal(run(*args), expected)
    assert_recorded(recording.statistics(), by_hand(model, *args))


class NoReadBack(TorchDispatchMode):
    """Raises where a value of a tensor would be read by the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_back_while_recording(model):
    with torch.no_grad(), NoReadBack(), record(model, sigma=lambda args, _: args[1]) as recording:
        model(*inputs())
    assert recording.statistics().calls.sum() == 5


def test_odd_inputs_are_left_alone():
    duck = Duck(4, 4)
    with record(duck) as recording:
        duck(torch.ones(0, 4))
        duck(torch.ones(2, 4, device="cpu").double())
        duck(torch.ones(2, 4, dtype=torch.int64))
        duck.to("meta")(torch.ones(2, 4, device="meta"))
    assert recording.statistics().rows.tolist() == [2]
    assert recording.statistics().calls.tolist() == [2]


WATCH = """
import torch
from torch import nn
from convert_to_quant.recorder import record

def watch(device, samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5)).to(device)
    with torch.inference_mode(), record(model) as recording:
        for sample in samples:
            recording.at(sample / 5)
            model(torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(sample)).to(device))
    return recording
"""

RANK = """
import sys
from torch import distributed

rank, world, out, backend = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
distributed.init_process_group(backend, init_method=f"file://{out}/meeting", rank=rank, world_size=world)
mine = range(rank, 5, world)
watch(device, mine).all_reduce(samples=len(mine), seed=mine).save(f"{out}/{rank}.safetensors")
distributed.destroy_process_group()
"""


CUDA_DEVICES = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("backend", "world"),
    [
        ("gloo", 2),
        pytest.param(
            "nccl",
            min(CUDA_DEVICES, 2),
            marks=[pytest.mark.cuda, pytest.mark.skipif(CUDA_DEVICES == 0, reason="needs a CUDA device")],
        ),
    ],
)
def test_processes_see_together_what_one_sees(tmp_path, backend, world):
    script = tmp_path / "rank.py"
    script.write_text(WATCH + RANK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path), backend],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=100) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, outputs

    here = {}
    exec(WATCH, here)
    single = here["watch"]("cuda" if backend == "nccl" else "cpu", range(5)).statistics(samples=5, seed=range(5))
    for rank in range(world):
        assert Statistics.load(tmp_path / f"{rank}.safetensors") == single


def test_without_process_groups_reducing_changes_nothing(model):
    with record(model) as recording:
        model(*inputs())
    assert recording.all_reduce(samples=3) == recording.statistics(samples=3)
    statistics = recording.statistics()
    assert all_reduce(statistics) == statistics


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_on_cuda_the_host_never_waits_and_the_numbers_are_those_of_the_hooks(model):
    model.cuda().bfloat16()
    x, sigma = (tensor.cuda().bfloat16() for tensor in inputs())
    with torch.no_grad(), record(model) as recording:  # the first call may compile, and checks itself
        model(x, sigma)
        recording.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            recording.at(sigma.float())
            model(x, sigma)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen = {layer: [x.cpu() for x in inputs] for layer, inputs in by_hand(model, x, sigma).items()}
    assert_recorded(recording.statistics(), seen)
