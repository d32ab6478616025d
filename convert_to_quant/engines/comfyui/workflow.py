"""A user's workflow as a graph: where its models, samplers, prompts and seeds are, and where recorders go in.

    Load Diffusion Model ─→ LoRA ─→ Record Activations ─→ KSampler ─LATENT→ Save Activation Stats
                                            └────────────── stats ───────────────↗

A workflow in ComfyUI's API format is a JSON object: node id -> {"class_type": ..., "inputs": {name: value or link}}, a
link being [node id, number of the output]. What a node takes and gives is not in it. The server says so
(`/object_info`), so samplers, model loaders and text encoders are found by the types of their links and not by name:

    sampler    gives a LATENT, and takes a GUIDER, or a MODEL with a CONDITIONING. Where it passes its MODEL on, too, it
               is told from nodes that only prepare sampling by its seed.
    model      what a sampler, or the guider before it, takes as MODEL. Its loaders are where MODEL links begin.
    prompt     a text of the node where a sampler's CONDITIONING begins, or that its way leads through. Texts, inputs
               and outputs that call themselves negative are never followed.
    seed       an integer that ComfyUI offers to change after each run, of a sampler or of the NOISE that it takes.

Each distinct model gets one recorder. A recorder sees every sampler that takes this very link, so it is saved behind
the last of them; where several are last, behind each. Everything that no saved LATENT depends on is left out: images
are neither decoded nor written. Nothing else changes. Our own nodes, where the workflow has them already, are taken out
first.

Limits. Models of other types (WANVIDEOMODEL, ...) are not ComfyUI's MODEL and cannot be recorded. Samplers that give
only an IMAGE, or take everything through a pipe of a custom type, are not found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ...checkpoint.positioned import is_plain_on_windows
from ...errors import CalibrationError, StrPath
from ...untrusted import parse_json

RECORD = "ConvertToQuantRecordActivations"
SAVE = "ConvertToQuantSaveActivationStats"
OURS = "ConvertToQuant"
"""What the names of our nodes begin with."""

MODEL, LATENT, GUIDER, CONDITIONING, NOISE = "MODEL", "LATENT", "GUIDER", "CONDITIONING", "NOISE"
ANY = "*"
_WILDCARDS = (ANY, "COMFY_MATCHTYPE_V3")
_NEGATIVE = re.compile(r"negative|uncond|empty|-$", re.IGNORECASE)
_MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin|gguf)$", re.IGNORECASE)
_SEED_NAMES = ("seed", "noise_seed")
_LONGEST_NAME = 100

Nodes = dict[str, dict[str, Any]]
"""A workflow: node id -> class_type, inputs, and what else stands there."""


class Link(NamedTuple):
    """An output of a node."""

    node: str
    slot: int


class Place(NamedTuple):
    """An input of a node."""

    node: str
    input: str


class Input(NamedTuple):
    """What a node says of one of its inputs.

    Attributes:
        kind: its type.
        options: such as "multiline", "max".
        choices: what it can be, where it is a list.
    """

    kind: str
    options: Mapping[str, Any]
    choices: Sequence[Any] | None = None


@dataclass(frozen=True)
class NodeType:
    """What a class of nodes takes and gives.

    Attributes:
        inputs: by name, required ones first.
        outputs: types.
        output_names: one per output.
    """

    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]

    @staticmethod
    def read(info: Mapping[str, Any]) -> NodeType:
        """From an entry of ComfyUI's `/object_info`."""
        inputs = {}
        for group in ("required", "optional"):
            for name, said in (info["input"].get(group) or {}).items():
                options = said[1] if len(said) > 1 and isinstance(said[1], dict) else {}
                kind = said[0] if said else ANY
                choices = kind if isinstance(kind, list) else options.get("options")
                inputs[name] = Input(_kind(kind), options, choices if isinstance(choices, list) else None)
        outputs = tuple(_kind(kind) for kind in info["output"])
        return NodeType(inputs, outputs, tuple(map(str, info.get("output_name") or outputs)))


