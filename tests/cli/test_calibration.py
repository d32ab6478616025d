"""Words that the calibrating commands share: adapters with strengths, numbers in tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert_to_quant.cli.output import print_table, write_json


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("layer", "range"), [("a", "10.5"), ("blocks.0", "3")], right=(1,))
    assert capsys.readouterr().out == "layer     range\na          10.5\nblocks.0      3\n"


def test_json_with_infinities_is_a_bug_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(str(tmp_path / "a.json"), {"x": float("inf")})
    assert not list(tmp_path.iterdir())
