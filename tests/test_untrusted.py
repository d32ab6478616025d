"""What others wrote: JSON that is refused, and mutated files of every kind, of which only errors of ours come out."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_to_quant import convert, patch
from convert_to_quant.checkpoint import Entry, open_checkpoint, write_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.engines import session
from convert_to_quant.engines.comfyui import server, workflow
from convert_to_quant.errors import Error, StatisticsError
from convert_to_quant.inspection import inspect_file
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.stats import METADATA_KEY, Statistics, merge
from convert_to_quant.untrusted import MAX_DEPTH, JSONError, parse_json

# the parser


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        (b'{"\xff": 1}', "'utf-8' codec can't decode"),
        ("[" * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 500 + "1" + "}" * 500, f"nested deeper than {MAX_DEPTH} levels"),
        ('[{"a": 1, "b": 2, "a": 3}]', "the key 'a' appears twice in one object"),
        ("[NaN]", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("1e999", "1e999 is no number of JSON, or beyond float64"),
        ("1" * 5000, "Exceeds the limit"),
        (r'["\ud800"]', "half a surrogate pair"),
        (r'{"\uDFFF": 1}', "half a surrogate pair"),
    ],
    ids=range(11),
)
def test_what_is_not_json_is_refused(text: str | bytes, problem: str) -> None:
    with pytest.raises(JSONError, match=r"not JSON \(") as caught:
        parse_json(text)
    assert problem in str(caught.value)


def test_the_error_is_the_caller_s() -> None:
    with pytest.raises(StatisticsError, match=r"^a: x: not JSON \(") as caught:
        parse_json("{", functools.partial(StatisticsError, path="a", tensor="x"))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_text_may_be_as_long_and_deep_as_the_limits() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, most_bytes=len(deep)) == json.loads(deep)
    with pytest.raises(JSONError, match="nested deeper"):
        parse_json(f"[{deep}]")
    with pytest.raises(JSONError, match="at most 127 are read"):
        parse_json(deep, most_bytes=len(deep) - 1)


def test_whole_pairs_and_a_byte_order_mark_are_taken() -> None:
    assert parse_json(r'["\ud83d\ude00", "\\ud800"]') == ["😀", r"\ud800"]
    assert parse_json('\ufeff{"a": 1}'.encode()) == {"a": 1}


def test_a_server_may_write_nan() -> None:
    assert parse_json("[NaN, -Infinity, 1e999, 2.5]", lenient=True) == [None, None, None, 2.5]
    assert server.parsed('{"max": Infinity}') == {"max": None}
    assert server.parsed(r'["\ud800"]') == ["\ud800"]
    assert server.parsed("[" * 100_000) is None


# every parser, on mutated files

NASTY = st.sampled_from([
    None, True, 0, 1, -1, -3, 2**31, 2**63, 10**40, 10**400, 0.5, -1e308, "", "a", "../x", "\0", "é😀", "F8_E4M3",
    "nvfp4", [], {}, [[]], [None], [1, "a"], {"x": 5}, {"format": "banana"},
])  # fmt: skip
DEEP = st.sampled_from(["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "[NaN]", '{"a":1,"a":2}', r'"\ud800"', "1e999"])


def mutated(draw: Callable[[Any], Any], value: Any) -> Any:
    """A value with a few of its nodes replaced, removed or added."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 7)):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder))) if isinstance(holder, dict) else draw(
                st.integers(0, len(holder) - 1))  # fmt: skip
        if holder is not root and draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw(NASTY))
    return root[0]


def mutated_text(draw: Callable[[Any], Any], text: str) -> str:
    """The same of a JSON text, which may also become none."""
    return draw(DEEP) if draw(st.integers(0, 9)) == 0 else json.dumps(mutated(draw, json.loads(text)))


LAYERS = {"blocks.0": (16, 32), "blocks.1": (16, 32)}
SCALE = np.float32(0.5)
MADE = json.dumps(
    {"version": "0", "convert": {}, "calibrate": {"engine": "layer", "samples": 2, "guessed": ["blocks.0"]}}
)


class Recorded:
    """What a session asks of a recording."""

    layers = LAYERS


def seen() -> Statistics:
    return Statistics.empty(LAYERS).with_facts(samples=2, engine="a test", depends_on_conditioning=["blocks.0"])


def a_checkpoint(draw: Any, folder: Path, build: Any) -> Path:
    tensors, metadata = build.quantized(list(LAYERS), "both", input_scale=0.5)
    tensors["blocks.0.comfy_quant"] = np.frombuffer(
        mutated_text(draw, '{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}').encode(), np.uint8
    )
    metadata = {**metadata, "convert_to_quant": MADE}
    for key in draw(st.sets(st.sampled_from(sorted(metadata)))):
        metadata[key] = mutated_text(draw, metadata[key])
    (folder / "m.safetensors").write_bytes(build.file_bytes(tensors, metadata))
    return folder / "m.safetensors"


def reads_checkpoints(draw: Any, folder: Path, build: Any) -> None:
    path = a_checkpoint(draw, folder, build)
    json.dumps(inspect_file(path).to_json(), allow_nan=False)
    with open_checkpoint(path) as checkpoint:
        json.loads(convert.provenance(checkpoint.metadata, calibrate={}))
    assert main(["inspect", str(path), "--layers", "--strict"]) in (0, 1)
    assert main(["apply", str(path), str(statistics_file(folder)), "-o", str(folder / "new.safetensors")]) in (0, 1)


