"""A user's workflow as a graph: finds its models, samplers, prompts and seeds, and inserts recorders.

    Load Diffusion Model ─→ LoRA ─→ Record Activations ─→ KSampler ─LATENT→ Save Activation Stats
                                            └────────────── stats ───────────────↗

A workflow in ComfyUI's API format is a JSON object: node id -> {"class_type": ..., "inputs": {name: value or link}}. A
link is [node id, output index]. The types of inputs and outputs come from the server (`/object_info`). Samplers, model
loaders and text encoders are found by the types of their links, not by name:

    sampler    outputs a LATENT; has a GUIDER input, or a MODEL and a CONDITIONING input. If it also outputs its MODEL,
               it must have a seed: other nodes only prepare sampling.
    model      the MODEL input of a sampler or of its guider. Its loaders are where the MODEL links begin.
    prompt     a text input of a node on the way of a sampler's CONDITIONING. Texts, inputs and outputs with a name like
               "negative" are not followed.
    seed       an integer input that ComfyUI can change after each run, of a sampler or of its NOISE input.

Each distinct model gets one recorder. It records every sampler on its MODEL link, so it is saved after the last of
them, or after each if several are last. Nodes that no saved LATENT depends on are left out: images are neither decoded
nor saved. Our own nodes in the workflow are removed first. Nothing else changes.

Limits. Models of other types (WANVIDEOMODEL, ...) are not ComfyUI's MODEL and cannot be recorded. Samplers that output
only an IMAGE, or have a single input of a custom pipe type, are not found.
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
"""Prefix of our node classes."""

MODEL, LATENT, GUIDER, CONDITIONING, NOISE = "MODEL", "LATENT", "GUIDER", "CONDITIONING", "NOISE"
ANY = "*"
_WILDCARDS = (ANY, "COMFY_MATCHTYPE_V3")
_NEGATIVE = re.compile(r"negative|uncond|empty|-$", re.IGNORECASE)
_MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin|gguf)$", re.IGNORECASE)
_SEED_NAMES = ("seed", "noise_seed")
_LONGEST_NAME = 100

Nodes = dict[str, dict[str, Any]]
"""A workflow: node id -> class_type, inputs, ..."""


class Link(NamedTuple):
    """An output of a node."""

    node: str
    slot: int


class Place(NamedTuple):
    """An input of a node."""

    node: str
    input: str


class Input(NamedTuple):
    """The declaration of an input.

    Attributes:
        kind: its type.
        options: such as "multiline", "max".
        choices: the values of a list.
    """

    kind: str
    options: Mapping[str, Any]
    choices: Sequence[Any] | None = None


@dataclass(frozen=True)
class NodeType:
    """Inputs and outputs of a node class.

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
            for name, spec in (info["input"].get(group) or {}).items():
                options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
                kind = spec[0] if spec else ANY
                choices = kind if isinstance(kind, list) else options.get("options")
                inputs[name] = Input(_kind(kind), options, choices if isinstance(choices, list) else None)
        outputs = tuple(_kind(kind) for kind in info["output"])
        return NodeType(inputs, outputs, tuple(map(str, info.get("output_name") or outputs)))


UNKNOWN = NodeType({}, (), ())
"""A class that the server does not have. Its links may have any type."""


def _kind(declared: Any) -> str:
    """Name of a type; a list is a COMBO."""
    kind = declared if isinstance(declared, str) else "COMBO"
    return ANY if kind in _WILDCARDS else kind


