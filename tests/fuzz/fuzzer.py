"""Shows every parser files that are almost right, and looks for anything but an answer or an error of ours.

    python tests/fuzz/fuzzer.py [--seconds S] [--inputs N] [--seed N] [--keep DIR] [TARGET ...]

`corpus/TARGET/` holds small sound files, and what once broke something. Each input is one of them with a few changes
that know what it is made of: JSON also where it stands in a text, tensors with their shapes, dtypes and places in
agreement or not, and plain bytes. An input is a finding where reading it raises what is no error of ours, or takes
longer than `PATIENCE_SECONDS`; where we take a header that the safetensors library refuses; and where an undo file
changes a weight. `--keep` keeps findings. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
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
"""Of the processor, so that a busy machine is no reason to fail."""

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, -(2**63), 0.5, -0.0, 1e308,
    math.inf, math.nan, "", "a", "\0", "\ud800", "../x", "/etc/passwd", "x" * 300, "é😀", "\x1b[2J", [], {}, [[]],
    [None], [0], [1, 2, 3], {"a": 1}, {"format": "float8_e4m3fn"}, "F32", "F8_E4M3", "U8", "BF16", "F4", "nvfp4",
    "int8_tensorwise", ["1", 0], [2**40, 0],
]  # fmt: skip
PIECES = [b"\0" * 8, b"}", b"[[", b'"', b"1e999", b"\xff\xff", b"\\ud800", b"-", b"9" * 30, b"null", b"NaN", b"="]
DEPTHS = (3, 100, 995, 5000)

Random = random.Random
Change = Callable[[Random, bytes], bytes]


def changed_value(rng: Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with a node replaced, removed, added or moved."""
    if rng.random() < 0.12 or depth > 6:
        return copy.deepcopy(rng.choice(NASTY))
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        what = rng.randrange(8)
        if what == 0:
            return {name: one for name, one in value.items() if name != key}
        if what == 1:
            return {**value, str(rng.choice(NASTY)): copy.deepcopy(rng.choice(NASTY))}
        if what == 2:
            return {(name + rng.choice([".x", "\0", " "]) if name == key else name): one for name, one in value.items()}
        return {**value, key: changed_value(rng, value[key], depth + 1)}
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        what = rng.randrange(5)
        if what == 0:
            return value[:place] + value[place + 1 :]
        if what == 1:
            return [*value[:place], copy.deepcopy(rng.choice(NASTY)), *value[place:]]
        return [*value[:place], changed_value(rng, value[place], depth + 1), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool):
        return rng.choice([value + 1, value - 1, -value, value * 2, value ^ (1 << rng.randrange(64)), float(value)])
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return changed_json(rng, value.encode()).decode()
        place = rng.randrange(len(value) + 1)
        return rng.choice([value[:place], value[place:], value * 2, value[:place] + "\x1b" + value[place:]])
    return copy.deepcopy(rng.choice(NASTY))


def changed_json(rng: Random, content: bytes) -> bytes:
    """A JSON text with a few changed nodes, or none but brackets."""
    value = json.loads(content)
    if rng.random() < 0.03:
        return (rng.choice(["[", '{"a":']) * rng.choice(DEPTHS)).encode()
    for _ in range(rng.randrange(1, 4)):
        value = changed_value(rng, value)
    return json.dumps(value).encode()