def statistics_file(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    seen().save(folder / "s.safetensors", metadata)
    return folder / "s.safetensors"


def rewritten(path: Path, key: str, draw: Any) -> Path:
    """A file with one entry of its metadata mutated."""
    with open_checkpoint(path) as checkpoint:
        metadata = dict(checkpoint.metadata)
        tensors = {name: Entry.of(checkpoint.bits(name).copy()) for name in checkpoint}
    metadata[key] = mutated_text(draw, metadata[key])
    write_checkpoint(path, tensors, metadata)
    return path


def reads_statistics(draw: Any, folder: Path, build: Any) -> None:
    path = rewritten(statistics_file(folder), METADATA_KEY, draw)
    html = folder / "r.html"
    assert main(["report", str(path), "-o", str(html)]) in (0, 1)
    statistics = Statistics.load(path)
    merge(statistics, statistics).save(folder / "t.safetensors")
    repr(statistics)


def resumes(draw: Any, folder: Path, build: Any) -> None:
    made_with = {"samples": 2}
    running = session.Session(folder / "out.safetensors", made_with, resume=True)
    state = {"options": running.options, "done": ["u1"], "ranges": {"g": [1.0, 2.0]}}
    assert running.partial is not None
    statistics_file(folder, {session.METADATA_KEY: json.dumps(state)}).rename(running.partial)
    rewritten(running.partial, session.METADATA_KEY, draw)
    running._begun(Recorded())  # type: ignore[arg-type]


def reads_undo_files(draw: Any, folder: Path, build: Any) -> None:
    path = folder / "m.safetensors"
    path.write_bytes(build.file_bytes(*build.quantized(["blocks.0"], "tensor")))
    file = {"name": path.name, "inode": path.stat().st_ino, "bytes": path.stat().st_size}
    record = {"format": 2, "files": [file], "changes": [[0, 100, "AA==", "AQ=="]]}
    body = mutated_text(draw, json.dumps(record)).encode()
    path.with_name(path.name + ".undo").write_bytes(f"{zlib.crc32(body):08x}\n".encode() + body)
    patch.recover(path)


def reads_indexes(draw: Any, folder: Path, build: Any) -> None:
    path = folder / "m.safetensors.index.json"
    text = '{"metadata": {"total_size": 1}, "weight_map": {"a.weight": "a.safetensors"}}'
    path.write_text(mutated_text(draw, text), encoding="utf-8")
    (folder / "a.safetensors").write_bytes(build.file_bytes({"a.weight": np.zeros((2, 2), np.float32)}))
    open_checkpoint(path).close()


def reads_headers(draw: Any, folder: Path, build: Any) -> None:
    content = build.file_bytes(*build.quantized(["blocks.0"], "both"))
    length = int.from_bytes(content[:8], "little")
    text = mutated_text(draw, content[8 : 8 + length].decode()).encode()
    path = folder / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    inspect_file(path)


def reads_adapters(draw: Any, folder: Path, build: Any) -> None:
    path = folder / "l.safetensors"
    tensors = {
        "blocks.0.lora_down.weight": np.ones((2, 32), np.float32),
        "blocks.0.lora_up.weight": np.ones((16, 2), np.float32),
    }
    path.write_bytes(build.file_bytes(tensors, {"notes": mutated_text(draw, '{"ss_network_dim": 2}')}))
    match_loras([load_lora(path)], LAYERS).summary()


def reads_workflows(draw: Any, folder: Path, build: Any) -> None:
    nodes = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a.safetensors"}},
        "3": {"class_type": "KSampler", "_meta": {"title": "K"}, "inputs": {"model": ["1", 0], "seed": 1}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
    }
    infos = {
        "UNETLoader": {"input": {"required": {"unet_name": [["a"], {}]}}, "output": ["MODEL"]},
        "KSampler": {"input": {"required": {"model": ["MODEL"], "seed": ["INT", {}]}}, "output": ["LATENT"]},
        "SaveImage": {"input": {"required": {"images": ["IMAGE"]}}, "output": []},
    }
    found = workflow.parse(mutated_text(draw, json.dumps(nodes)), folder / "w.json")
    types = {}
    for name, info in infos.items():
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # as `server.py` takes them
            types[name] = workflow.NodeType.read(mutated(draw, info) if draw(st.booleans()) else info)
    json.dumps(workflow.plan(found, types, folder / "w.json").queued("s", "f"))


PARSERS = [
    reads_checkpoints, reads_statistics, resumes, reads_undo_files, reads_indexes, reads_headers, reads_adapters,
    reads_workflows,
]  # fmt: skip


@pytest.mark.parametrize("reads", PARSERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_only_errors_of_ours_come_out_of_what_others_wrote(tmp_path: Path, build: Any, reads: Any, data: Any) -> None:
    for left in tmp_path.iterdir():
        left.unlink()
    with contextlib.suppress(Error):
        reads(data.draw, tmp_path, build)


@pytest.mark.parametrize("value", [{"g": [[1.0], 2.0]}, {"g": [1.0]}, {"g": "ab"}, [], None])
def test_a_session_whose_ranges_are_hostile_is_refused(tmp_path: Path, value: Any) -> None:
    running = session.Session(tmp_path / "out.safetensors", {}, resume=True)
    state = {"options": running.options, "done": [], "ranges": value}
    assert running.partial is not None
    statistics_file(tmp_path, {session.METADATA_KEY: json.dumps(state)}).rename(running.partial)
    with pytest.raises(StatisticsError, match="damaged: "):
        running._begun(Recorded())  # type: ignore[arg-type]
