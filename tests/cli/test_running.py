"""Default device and inputs of a model, and the messages about them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import running
from convert_to_quant.engines.devices import find_device
from convert_to_quant.errors import OptionError


@pytest.fixture
def settled(flux_file, capsys):
    """settled(options...): the chosen options for the tiny Flux.1, and the messages."""

    def settle(**given: Any) -> tuple[dict[str, Any], str]:
        options = {"device": "auto", **dict.fromkeys(("steps", "height", "width", "frames", "text_tokens")), **given}
        args = argparse.Namespace(**options)
        with open_checkpoint(flux_file) as checkpoint:
            running.settle(args, checkpoint)
        return {name: value for name, value in vars(args).items() if value is not None}, capsys.readouterr().err

    return settle


def test_a_gpu_is_used_and_named(settled, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: empty(*shape, device="meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Abacus 9")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**10))
    assert find_device("cpu").type == "cpu"
    free = 8_000_000_000
    options, said = settled()
    assert options == {"device": "cuda", "steps": 4}
    assert said.startswith("running on cuda (Abacus 9): the model needs ")
    assert said.endswith(" kB, 8.0 GB of GPU memory is free\n")
    free = 12
    assert settled()[1].startswith("note: running on cuda")


def test_a_cpu_runs_a_large_model_at_a_smaller_size_by_default(settled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(running, "free_memory", lambda: 10**10)
    assert settled() == ({"device": "cpu", "steps": 4}, "")
    monkeypatch.setattr(running, "CPU_LARGE_WEIGHTS", 10**4)
    smaller = {"device": "cpu", "steps": 2, "height": 128, "width": 128, "text_tokens": 32}
    said = "note: large model on cpu: using 128 × 128 pixels, 2 noise levels (options override this)\n"
    assert settled() == (smaller, said)
    assert settled(height=512, steps=1)[0] == {"device": "cpu", "steps": 1, "height": 512}
    monkeypatch.setattr(running, "free_memory", lambda: 12)
    assert settled()[1].endswith("do not fit into 12 bytes of free memory: each evaluation reads the file\n")


@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        ("--actcal", True),
        ("--actcal --actcal-engine layer", False),
        ("--best", True),
        ("--best --from stats.safetensors", False),
        ("--format int8 --round", True),
        ("--format int8 --fold", True),
        ("--format int8", False),
    ],
)
def test_convert_chooses_a_device_for_running_only_if_it_runs_the_model(ctq, flux_file, monkeypatch, flags, runs):
    def settle(args: argparse.Namespace, _: object, *, runs: bool) -> None:
        assert args.device == "auto"
        raise OptionError(f"runs: {bool(runs)}")

    monkeypatch.setattr("convert_to_quant.cli.convert.settle", settle)
    outcome = ctq("-i", flux_file, "-o", flux_file.with_name("out.safetensors"), *flags.split(), "--dry-run")
    assert outcome.err == f"error: runs: {runs}\n"
