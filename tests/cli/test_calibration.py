"""Words that the calibrating commands share: adapters with strengths, numbers in tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert_to_quant.cli.calibration import loras_of, split_strength
from convert_to_quant.cli.output import print_table, write_json
from convert_to_quant.errors import LoraError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("C:/loras/a.safetensors", ("C:/loras/a.safetensors", 1.0)),
        ("C:/loras/a.safetensors:2", ("C:/loras/a.safetensors", 2.0)),
    ],
)
def test_a_strength_follows_a_colon(text: str, expected: tuple[str, float]) -> None:
    assert split_strength(text) == expected


def test_a_file_whose_own_name_ends_like_a_strength_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "style:0.5"
    path.touch()
    assert split_strength(str(path)) == (str(path), 1.0)


def test_adapters_are_closed_also_where_a_later_one_is_broken(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert_to_quant.checkpoint import Checkpoint

    closed: list[Path] = []
    monkeypatch.setattr(Checkpoint, "close", lambda self: closed.append(self.path))
    good = save("good.safetensors", {"x.lora_A.weight": np.ones((1, 4), np.float32),
                                     "x.lora_B.weight": np.ones((4, 1), np.float32)})  # fmt: skip
    bad = save("bad.safetensors", {"x": np.ones(1, np.float32)})
    with (
        pytest.raises(LoraError, match="not a LoRA"),
        loras_of(argparse.Namespace(lora=[f"{good}:0.5", str(bad)])),
    ):
        pass
    assert good in closed


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("layer", "range"), [("a", "10.5"), ("blocks.0", "3")], right=(1,))
    assert capsys.readouterr().out == "layer     range\na          10.5\nblocks.0      3\n"


def test_json_with_infinities_is_a_bug_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(str(tmp_path / "a.json"), {"x": float("inf")})
    assert not list(tmp_path.iterdir())
