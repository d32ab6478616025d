"""Observing models on a running ComfyUI: a user's workflow, run with many prompts and seeds, recorded.

Every prompt is run with several seeds, each run with a seed of its own: ComfyUI answers a run that it knows from its
cache, without sampling. Runs are queued one after the other, so other people's runs come between.

One recorder adds up over all runs, and the server has its totals in one file, which is fetched at the end. ComfyUI may
forget a recorder between runs (`--cache-none`, little memory, other people's runs): a new one starts from nothing, with
a file of its own. A recorder may also be saved more than once in a run, behind several samplers. Files say which
recorder they are of, so of each recorder the one with the most samples counts, and recorders are merged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ...errors import CalibrationError, Error, OptionError, StatisticsError
from ...stats import Statistics, merge
from ...telling import Progress, plural
from .server import Server, as_list, as_object
from .workflow import Plan, shown

SEEDS = 4

Files = dict[str, Mapping[str, Any]]
"""Statistics files of one model on the server: recorder -> what a Save node says that it wrote (`FILE`)."""

FILE = {"filename": str, "subfolder": str, "type": str, "recording": str, "samples": int}
"""The first three are what `/view` takes."""


@dataclass(frozen=True)
class Run:
    """What one run has of its own; None is what the workflow has.

    Attributes:
        prompt: for all texts of the plan.
        seed: for all of its seeds.
    """

    prompt: str | None
    seed: int | None


def plan_runs(plan: Plan, prompts: Sequence[str] | None, seeds: int | None, first_seed: int) -> list[Run]:
    """Every prompt with several seeds.

    Args:
        plan: of the workflow.
        prompts: None for the workflow's own.
        seeds: how many for each prompt; None for `SEEDS`, or one where the workflow has no seed.
        first_seed: the others count on from it.

    Raises:
        OptionError: the workflow has no text or no seed that could be varied.
    """
    if prompts is not None and not plan.texts:
        raise OptionError(
            "--prompts: the workflow has no text input on the way to its sampler that could be varied",
            hint="without --prompts the workflow's own prompt is used",
        )
    if seeds is not None and seeds > 1 and not plan.seeds:
        raise OptionError("--seeds: the workflow's samplers have no seed that could be varied", hint="use --seeds 1")
    count = 1 if not plan.seeds else seeds or SEEDS
    several: Sequence[str | None] = prompts if prompts is not None else [None]
    return [
        Run(prompt, first_seed + number * count + seed if plan.seeds else None)
        for number, prompt in enumerate(several)
        for seed in range(count)
    ]


def observe(
    server: Server, plan: Plan, runs: Sequence[Run], folder: str, progress: Progress
) -> tuple[dict[str, Statistics], int]:
    """Run a workflow again and again, and fetch what was recorded.

    Args:
        server: which has our nodes.
        plan: of the workflow.
        runs: at least one.
        folder: for the files in the server's output folder.
        progress: takes the number of runs that are done, and of all.

    Returns:
        The statistics of each model, by its name, and the number of runs in which nothing was sampled.

    Raises:
        CalibrationError: a run was refused or failed, or the server went away.
        StatisticsError: what it sent is no statistics.
    """
    session = uuid4().hex
    saved: dict[str, Files] = {model.name: {} for model in plan.models}
    idle = done = 0
    try:
        for run in runs:
            progress(done, len(runs))
            before = _samples(saved)
            outputs = server.run(plan.queued(session, folder, run.prompt, run.seed))
            for model in plan.models:
                for save in model.saves:
                    note(saved[model.name], _file(server, outputs, save))
            idle += before == _samples(saved)
            done += 1
        progress(done, len(runs))
        found = {name: _fetch(server, files) for name, files in saved.items()}
    except CalibrationError as error:
        files = [f"{file['subfolder']}/{file['filename']}" for each in saved.values() for file in each.values()]
        if not files:
            raise
        kept = f"{plural(done, 'run')} before it recorded into ComfyUI's output folder: {shown(', '.join(files))}"
        hint = kept if error.hint is None else f"{error.hint}; {kept}"
        raise CalibrationError(error.problem, path=error.path, tensor=error.tensor, hint=hint) from None
    facts: dict[str, Any] = {"runs": len(runs), "prompts": len({run.prompt for run in runs})}
    if runs[0].seed is not None:
        facts["seed"] = runs[0].seed
    return {name: statistics.with_facts(**facts) for name, statistics in found.items()}, idle


def _samples(saved: Mapping[str, Files]) -> int:
    """In all files."""
    return sum(file["samples"] for files in saved.values() for file in files.values())


def note(files: Files, file: Mapping[str, Any]) -> None:
    """Note a file, in place of an older one of the same recorder."""
    before = files.get(file["recording"])
    if before is None or file["samples"] >= before["samples"]:
        files[file["recording"]] = file


def _file(server: Server, outputs: Mapping[str, Any], save: str) -> Mapping[str, Any]:
    """What a Save node says that it wrote."""
    entry = as_object(next(iter(as_list(as_object(outputs.get(save)).get("statistics"))), None))
    if not all(isinstance(entry.get(key), kind) for key, kind in FILE.items()):
        raise CalibrationError(
            "its Save Activation Stats node does not say which file it wrote",
            path=server.address,
            hint="it comes from another version: update convert_to_quant there or here",
        )
    return entry


def _fetch(server: Server, files: Files) -> Statistics:
    """One model's statistics."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files.values()):
            path = Path(folder, f"{number}.safetensors")
            server.fetch({key: file[key] for key in ("filename", "subfolder", "type")}, path)
            try:
                parts.append(Statistics.load(path))
            except Error as error:
                raise StatisticsError(
                    f"what the server sent as {shown(file['filename'])} cannot be used: {error.problem}",
                    path=server.address,
                    hint="run it again; if it stays, use the same version of convert_to_quant there and here",
                ) from None
    return merge(*parts)