def changed_bytes(rng: Random, content: bytes) -> bytes:
    """Bytes with a few flipped, cut, doubled or put in."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(content) + 1)
        before, after = content[:place], content[place:]
        match rng.randrange(6):
            case 0:
                content = before + bytes([rng.randrange(256)]) + after[1:]
            case 1:
                content = before + after[rng.choice((1, 2, 8, 64)) :]
            case 2:
                content = before + rng.choice(PIECES) + after
            case 3:
                content = before + after[: rng.choice((1, 4, 64))] + after
            case 4:
                content = before or after
            case _:
                content = content[:-1] + rng.choice(PIECES)
    return content


def changed_text(rng: Random, content: bytes) -> bytes:
    """Lines of TOML with a changed value, a line more or less, or changed bytes."""
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    key = lines[place].partition("=")[0].strip()
    value = rng.choice(NASTY)
    match rng.randrange(5):
        case 0:
            return changed_bytes(rng, content)
        case 1:
            lines[place] = rng.choice(["[x]", "[]", "[[convert]]", "[convert.x]", "[comfyui]", "[apply]"])
        case 2:
            lines.append(rng.choice([f"{'a.' * rng.choice(DEPTHS)}b = 1", f"k = {'[' * rng.choice(DEPTHS)}"]))
        case 3:
            lines.insert(place, lines[place])
        case _:
            lines[place] = f"{key} = {'nan' if value is None else json.dumps(value)}"
    return "\n".join(lines).encode("utf-8", "replace")


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's fields and the data of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def joined(fields: Any, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def changed_tensors(rng: Random, content: bytes) -> bytes:
    """A sound file with tensors of other shapes, dtypes, names or contents, and with other metadata."""
    fields, data = parts(content)
    metadata = fields.pop("__metadata__", {})
    tensors = [(name, one["dtype"], one["shape"], data[slice(*one["data_offsets"])]) for name, one in fields.items()]
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(tensors))
        name, dtype, shape, raw = tensors[place]
        match rng.randrange(7):
            case 0:
                dtype = rng.choice(list(DTYPE_BITS))
            case 1:
                shape = rng.choice([[], [1], [0], [1, 1], shape[::-1], [*shape, 1], [3, 5], [64], [1] * 32, [2**40, 0]])
            case 2:
                pattern = rng.choice([b"\0", b"\xff", np.float32(math.nan).tobytes(), np.float32(-1).tobytes()])
                raw = (pattern * (len(raw) + 1))[: len(raw)]
            case 3 if raw[:1] == b"{":
                raw = changed_json(rng, raw) if rng.random() < 0.8 else changed_bytes(rng, raw)
                shape = [len(raw)]
            case 4:
                name = rng.choice(["model.diffusion_model.", "", "\0", "é", "a" * 200]) + name
            case 5:
                other = rng.choice(tensors)
                base, _, ending = other[0].rpartition(".")
                name = f"{name.rpartition('.')[0] or base}.{ending}"
            case _ if metadata:
                key = rng.choice(list(metadata))
                metadata = {**metadata, key: str(changed_value(rng, metadata[key]))}
        nbytes = min(math.prod(shape), 1 << 16) * DTYPE_BITS[dtype] // 8
        tensors[place] = (name, dtype, shape, (raw + bytes(nbytes))[:nbytes])
    fields, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, dtype, shape, raw in tensors:
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    return joined(fields, b"".join(raw for *_, raw in tensors))


def changed_file(rng: Random, content: bytes) -> bytes:
    """A safetensors file with changed tensors, a changed header, a wrong length, or changed bytes."""
    chance = rng.random()
    if chance < 0.7:
        return changed_tensors(rng, content)
    if chance < 0.9:
        fields, data = parts(content)
        return joined(changed_json(rng, json.dumps(fields).encode()), data)
    if chance < 0.93:
        length = rng.choice([0, 1, 7, len(content), len(content) - 8, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + content[8:]
    return changed_bytes(rng, content)


# --- what reads them


def reads_header(path: Path) -> None:
    content = path.read_bytes()
    length = header_length(content[:8], len(content), path)
    parse_header(content[8 : 8 + length], len(content), path)
    safetensors.deserialize(content)  # what we take, others take


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
    words = ["--config", str(path)]
    command = cli.command_of(words)
    with contextlib.suppress(SystemExit):  # argparse's own refusal
        config.parse(cli.build_parser(command), words, command, list(cli.COMMANDS))


def _node_type(outputs: str, **inputs: str) -> workflow.NodeType:
    return workflow.NodeType.read(
        {"input": {"required": {name: [kind] for name, kind in inputs.items()}}, "output": outputs.split()}
    )


NODE_TYPES = {
    "UNETLoader": _node_type("MODEL", unet_name="COMBO"),
    "CLIPTextEncode": _node_type("CONDITIONING", text="STRING", clip="CLIP"),
    "KSampler": _node_type("LATENT", model="MODEL", positive="CONDITIONING", latent_image="LATENT", seed="INT"),
    "EmptyLatentImage": _node_type("LATENT", width="INT"),
    "CLIPLoader": _node_type("CLIP"),
    "SaveImage": _node_type("", images="IMAGE"),
    workflow.RECORD: _node_type("MODEL ACTIVATION_STATS", model="MODEL"),
    workflow.SAVE: _node_type("ACTIVATION_STATS", stats="ACTIVATION_STATS", latent="LATENT"),
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
"""Of the statistics and adapters in the corpus."""


class _Recorded:
    """What a session asks of a recording."""

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
    "header": (changed_file, reads_header),
    "checkpoint": (changed_file, reads_checkpoint),
    "index": (changed_json, reads_index),
    "configuration": (changed_text, reads_configuration),
    "workflow": (changed_json, reads_workflow),
    "undo": (changed_json, reads_undo),
    "statistics": (changed_file, reads_statistics),
    "session": (changed_file, reads_session),
    "lora": (changed_file, reads_lora),
}
"""How its files are changed, and what reads them."""


@dataclass
class Found:
    """What came out of one target's inputs.

    Attributes:
        inputs: how many there were.
        taken: how many were read without an error.
        slowest_seconds: the longest time that one took.
        findings: what went wrong, in a line, with the shortest input that does it.
    """

    inputs: int = 0
    taken: int = 0
    slowest_seconds: float = 0.0
    findings: dict[str, bytes] = field(default_factory=dict)


def seeds(target: str) -> list[bytes]:
    """A target's corpus."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def inputs_of(target: str, seed: int) -> Iterator[bytes]:
    """Changed files of a target's corpus, without end."""
    rng, change, known = random.Random(f"{target} {seed}"), TARGETS[target][0], seeds(target)
    while True:
        content = rng.choice(known)
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no sound file
            yield changed_bytes(rng, content) if rng.random() < 0.1 else change(rng, content)