@dataclass(frozen=True)
class Model:
    """One model of the workflow, which gets its own statistics file.

    Attributes:
        name: of the file it is loaded from, valid as a file name and unique.
        loaders: the nodes that load it; several if models are merged.
        samplers: all that sample with it.
        saves: our nodes that save its recorders. It has one recorder per MODEL link (with a LoRA, without, ...).
    """

    name: str
    loaders: tuple[str, ...]
    samplers: tuple[str, ...]
    saves: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A workflow with recorders.

    Attributes:
        nodes: the workflow with our nodes.
        models: to record.
        texts: inputs for the prompt.
        seeds: inputs for the seed.
    """

    nodes: Nodes
    models: tuple[Model, ...]
    texts: tuple[Place, ...]
    seeds: tuple[Place, ...]

    def queued(self, session: str, folder: str, text: str | None = None, seed: int | None = None) -> Nodes:
        """The nodes of one run.

        Args:
            session: unique text. It is set on each recorder as an undeclared input, which ComfyUI includes in its cache
                key but does not pass to the node. So a recorder accumulates over the runs of one session only.
            folder: for statistics, in the server's output folder.
            text: the prompt; None keeps the workflow's own.
            seed: None keeps the workflow's own.
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
        """Nodes that are not queued."""
        kept = self.queued("", "")
        return tuple(name for name in self.nodes if name not in kept)

    def missing(self, types: Mapping[str, NodeType]) -> list[str]:
        """Inputs of queued nodes, with the model files that they name but the server does not list."""
        found = []
        for name, node in self.queued("", "").items():
            declared = types.get(node["class_type"], UNKNOWN).inputs
            for key, value in node["inputs"].items():
                choices = declared[key].choices if key in declared else None
                named = isinstance(value, str) and _MODEL_FILE.search(value)
                if named and choices is not None and value not in choices:
                    found.append(f"{self.listed([Place(name, key)])}: {shown(value)}")
        return found

    def listed(self, found: Iterable[str | Place]) -> str:
        """Nodes, or inputs of nodes, for people."""
        return ", ".join(
            title(self.nodes, one) if isinstance(one, str) else f"{title(self.nodes, one.node)} {shown(one.input)}"
            for one in found
        ) or "none"  # fmt: skip


def parse(text: str, path: StrPath | None = None) -> Nodes:
    """Read a workflow in API format.

    Args:
        text: JSON.
        path: its file, for messages.
    """

    def wrong(problem: str, node: str | None = None) -> CalibrationError:
        return CalibrationError(problem, path=path, tensor=node, hint="in ComfyUI, use File > Export (API)")

    found = parse_json(text, wrong)
    if isinstance(found, dict) and isinstance(found.get("nodes"), list):
        raise wrong("this is the format of ComfyUI's editor, which a server cannot run")
    if not isinstance(found, dict) or not found:
        raise wrong("not a workflow: expected a JSON object of nodes")
    for name, node in found.items():
        right = isinstance(node, dict) and isinstance(node.get("class_type"), str)
        if not right or not isinstance(node.get("inputs"), dict):
            raise wrong("not a node: expected class_type and inputs", shown(f"node {name}"))
        for key, link in _links(node):
            if link.node not in found:
                problem = shown(f"its input {key} is linked to node {link.node}, which is missing")
                raise wrong(problem, title(found, name))
    return found


def as_link(value: Any) -> Link | None:
    """A value as a link, if it is one: ComfyUI's rule, without impossible output indices."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    is_link = is_link and isinstance(value[1], (int, float)) and 0 <= value[1] < math.inf
    return Link(value[0], int(value[1])) if is_link else None


def _links(node: Mapping[str, Any]) -> Iterator[tuple[str, Link]]:
    """Inputs of a node that are links."""
    return ((key, link) for key, value in node["inputs"].items() if (link := as_link(value)) is not None)


def title(nodes: Nodes, name: str) -> str:
    """A node's id and title, for messages."""
    if name not in nodes:
        return shown(f"node {name}")
    meta = nodes[name].get("_meta")
    text = meta.get("title") if isinstance(meta, dict) else None
    return shown(f"node {name} ({text if isinstance(text, str) and text else nodes[name]['class_type']})")


def shown(text: object, most: int = 300) -> str:
    r"""Untrusted text on one line, shortened, with control characters escaped.

    >>> shown("out of\n memory\x1b[2J"), shown("abcdef", 3)
    ('out of memory\\x1b[2J', 'abc...')
    """
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(str(text).split()))
    return line if len(line) <= most else f"{line[:most]}..."