UNKNOWN = NodeType({}, (), ())
"""A class that the server does not have: its links may be anything."""


def _kind(said: Any) -> str:
    """A type's name; lists are choices."""
    kind = said if isinstance(said, str) else "COMBO"
    return ANY if kind in _WILDCARDS else kind


@dataclass(frozen=True)
class Model:
    """One model of the workflow, which gets a statistics file of its own.

    Attributes:
        name: of the file it is loaded from, fit for a file name; no two models have the same.
        loaders: the nodes it comes from; several where models are merged.
        samplers: all that sample with it.
        saves: our nodes that save it, each behind a sampler that no other of them follows. It has a recorder for each
            way that it takes to samplers (with a LoRA and without, ...).
    """

    name: str
    loaders: tuple[str, ...]
    samplers: tuple[str, ...]
    saves: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to queue.

    Attributes:
        nodes: the workflow with our nodes in it.
        models: what is recorded.
        texts: inputs that hold the prompt.
        seeds: inputs that hold the seed.
    """

    nodes: Nodes
    models: tuple[Model, ...]
    texts: tuple[Place, ...]
    seeds: tuple[Place, ...]

    def queued(self, session: str, folder: str, text: str | None = None, seed: int | None = None) -> Nodes:
        """One run, as ComfyUI takes it.

        Args:
            session: a text that no other session has. It goes to each recorder as an input that the node does not know:
                ComfyUI takes it into the key of its cache, and passes it on to nobody. So a recorder goes on from run
                to run of this session, and never from what was recorded before it.
            folder: where the server writes statistics, in its output folder.
            text: the prompt; None leaves the workflow's own.
            seed: None leaves the workflow's own.
        """
        nodes = deepcopy(self.nodes)
        for places, value in ((self.texts, text), (self.seeds, seed)):
            for place in places if value is not None else ():
                nodes[place.node]["inputs"][place.input] = value
        for node in nodes.values():
            if node["class_type"] == RECORD:
                node["inputs"]["recording"] = session
        for model in self.models:
            for save in model.saves:
                nodes[save]["inputs"]["filename_prefix"] = f"{folder}/{model.name}"
        wanted = _ancestors(nodes, [save for model in self.models for save in model.saves])
        return {name: node for name, node in nodes.items() if name in wanted}

    def left_out(self) -> tuple[str, ...]:
        """Nodes of the workflow that are not queued."""
        kept = self.queued("", "")
        return tuple(name for name in self.nodes if name not in kept)

    def missing(self, types: Mapping[str, NodeType]) -> list[tuple[Place, str]]:
        """Inputs that name a file of a model which the server does not list for them, and the file.

        Args:
            types: of the classes of nodes.
        """
        found = []
        for name, node in self.nodes.items():
            declared = types.get(node["class_type"], UNKNOWN).inputs
            for key, value in node["inputs"].items():
                choices = declared[key].choices if key in declared else None
                named = isinstance(value, str) and _MODEL_FILE.search(value)
                if named and choices is not None and value not in choices:
                    found.append((Place(name, key), value))
        return found


def parse(text: str, path: StrPath | None = None) -> Nodes:
    """Read a workflow in API format.

    Args:
        text: JSON.
        path: the file it comes from, for messages.

    Raises:
        CalibrationError: it is something else.
    """

    def wrong(problem: str, node: str | None = None) -> CalibrationError:
        return CalibrationError(problem, path=path, tensor=node, hint="in ComfyUI: File > Export (API)")

    found = parse_json(text, wrong)
    if isinstance(found, dict) and isinstance(found.get("nodes"), list):
        raise wrong("a workflow in the format of ComfyUI's editor, which a server does not run")
    if not isinstance(found, dict) or not found:
        raise wrong("not a workflow: a JSON object of nodes was expected")
    for name, node in found.items():
        right = isinstance(node, dict) and isinstance(node.get("class_type"), str)
        if not right or not isinstance(node.get("inputs"), dict):
            raise wrong("not a node: class_type and inputs were expected", shown(f"node {name}"))
        for key, link in _links(node):
            if link.node not in found:
                problem = shown(f"its input {key} is linked to node {link.node}, which is not there")
                raise wrong(problem, title(found, name))
    return found


def as_link(value: Any) -> Link | None:
    """A link, where a value is one; ComfyUI's own rule, but for numbers that no output has."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    is_link = is_link and isinstance(value[1], (int, float)) and 0 <= value[1] < math.inf
    return Link(value[0], int(value[1])) if is_link else None


