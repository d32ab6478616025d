"""Reading and writing at a position gives the same with and without the system's own calls."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from convert_to_quant.checkpoint.positioned import OPEN_FLAGS, pread, pwrite


@pytest.mark.parametrize("lacking", [(), ("pread", "pwrite")], ids=["pread and pwrite", "neither, as on Windows"])
def test_threads_write_and_read_their_own_places(tmp_path, monkeypatch, lacking):
    for name in lacking:
        monkeypatch.delattr(os, name)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | OPEN_FLAGS)
    blocks = {number * 4: number.to_bytes(4, "little") for number in range(5000)}  # enough to meet each other
    try:
        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(lambda item: pwrite(fd, item[1], item[0]), blocks.items()))
            read = list(pool.map(lambda offset: pread(fd, 4, offset), blocks))
    finally:
        os.close(fd)
    assert written == [4] * 5000
    assert read == list(blocks.values())
