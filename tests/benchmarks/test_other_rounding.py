"""The comparison with other tools' GPTQ: what is given to a tool, and what is said of one that is missing."""

import sys

import other_rounding
import pytest
import torch

from convert_to_quant.formats import FORMATS
from convert_to_quant.rounding import error_of

COLUMNS = 256


@pytest.mark.parametrize("fmt", ["int8", "int8-convrot", "nvfp4"])
def test_own_methods_take_a_rotated_weight_and_moments_and_give_the_same_back(fmt):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, COLUMNS, generator=generator)
    place = torch.arange(COLUMNS)
    form = 0.9 ** (place - place.unsqueeze(1)).abs()
    nearest, feedback = (other_rounding.TOOLS[tool](weight, form, FORMATS[fmt]) for tool in ("nearest", "feedback"))
    assert (weight - nearest).norm() < 0.2 * weight.norm()
    assert error_of(weight, feedback, form).sum() < error_of(weight, nearest, form).sum() / 1.5


def test_a_tool_that_is_missing_is_told_on_stderr(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    assert other_rounding.attempted("ModelOpt", torch.ones(4, 4), torch.eye(4), "int8") is None
    assert "int8, ModelOpt: ModuleNotFoundError" in capsys.readouterr().err