def _links(node: Mapping[str, Any]) -> Iterator[tuple[str, Link]]:
    """Inputs of a node that are links."""
    return ((key, link) for key, value in node["inputs"].items() if (link := as_link(value)) is not None)


def title(nodes: Nodes, name: str) -> str:
    """A node, as messages call it."""
    if name not in nodes:
        return shown(f"node {name}")
    meta = nodes[name].get("_meta")
    said = meta.get("title") if isinstance(meta, dict) else None
    return shown(f"node {name} ({said if isinstance(said, str) and said else nodes[name]['class_type']})")


def shown(text: object, most: int = 300) -> str:
    r"""Somebody else's text in one line, short, and without what a terminal would obey instead of show.

    >>> shown("out of\n memory\x1b[2J"), shown("abcdef", 3)
    ('out of memory\\x1b[2J', 'abc...')
    """
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(str(text).split()))
    return line if len(line) <= most else f"{line[:most]}..."


def classes(nodes: Nodes) -> list[str]:
    """The classes of nodes that a plan asks the server about: the workflow's and ours."""
    return sorted({node["class_type"] for node in nodes.values()} | {RECORD, SAVE})


def plan(nodes: Nodes, types: Mapping[str, NodeType], path: StrPath | None = None) -> Plan:
    """Find what to record and what to vary, and put our nodes in.

    Args:
        nodes: a workflow; it stays as it is.
        types: of all classes that the server has among `classes(nodes)`.
        path: the file it comes from, for messages.

    Raises:
        CalibrationError: there is no sampler, or it needs nodes that the server does not have.
    """
    graph = _Graph(_without_ours(nodes), types)
    samplers = [name for name in graph.nodes if graph.is_sampler(name)]
    uses: dict[Link, list[tuple[str, Place]]] = {}
    for sampler in samplers:
        for place, link in graph.models(sampler):
            uses.setdefault(link, []).append((sampler, place))
    if not uses:
        unknown = sorted({node["class_type"] for node in graph.nodes.values()} - types.keys())
        problem = "no sampler: no node takes a MODEL with a CONDITIONING, or a GUIDER, and gives a LATENT"
        hint = shown(f"the server does not know {', '.join(unknown)}: install these nodes there")
        raise CalibrationError(problem, path=path, hint=hint if unknown else None)
    done = deepcopy(graph.nodes)
    users_of: dict[tuple[str, ...], list[str]] = {}
    saves_of: dict[tuple[str, ...], list[str]] = {}
    for link, users in uses.items():
        loaders = graph.loaders(link)
        users_of.setdefault(loaders, []).extend(sampler for sampler, _ in users)
        saves_of.setdefault(loaders, []).extend(_insert(done, graph, link, users))
    made = Plan(
        done,
        tuple(
            Model(name, loaders, tuple(dict.fromkeys(users_of[loaders])), tuple(saves_of[loaders]))
            for loaders, name in _names(graph, [*saves_of]).items()
        ),
        tuple(dict.fromkeys(place for sampler in samplers for place in graph.texts(sampler))),
        tuple(dict.fromkeys(place for sampler in samplers for place in graph.seeds(sampler))),
    )
    for name, node in made.queued("", "").items():
        if node["class_type"] not in types:
            problem = f"the server has no node of type {shown(node['class_type'])}"
            hint = "install the custom nodes that the workflow needs, in the ComfyUI that runs there"
            raise CalibrationError(problem, path=path, tensor=title(made.nodes, name), hint=hint)
    return made