def classes(nodes: Nodes) -> list[str]:
    """Node classes that a plan needs from the server: the workflow's and ours."""
    return sorted({node["class_type"] for node in nodes.values()} | {RECORD, SAVE})


def plan(nodes: Nodes, types: Mapping[str, NodeType], path: StrPath | None = None) -> Plan:
    """Find models, prompts and seeds, and insert our nodes.

    Args:
        nodes: a workflow; it is not changed.
        types: of `classes(nodes)`, as far as the server has them.
        path: its file, for messages.

    Raises:
        CalibrationError: there is no sampler, or the server lacks nodes that it needs.
    """
    graph = _Graph(_without_ours(nodes), types)
    samplers = [name for name in graph.nodes if graph.is_sampler(name)]
    uses: dict[Link, list[tuple[str, Place]]] = {}
    for sampler in samplers:
        for place, link in graph.models(sampler):
            uses.setdefault(link, []).append((sampler, place))
    if not uses:
        unknown = sorted({node["class_type"] for node in graph.nodes.values()} - types.keys())
        problem = "no sampler: no node has MODEL and CONDITIONING inputs, or a GUIDER input, and a LATENT output"
        hint = shown(f"install the missing custom nodes on the server: {', '.join(unknown)}")
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
            hint = "install the custom nodes that the workflow needs on the server"
            raise CalibrationError(problem, path=path, tensor=title(made.nodes, name), hint=hint)
    return made


class _Graph:
    """A workflow and the types of its nodes."""

    def __init__(self, nodes: Nodes, types: Mapping[str, NodeType]) -> None:
        self.nodes, self._types = nodes, types

    def type(self, name: str) -> NodeType:
        """Type of a node."""
        return self._types.get(self.nodes[name]["class_type"], UNKNOWN)

    def links(self, name: str, kind: str) -> Iterator[tuple[str, Link]]:
        """Inputs of a node that are linked to a type; in nodes with outputs of any type, all that may have it."""
        outputs = self.type(name).outputs
        fitting = {kind, ANY} if ANY in outputs or not outputs else {kind}
        for key, link in _links(self.nodes[name]):
            if not fitting.isdisjoint(self._kind(name, key, link).split(",")):
                yield key, link

    def _kind(self, name: str, key: str, link: Link) -> str:
        """Type of a link: as declared by its input or, if that accepts any type, by its output."""
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
        """A node and its ancestors along links of a type, nearest first."""
        return _reached([start], lambda name: self.links(name, kind))

    def models(self, sampler: str) -> Iterator[tuple[Place, Link]]:
        """MODEL inputs of a sampler and its guiders, except for the negative prompt's own."""
        for name in self.upstream(sampler, GUIDER):
            for key, link in self.links(name, MODEL):
                if not _NEGATIVE.search(key):
                    yield Place(name, key), link

    def loaders(self, link: Link) -> tuple[str, ...]:
        """Nodes where a MODEL begins; any node of a cycle, which the server rejects."""
        before = self.upstream(link.node, MODEL)
        return tuple(name for name in before if not any(self.links(name, MODEL))) or (link.node,)

    def texts(self, sampler: str) -> Iterator[Place]:
        """Text inputs of a sampler's prompt. A text from another node is replaced at the encoder's input."""
        ways = [link for name in self.upstream(sampler, GUIDER) for link in self._positive(name)]
        for link in ways:
            names = self.type(link.node).output_names
            if link.slot < len(names) and _NEGATIVE.search(names[link.slot]):
                continue
            onwards = list(self._positive(link.node))
            ways += [other for other in onwards if other not in ways]
            for key, declared in self.type(link.node).inputs.items():
                prompt = declared.options.get("dynamicPrompts") or (declared.options.get("multiline") and not onwards)
                known = declared.kind == "STRING" and key in self.nodes[link.node]["inputs"]
                if prompt and known and not _NEGATIVE.search(key):
                    yield Place(link.node, key)

    def _positive(self, name: str) -> Iterator[Link]:
        return (link for key, link in self.links(name, CONDITIONING) if not _NEGATIVE.search(key))

    def seeds(self, sampler: str) -> Iterator[Place]:
        """Seed inputs of a sampler."""
        for name in self.upstream(sampler, NOISE):
            yield from self._own_seeds(name)

    def _own_seeds(self, name: str) -> Iterator[Place]:
        for key, declared in self.type(name).inputs.items():
            seed = key in _SEED_NAMES or declared.options.get("control_after_generate")
            if seed and declared.kind == "INT" and key in self.nodes[name]["inputs"]:
                yield Place(name, key)


