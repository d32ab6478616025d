"""Feeds every parser mutated files, which must give an answer or one of our errors.

    python tests/fuzz/fuzzer.py [--seconds S] [--seed N] [--keep DIR] [TARGET ...]

`corpus/TARGET/` holds small valid files, and inputs that once broke something. Each input is one of them with a few
mutations of its structure (JSON, also inside strings; tensors whose shapes, dtypes and data agree or not) or its bytes.
An input is a finding if reading it raises anything but our errors or takes longer than `PATIENCE_SECONDS`; if we accept
a header that the safetensors library refuses; or if an undo file changes a weight. `--keep` saves findings. The same
seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import operator
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from convert_to_quant import cli, convert, patch
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.checkpoint.header import DTYPE_BITS, header_length, parse_header
from convert_to_quant.cli import config
from convert_to_quant.engines import session
from convert_to_quant.engines.comfyui import workflow
from convert_to_quant.errors import Error
from convert_to_quant.inspection import inspect_file
from convert_to_quant.layers import find_layers
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.report import figures, page
from convert_to_quant.stats import Statistics, merge

CORPUS = Path(__file__).with_name("corpus")
PATIENCE_SECONDS = 10.0
"""CPU time, so that a busy machine does not fail."""

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, -(2**63), 0.5, -0.0, 1e308,
    math.inf, math.nan, "", "a", "\0", "\ud800", "../x", "/etc/passwd", "x" * 300, "é😀", "\x1b[2J", [], {}, [[]],
    [None], [0], [1, 2, 3], {"a": 1}, {"format": "float8_e4m3fn"}, "F32", "F8_E4M3", "U8", "BF16", "F4", "nvfp4",
    "int8_tensorwise", ["1", 0], [2**40, 0], [1], [1, 1], [64], [3, 5], [1] * 32, b"\0", b"\xff", b"\0\0\xc0\x7f",
    b"\0\0\x80\xbf",
]  # fmt: skip
"""Values that replace others; bytes replace the data of tensors, the last two as NaN and -1."""
PIECES = [b"\0" * 8, b"}", b"[[", b'"', b"1e999", b"\xff\xff", b"\\ud800", b"-", b"9" * 30, b"null", b"NaN", b"="]
DEPTHS = (3, 100, 995, 5000)
LENGTHS = (0, 1, 7, 10**8, 10**8 + 1, 2**63, 2**64 - 1)

Random = random.Random
Change = Callable[[Random, bytes], bytes]


def mutated(rng: Random, value: Any, depth: int = 0) -> Any:
    """A copy of a value with one node replaced, removed, added, or renamed."""
    if rng.random() < 0.1 or depth > 6:
        return copy.deepcopy(rng.choice(NASTY))
    if isinstance(value, (dict, list)) and value:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        place = rng.randrange(len(items))
        key, one = items[place]
        match rng.randrange(7):
            case 0:
                del items[place]
            case 1:
                items.insert(place, (rng.choice(NASTY), copy.deepcopy(rng.choice(NASTY))))
            case 2 if isinstance(value, dict):  # another key's ending, or a new one
                ending = rng.choice([*value, ".\0", ". ", ".é"]).rpartition(".")[2]
                items[place] = f"{key.rpartition('.')[0]}.{ending}", one
            case _:
                items[place] = key, mutated(rng, one, depth + 1)
        return {str(name): one for name, one in items} if isinstance(value, dict) else [one for _, one in items]
    if isinstance(value, int) and not isinstance(value, bool):
        return rng.choice([value + 1, value - 1, -value, value * 2, value ^ (1 << rng.randrange(64)), float(value)])
    if isinstance(value, (str, bytes)):
        with contextlib.suppress(ValueError):
            text = mutated_json(rng, value if isinstance(value, bytes) else value.encode())
            return text if isinstance(value, bytes) else text.decode()
        place, between = rng.randrange(len(value) + 1), b"\x1b" if isinstance(value, bytes) else "\x1b"
        return rng.choice([value[:place], value[place:], value * 2, value[:place] + between + value[place:]])
    return copy.deepcopy(rng.choice(NASTY))


def mutated_json(rng: Random, content: bytes) -> bytes:
    """A JSON text with a few mutations, or nothing but brackets."""
    value = json.loads(content)
    if rng.random() < 0.03:
        return (rng.choice(["[", '{"a":']) * rng.choice(DEPTHS)).encode()
    for _ in range(rng.randrange(1, 4)):
        value = mutated(rng, value)
    return json.dumps(value).encode()


def mutated_bytes(rng: Random, content: bytes) -> bytes:
    """Bytes with a few replaced by others, by nothing, or by more."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        end = start + rng.choice((0, 1, 8, 64, len(content)))
        new = rng.choice([b"", bytes([rng.randrange(256)]), rng.choice(PIECES), content[start:end] * 2])
        content = content[:start] + new + content[end:]
    return content