class _Graph:
    """A workflow and the types of its nodes."""

    def __init__(self, nodes: Nodes, types: Mapping[str, NodeType]) -> None:
        self.nodes, self._types = nodes, types

    def type(self, name: str) -> NodeType:
        """Of a node."""
        return self._types.get(self.nodes[name]["class_type"], UNKNOWN)

    def links(self, name: str, kind: str) -> Iterator[tuple[str, Link]]:
        """Inputs of a node that are linked to something of a type; in nodes that pass anything on, all that may be."""
        outputs = self.type(name).outputs
        fitting = {kind, ANY} if ANY in outputs or not outputs else {kind}
        for key, link in _links(self.nodes[name]):
            if not fitting.isdisjoint(self._kind(name, key, link).split(",")):
                yield key, link

    def _kind(self, name: str, key: str, link: Link) -> str:
        """What goes through a link: as its end says or, where that takes anything, as its beginning says."""
        declared = self.type(name).inputs.get(key)
        if declared is not None and declared.kind != ANY:
            return declared.kind
        outputs = self.type(link.node).outputs
        return outputs[link.slot] if link.slot < len(outputs) else ANY

    def is_sampler(self, name: str) -> bool:
        """Whether a node samples."""
        kind = self.type(name)
        if LATENT not in kind.outputs:
            return False
        if any(self.links(name, GUIDER)):
            return True
        takes = any(self.links(name, MODEL)) and any(self.links(name, CONDITIONING))
        return takes and (MODEL not in kind.outputs or any(self._own_seeds(name)))

    def upstream(self, start: str, kind: str) -> list[str]:
        """A node, and all that lie before it by links of a type, the nearest first."""
        return _reached([start], lambda name: self.links(name, kind))

    def models(self, sampler: str) -> Iterator[tuple[Place, Link]]:
        """Where a sampler and its guiders take models. One for the negative prompt alone is not sampled with."""
        for name in self.upstream(sampler, GUIDER):
            for key, link in self.links(name, MODEL):
                if not _NEGATIVE.search(key):
                    yield Place(name, key), link

    def loaders(self, link: Link) -> tuple[str, ...]:
        """Where a MODEL comes from; in a circle, which the server refuses, anywhere."""
        before = self.upstream(link.node, MODEL)
        return tuple(name for name in before if not any(self.links(name, MODEL))) or (link.node,)

    def texts(self, sampler: str) -> Iterator[Place]:
        """Where a sampler's prompt stands. A text that another node makes is replaced where the encoder takes it."""
        ways = [link for name in self.upstream(sampler, GUIDER) for link in self._positive(name)]
        for link in ways:
            names = self.type(link.node).output_names
            if link.slot < len(names) and _NEGATIVE.search(names[link.slot]):
                continue
            onwards = list(self._positive(link.node))
            ways += [other for other in onwards if other not in ways]
            for key, said in self.type(link.node).inputs.items():
                prompt = said.options.get("dynamicPrompts") or (said.options.get("multiline") and not onwards)
                known = said.kind == "STRING" and key in self.nodes[link.node]["inputs"]
                if prompt and known and not _NEGATIVE.search(key):
                    yield Place(link.node, key)

    def _positive(self, name: str) -> Iterator[Link]:
        return (link for key, link in self.links(name, CONDITIONING) if not _NEGATIVE.search(key))

    def seeds(self, sampler: str) -> Iterator[Place]:
        """Where a sampler's seed stands."""
        for name in self.upstream(sampler, NOISE):
            yield from self._own_seeds(name)

    def _own_seeds(self, name: str) -> Iterator[Place]:
        for key, said in self.type(name).inputs.items():
            seed = key in _SEED_NAMES or said.options.get("control_after_generate")
            if seed and said.kind == "INT" and key in self.nodes[name]["inputs"]:
                yield Place(name, key)