def read(target: str, content: bytes, folder: Path) -> str | None:
    """Read one input in an empty folder.

    Returns:
        None where it was taken, "" where it was refused, else what went wrong.
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
    raise TimeoutError(f"longer than {PATIENCE_SECONDS:g} s of computing")


def fuzz(target: str, *, seed: int = 0, inputs: int | None = None, seconds: float = math.inf) -> Found:
    """Read a target's inputs, so many or for so long."""
    found, end = Found(), time.monotonic() + seconds
    memory = "/dev/shm"
    before = signal.signal(signal.SIGPROF, _give_up)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGPROF, before)
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None))
        for content in seeds(target):
            read(target, content, Path(place))  # imports what it needs, for as long as that takes
        for content in inputs_of(target, seed):
            if found.inputs == inputs or time.monotonic() > end:
                return found
            signal.setitimer(signal.ITIMER_PROF, PATIENCE_SECONDS)
            start = time.process_time()
            outcome = read(target, content, Path(place))
            signal.setitimer(signal.ITIMER_PROF, 0)
            found.slowest_seconds = max(found.slowest_seconds, time.process_time() - start)
            found.inputs += 1
            found.taken += outcome is None
            if outcome and len(content) < len(found.findings.get(outcome, content + b"x")):
                found.findings[outcome] = content
    return found


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="for each target (10)")
    parser.add_argument("--inputs", type=int, metavar="N", help="at most, for each target")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the changes (0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write findings into this folder")
    args = parser.parse_args()
    print("| reads | inputs | taken | refused | findings | slowest |\n|---|---|---|---|---|---|")
    failed = False
    for target in args.targets or TARGETS:
        found = fuzz(target, seed=args.seed, inputs=args.inputs, seconds=args.seconds)
        refused = found.inputs - found.taken - len(found.findings)
        numbers = f"{found.inputs:,} | {found.taken:,} | {refused:,} | {len(found.findings)}"
        print(f"| {target} | {numbers} | {found.slowest_seconds * 1000:.0f} ms |", flush=True)
        for number, (problem, content) in enumerate(found.findings.items()):
            failed = True
            print(f"{target}: {problem}", file=sys.stderr)
            if args.keep is not None:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"{target}-{number}").write_bytes(content)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