def mutated_toml(rng: Random, content: bytes) -> bytes:
    """TOML with mutated lines, keys and values."""
    lines = mutated(rng, [line.split(" = ", 1) for line in content.decode().splitlines()])
    lines += [[rng.choice(["[x]", "[[convert]]", "a." * rng.choice(DEPTHS) + "b = 1"])]] * (rng.random() < 0.1)
    return "\n".join(" = ".join(line) for line in lines).encode("utf-8", "replace")


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def joined(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def mutated_file(rng: Random, content: bytes) -> bytes:
    """A safetensors file with other tensors and metadata, another header, another length, or other bytes."""
    header, data = split(content)
    chance = rng.random()
    if chance < 0.1:
        return rng.choice(LENGTHS).to_bytes(8, "little") + content[8:] if chance < 0.05 else mutated_bytes(rng, content)
    if chance < 0.3:
        return joined(mutated(rng, header), data)
    for one in header.values():
        if "data_offsets" in one:
            one["data"] = data[slice(*one.pop("data_offsets"))]
    for _ in range(rng.randrange(1, 4)):
        header = mutated(rng, header)
    data = b""
    for name, one in header.items():
        if name != "__metadata__":
            raw = one.pop("data")
            wanted = min(math.prod(map(operator.index, one["shape"])), 1 << 16) * DTYPE_BITS[one["dtype"]] // 8
            raw = (raw * (wanted // max(len(raw), 1) + 1))[:wanted]
            one["data_offsets"] = [len(data), len(data) + len(raw)]
            data += raw
    return joined(header, data)


# --- targets


def reads_header(path: Path) -> None:
    content = path.read_bytes()
    length = header_length(content[:8], len(content), path)
    parse_header(content[8 : 8 + length], len(content), path)
    safetensors.deserialize(content)  # must accept what we accept


def reads_checkpoint(path: Path) -> None:
    json.dumps(inspect_file(path).to_json(), allow_nan=False)
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        steps = convert.provenance(checkpoint.metadata, calibrate={})
        changes = {name: patch.LayerChange(0.5, True) for name in table.static}
        planned = patch.plan_patch(checkpoint, table, changes, metadata={"convert_to_quant": steps})
        patch.rewrite(planned, path.with_name("new.safetensors"))
    with open_checkpoint(path.with_name("new.safetensors")) as checkpoint:
        find_layers(checkpoint)


def reads_index(path: Path) -> None:
    index = path.rename(path.with_name("m.safetensors.index.json"))
    tensor = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    path.with_name("a.safetensors").write_bytes(joined({"a.weight": tensor}, b"a"))
    open_checkpoint(index).close()


def reads_configuration(path: Path) -> None:
    command, *words = cli.with_command(["--config", str(path)])
    with contextlib.suppress(SystemExit):  # argparse's own refusal
        config.parse(cli.build_parser(command), words, command, list(cli.COMMANDS))


NODE_TYPES = {
    name: workflow.NodeType.read(
        {"input": {"required": {key: [kind] for key, kind in inputs.items()}}, "output": outputs}
    )
    for name, outputs, inputs in (
        ("UNETLoader", ["MODEL"], {"unet_name": "COMBO"}),
        ("CLIPTextEncode", ["CONDITIONING"], {"text": "STRING", "clip": "CLIP"}),
        (
            "KSampler",
            ["LATENT"],
            {"model": "MODEL", "positive": "CONDITIONING", "latent_image": "LATENT", "seed": "INT"},
        ),
        ("EmptyLatentImage", ["LATENT"], {"width": "INT"}),
        ("CLIPLoader", ["CLIP"], {}),
        ("SaveImage", [], {"images": "IMAGE"}),
        (workflow.RECORD, ["MODEL", "ACTIVATION_STATS"], {"model": "MODEL"}),
        (workflow.SAVE, ["ACTIVATION_STATS"], {"stats": "ACTIVATION_STATS", "latent": "LATENT"}),
    )
}


def reads_workflow(path: Path) -> None:
    nodes = workflow.parse(path.read_bytes().decode("utf-8", "replace"), path)
    json.dumps(workflow.plan(nodes, NODE_TYPES, path).queued("s", "f"))


def reads_undo(path: Path) -> None:
    weight, mark = bytes(range(100)), b'{"format": "float8_e4m3fn"}'
    fields = {
        "a.weight": {"dtype": "F8_E4M3", "shape": [10, 10], "data_offsets": [0, 100]},
        "a.input_scale": {"dtype": "F32", "shape": [], "data_offsets": [100, 104]},
        "a.comfy_quant": {"dtype": "U8", "shape": [len(mark)], "data_offsets": [104, 104 + len(mark)]},
    }
    model = path.with_name("m.safetensors")
    content = joined(fields, weight + bytes(4) + mark)
    model.write_bytes(content)
    body = path.read_bytes().replace(b"4242", str(model.stat().st_ino).encode())
    body = body.replace(b"2424", str(len(content)).encode())
    model.with_name(f"{model.name}.undo").write_bytes(f"{zlib.crc32(body):08x}\n".encode() + body)
    try:
        patch.recover(model)
    finally:
        start = content.index(weight)
        assert model.read_bytes()[start : start + 100] == weight, "a weight was changed"


def reads_statistics(path: Path) -> None:
    statistics = Statistics.load(path)
    repr(merge(statistics, statistics))
    statistics.save(path.with_name("new.safetensors"))
    page.render(figures.build(figures.Source(statistics=statistics)).document())


LAYERS = {"blocks.0": (16, 32)}
"""Layers of the statistics and adapters in the corpus."""


class _Recorded:
    """What a session needs of a recording."""

    layers = LAYERS


def reads_session(path: Path) -> None:
    running = session.Session(path.with_name("out.safetensors"), {"samples": 2}, resume=True)
    assert running.partial is not None
    path.rename(running.partial)
    running._begun(_Recorded())  # type: ignore[arg-type]


def reads_lora(path: Path) -> None:
    adapter = load_lora(path)
    try:
        found = match_loras([adapter], LAYERS)
        found.summary()
        for name in found.matched:
            found.add_to(np.zeros(LAYERS[name], np.float32), name)
    finally:
        adapter.checkpoint.close()


TARGETS: dict[str, tuple[Change, Callable[[Path], None]]] = {
    "header": (mutated_file, reads_header),
    "checkpoint": (mutated_file, reads_checkpoint),
    "index": (mutated_json, reads_index),
    "configuration": (mutated_toml, reads_configuration),
    "workflow": (mutated_json, reads_workflow),
    "undo": (mutated_json, reads_undo),
    "statistics": (mutated_file, reads_statistics),
    "session": (mutated_file, reads_session),
    "lora": (mutated_file, reads_lora),
}
"""Name -> how its files are mutated, and what reads them."""


@dataclass
class Found:
    """Results of one target.

    Attributes:
        inputs: number of inputs.
        taken: number read without an error.
        slowest_seconds: longest CPU time of one input.
        findings: what went wrong, with the shortest input that causes it.
    """

    inputs: int = 0
    taken: int = 0
    slowest_seconds: float = 0.0
    findings: dict[str, bytes] = field(default_factory=dict)


def seeds(target: str) -> list[bytes]:
    """A target's corpus."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def inputs_of(target: str, seed: int) -> Iterator[bytes]:
    """Mutations of a target's corpus, without end."""
    rng, change, known = random.Random(f"{target} {seed}"), TARGETS[target][0], seeds(target)
    while True:
        content = rng.choice(known)
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            yield change(rng, content)


def read(target: str, content: bytes, folder: Path) -> str | None:
    """Read one input in a folder, which is emptied first.

    Returns:
        None if it was accepted, "" if it was refused, else what went wrong.
    """
    for left in folder.iterdir():
        left.unlink()
    path = folder / "x.safetensors"
    path.write_bytes(content)
    try:
        with np.errstate(all="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            TARGETS[target][1](path)
    except Error:
        return ""
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:90]}"
    return None


def _give_up(*_: object) -> None:
    raise TimeoutError(f"longer than {PATIENCE_SECONDS:g} s of CPU time")


def fuzz(target: str, *, seed: int = 0, inputs: int | None = None, seconds: float = math.inf) -> Found:
    """Read a target's inputs up to a number or for a time."""
    found, end = Found(), time.monotonic() + seconds
    before = signal.signal(signal.SIGPROF, _give_up)
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
            for content in seeds(target):
                read(target, content, Path(place))  # imports modules, without a time limit
            for content in inputs_of(target, seed):
                if found.inputs == inputs or time.monotonic() > end:
                    break
                signal.setitimer(signal.ITIMER_PROF, PATIENCE_SECONDS)
                start = time.process_time()
                outcome = read(target, content, Path(place))
                signal.setitimer(signal.ITIMER_PROF, 0)
                found.slowest_seconds = max(found.slowest_seconds, time.process_time() - start)
                found.inputs += 1
                found.taken += outcome is None
                if outcome and len(content) < len(found.findings.get(outcome, content + b"x")):
                    found.findings[outcome] = content
    finally:
        signal.signal(signal.SIGPROF, before)
    return found


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="for each target (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the mutations (0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="save findings in this folder")
    args = parser.parse_args()
    print("| reads | inputs | accepted | refused | findings | slowest |\n|---|---|---|---|---|---|")
    findings = 0
    for target in args.targets or TARGETS:
        found = fuzz(target, seed=args.seed, seconds=args.seconds)
        refused = found.inputs - found.taken - len(found.findings)
        numbers = f"{found.inputs:,} | {found.taken:,} | {refused:,} | {len(found.findings)}"
        print(f"| {target} | {numbers} | {found.slowest_seconds * 1000:.0f} ms |", flush=True)
        for problem, content in found.findings.items():
            findings += 1
            print(f"{target}: {problem}", file=sys.stderr)
            if args.keep is not None:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"{target}-{findings}").write_bytes(content)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