def _without_ours(nodes: Nodes) -> Nodes:
    """A workflow without our nodes: what followed a recorder follows what it recorded."""

    def is_ours(name: str) -> bool:
        return bool(nodes[name]["class_type"].startswith(OURS))

    def before(link: Link) -> Link:
        for _ in nodes:  # recorders in a circle, which the server refuses, are left alone
            earlier = as_link(nodes[link.node]["inputs"].get("model"))
            if nodes[link.node]["class_type"] != RECORD or earlier is None:
                break
            link = earlier
        return link

    rest: Nodes = {}
    for name, node in nodes.items():
        if is_ours(name):
            continue
        rest[name] = {**node, "inputs": dict(node["inputs"])}
        for key, link in _links(node):
            source = before(link)
            if is_ours(source.node):  # a text or an image that one of ours made
                del rest[name]["inputs"][key]
            else:
                rest[name]["inputs"][key] = [*source]
    return rest


def _insert(nodes: Nodes, graph: _Graph, link: Link, users: list[tuple[str, Place]]) -> list[str]:
    """Put a recorder behind a MODEL, and what saves it, which is told, behind its samplers."""
    record = _new(nodes, "record", RECORD, "Record Activations", {"model": [link.node, link.slot]})
    for _, place in users:
        nodes[place.node]["inputs"][place.input] = [record, 0]
    samplers = tuple(dict.fromkeys(sampler for sampler, _ in users))
    before = {name for sampler in samplers for name in _ancestors(graph.nodes, [sampler]) - {sampler}}
    last = [sampler for sampler in samplers if sampler not in before]
    latents = [[sampler, graph.type(sampler).outputs.index(LATENT)] for sampler in last or samplers]
    return [
        _new(nodes, "save", SAVE, "Save Activation Stats", {"stats": [record, 1], "latent": latent})
        for latent in latents
    ]


def _new(nodes: Nodes, what: str, kind: str, said: str, inputs: dict[str, Any]) -> str:
    """Add a node of ours; its id."""
    name = next(name for n in count(1) if (name := f"convert_to_quant_{what}_{n}") not in nodes)
    nodes[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": said}}
    return name


def _reached(starts: Sequence[str], links: Callable[[str], Iterable[tuple[str, Link]]]) -> list[str]:
    """Nodes, and all that lie before them by some of their links, the nearest first."""
    found = list(starts)
    for name in found:
        before = dict.fromkeys(link.node for _, link in links(name))
        found += [node for node in before if node not in found]
    return found


def _ancestors(nodes: Nodes, starts: Sequence[str]) -> set[str]:
    """Nodes, and all that they depend on."""
    return set(_reached(starts, lambda name: _links(nodes[name])))


def _names(graph: _Graph, several: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A name for each model: its first loader's file; where two have the same, also the loader's id."""
    stems = {loaders: _file_stem(graph, loaders[0]) for loaders in several}
    names: dict[tuple[str, ...], str] = {}
    for loaders, stem in stems.items():
        twins = [other for other in several if stems[other].lower() == stem.lower()]
        name = stem if len(twins) == 1 else f"{stem}_{plain(loaders[0])}"
        while name.lower() in {other.lower() for other in names.values()}:
            name += "_"
        names[loaders] = name
    return names


def _file_stem(graph: _Graph, loader: str) -> str:
    """The name of the file that a loader loads, without its folders and its ending; else what the node is called."""
    before = _ancestors(graph.nodes, [loader])  # a MODEL out of a pipe has its file further up
    for name in (loader, *(name for name in graph.nodes if name in before)):
        for value in graph.nodes[name]["inputs"].values():
            if isinstance(value, str) and _MODEL_FILE.search(value) and MODEL in graph.type(name).outputs:
                return plain(_MODEL_FILE.sub("", PurePosixPath(value.replace("\\", "/")).name))
    return plain(graph.nodes[loader]["class_type"])


def plain(text: str) -> str:
    r"""A text as part of a file name, on any system: letters, digits, dots, dashes and underscores.

    >>> plain("../Wan 2.2: high"), plain("..."), plain("a\x00b"), plain("aux")
    ('Wan_2.2_high', 'model', 'a_b', 'model_aux')
    """
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", text)
    name = re.sub(r"\.{2,}", ".", words).strip("._-")[:_LONGEST_NAME].strip("._-") or "model"
    return name if is_plain_on_windows(name) else f"model_{name}"
