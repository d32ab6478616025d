"""Reading and writing at a position gives the same with and without the system's own calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_to_quant.checkpoint import Entry, open_checkpoint, positioned, write_checkpoint
from convert_to_quant.checkpoint.positioned import OPEN_FLAGS, pread, pwrite


@pytest.fixture(params=["pread and pwrite", "neither, as on Windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("neither"):
        for name in ("pread", "pwrite", "O_TMPFILE", "copy_file_range", "fchmod"):
            monkeypatch.delattr(os, name, raising=False)


@pytest.mark.usefixtures("system")
def test_threads_write_and_read_their_own_places(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | OPEN_FLAGS)
    blocks = {number * 1000: bytes([number]) * 1000 for number in range(64)}
    try:
        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(lambda item: pwrite(fd, item[1], item[0]), blocks.items()))
            read = list(pool.map(lambda offset: pread(fd, 1000, offset), blocks))
    finally:
        os.close(fd)
    assert written == [1000] * 64
    assert read == list(blocks.values())
    assert (tmp_path / "file").read_bytes() == b"".join(blocks.values())


def test_without_the_systems_own_calls_nobody_moves_the_position_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pread", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("lseek", "read", "write"):

        def watched(*args: Any, real: Callable[..., Any] = getattr(os, name)) -> Any:  # noqa: B008
            held.append(positioned._POSITION.locked())
            return real(*args)

        monkeypatch.setattr(os, name, watched)
    held: list[bool] = []
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | OPEN_FLAGS)
    try:
        assert pwrite(fd, b"12345", 3) == 5
        assert pwrite(fd, b"0", 1) == 1
        assert (pread(fd, 4, 4), pread(fd, 2, 1)) == (b"2345", b"0\0")
    finally:
        os.close(fd)
    assert held == [True] * 8


@pytest.mark.usefixtures("system")
def test_a_checkpoint_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        write_checkpoint(path, {"x": Entry.of(np.full(3, value, np.float32))})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.float32("x").tolist() == [2.0, 2.0, 2.0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
