"""What interrupted downloads and diverged training leave is found before or during conversion."""

from __future__ import annotations

import numpy as np
import pytest

from convert_to_quant import cli
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.damaged import all_zero
from convert_to_quant.inspection import inspect_file

SIDE = 64


@pytest.fixture
def model(save, build):
    """Save a model of blocks in BF16 with some of its tensors replaced."""

    def model(changes=()):
        weight = build.to_bfloat16(np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32))
        tensors = {f"blocks.{i}.a.weight": ("BF16", weight) for i in range(4)}
        tensors |= {"blocks.0.a.bias": np.ones(SIDE, np.float32), "blocks.0.norm.scale": np.ones(SIDE, np.float16)}
        return save("m.safetensors", {**tensors, "final.weight": ("BF16", weight), **dict(changes)})

    return model


def convert(path, capsys, *words):
    output = path.with_name("out.safetensors")
    code = cli.main(["-i", str(path), "-o", str(output), *words])
    assert output.exists() == (code == 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("at", [0, 1, 999_999, 500_000, 123_456])
def test_a_tensor_is_all_zero_only_where_every_byte_is(save, at):
    content = np.zeros(1_000_000, np.uint8)
    with open_checkpoint(save("a.safetensors", {"x": content, "none": content[:0]})) as checkpoint:
        assert all_zero(checkpoint, "x")
        assert not all_zero(checkpoint, "none")
    content[at] = 1
    with open_checkpoint(save("a.safetensors", {"x": content})) as checkpoint:
        assert not all_zero(checkpoint, "x")


def test_weights_that_are_zero_are_counted_and_refused_where_all_are(model, capsys):
    zero = ("BF16", np.zeros((SIDE, SIDE), np.uint16))
    path = model({f"blocks.{i}.a.weight": zero for i in (1, 3)})
    code, said = convert(path, capsys)
    assert code == 0
    assert "2 of 5 weights are all zero (first: blocks.1.a.weight), as after an interrupted download" in said
    assert [(one.kind, one.tensors) for one in inspect_file(path).problems] == [
        ("all-zero", ("blocks.1.a", "blocks.3.a"))
    ]
    path.with_name("out.safetensors").unlink()
    path = model(dict.fromkeys(("final.weight", *(f"blocks.{i}.a.weight" for i in range(4))), zero))
    problem = "every weight is zero, as after an interrupted download (download it again)"
    assert convert(path, capsys) == (1, f"error: {path}: {problem}\n")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("words", [(), ("--actcal", "--actcal-engine", "layer"), ("--dry-run",)])
@pytest.mark.parametrize("name", ["blocks.0.a.bias", "blocks.0.norm.scale"])
def test_a_norm_or_bias_that_is_not_finite_is_named(model, capsys, name, words, value):
    values = np.ones(SIDE, np.float32)
    values[3] = value
    path = model({name: values})
    code, said = convert(path, capsys, *words)
    assert code == 1
    assert f"{path}: {name}: it has NaN or infinite values (the file is damaged, or its training diverged)" in said
    assert [(one.kind, one.tensors) for one in inspect_file(path).problems] == [("not-finite", (name,))]


def test_a_kept_weight_that_is_not_finite_is_named(model, capsys):
    path = model({"final.weight": np.full((SIDE, SIDE), np.nan, np.float32)})
    code, said = convert(path, capsys)
    assert (code, f"{path}: final.weight: the weight has NaN or infinite values" in said) == (1, True)