def _without_ours(nodes: Nodes) -> Nodes:
    """A workflow without our nodes. Links from a recorder go to the recorder's own model."""

    def is_ours(name: str) -> bool:
        return bool(nodes[name]["class_type"].startswith(OURS))

    def before(link: Link) -> Link:
        for _ in nodes:  # bounded: recorders may form a cycle, which the server rejects
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
            if is_ours(source.node):  # a text or an image of one of our nodes
                del rest[name]["inputs"][key]
            else:
                rest[name]["inputs"][key] = [*source]
    return rest


def _insert(nodes: Nodes, graph: _Graph, link: Link, users: list[tuple[str, Place]]) -> list[str]:
    """Insert a recorder after a MODEL, and nodes that save it after its samplers; returns the latter."""
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


def _new(nodes: Nodes, what: str, kind: str, shown_title: str, inputs: dict[str, Any]) -> str:
    """Add one of our nodes; returns its id."""
    name = next(name for n in count(1) if (name := f"convert_to_quant_{what}_{n}") not in nodes)
    nodes[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": shown_title}}
    return name


def _reached(starts: Sequence[str], links: Callable[[str], Iterable[tuple[str, Link]]]) -> list[str]:
    """Nodes and their ancestors along some links, nearest first."""
    found = list(starts)
    for name in found:
        before = dict.fromkeys(link.node for _, link in links(name))
        found += [node for node in before if node not in found]
    return found


def _ancestors(nodes: Nodes, starts: Sequence[str]) -> set[str]:
    """Nodes and all nodes that they depend on."""
    return set(_reached(starts, lambda name: _links(nodes[name])))


def _names(graph: _Graph, several: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A unique name for each model: its first loader's file and, if another model has that name, the loader's id."""
    names: dict[tuple[str, ...], str] = {}
    for loaders in several:
        name = _file_stem(graph, loaders[0])
        while name.lower() in map(str.lower, names.values()):
            name += f"_{plain(loaders[0])}"
        names[loaders] = name
    return names


def _file_stem(graph: _Graph, loader: str) -> str:
    """Name of a loader's file, without folders and suffix; else the name of its class."""
    before = _ancestors(graph.nodes, [loader])  # a MODEL from a pipe has its file further up
    for name in (loader, *(name for name in graph.nodes if name in before)):
        for value in graph.nodes[name]["inputs"].values():
            if isinstance(value, str) and _MODEL_FILE.search(value) and MODEL in graph.type(name).outputs:
                return plain(_MODEL_FILE.sub("", PurePosixPath(value.replace("\\", "/")).name))
    return plain(graph.nodes[loader]["class_type"])


def plain(text: str) -> str:
    r"""A text as part of a file name, valid on any system.

    >>> plain("../Wan 2.2: high"), plain("..."), plain("a\x00b"), plain("aux")
    ('Wan_2.2_high', 'model', 'a_b', 'model_aux')
    """
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", text)
    name = re.sub(r"\.{2,}", ".", words).strip("._-")[:_LONGEST_NAME].strip("._-") or "model"
    return name if is_plain_on_windows(name) else f"model_{name}"
