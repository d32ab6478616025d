"""Observes models on a running ComfyUI: runs a user's workflow with many prompts and seeds, and records it.

Every run has its own seed, since ComfyUI answers a repeated run from its cache without sampling. Runs are queued one at
a time, so that runs of other users come between.

One recorder accumulates over all runs and saves its totals to one file, which is fetched at the end. ComfyUI may drop a
recorder between runs (`--cache-none`, low memory, other users' runs); the next one starts from zero with its own file.
A recorder may also be saved after several samplers of a run. Each file names its recorder: the file with the most
samples counts for each recorder, and recorders are merged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
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
"""Statistics files of one model on the server: recorder -> output of its Save node (`FILE`)."""

FILE = {"filename": str, "subfolder": str, "type": str, "recording": str, "samples": int}
"""The first three are the parameters of `/view`."""


@dataclass(frozen=True)
class Run:
    """Prompt and seed of one run; None keeps the workflow's own."""

    prompt: str | None
    seed: int | None


def plan_runs(plan: Plan, prompts: Sequence[str] | None, seeds: int | None, first_seed: int) -> list[Run]:
    """Every prompt with several seeds.

    Args:
        plan: of the workflow.
        prompts: None keeps the workflow's own.
        seeds: number of runs per prompt; None: `SEEDS`, or one if the workflow has no seed.
        first_seed: the others count up from it.
    """
    if prompts is not None and not plan.texts:
        raise OptionError(
            "--prompts: the workflow has no text input before its sampler",
            hint="without --prompts the workflow's own prompt is used",
        )
    if seeds is not None and seeds > 1 and not plan.seeds:
        raise OptionError("--seeds: the workflow's samplers have no seed input", hint="use --seeds 1")
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
    """Run a workflow repeatedly, and fetch the recorded statistics.

    Args:
        server: with our nodes.
        plan: of the workflow.
        runs: at least one.
        folder: for statistics files, in the server's output folder.
        progress: called with the number of finished runs and of all runs.

    Returns:
        Statistics by model name, and the number of runs that recorded nothing.

    Raises:
        CalibrationError: a run was rejected or failed, or the server stopped answering.
        StatisticsError: the server sent something other than statistics.
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
                files = saved[model.name]
                for file in (_file(server, outputs, save) for save in model.saves):
                    key = file["recording"]
                    files[key] = max(file, files.get(key, file), key=itemgetter("samples"))
            idle += before == _samples(saved)
            done += 1
        progress(done, len(runs))
        found = {name: _fetch(server, files) for name, files in saved.items()}
    except CalibrationError as error:
        names = [f"{file['subfolder']}/{file['filename']}" for each in saved.values() for file in each.values()]
        if not names:
            raise
        kept = f"statistics of {plural(done, 'run')} are in ComfyUI's output folder: {shown(', '.join(names))}"
        hint = kept if error.hint is None else f"{error.hint}; {kept}"
        raise CalibrationError(error.problem, path=error.path, tensor=error.tensor, hint=hint) from None
    facts: dict[str, Any] = {"runs": len(runs), "prompts": len({run.prompt for run in runs})}
    if runs[0].seed is not None:
        facts["seed"] = runs[0].seed
    return {name: statistics.with_facts(**facts) for name, statistics in found.items()}, idle


def _samples(saved: Mapping[str, Files]) -> int:
    """Number of samples in all files."""
    return sum(file["samples"] for files in saved.values() for file in files.values())


def _file(server: Server, outputs: Mapping[str, Any], save: str) -> Mapping[str, Any]:
    """Output of a Save node: the file that it wrote."""
    entry = as_object(next(iter(as_list(as_object(outputs.get(save)).get("statistics"))), None))
    if not all(isinstance(entry.get(key), kind) for key, kind in FILE.items()):
        raise CalibrationError(
            "its Save Activation Stats node does not name the file it wrote",
            path=server.address,
            hint="install the same version of convert_to_quant on the server and here",
        )
    return entry


def _fetch(server: Server, files: Files) -> Statistics:
    """Fetch the statistics of one model."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files.values()):
            path = Path(folder, f"{number}.safetensors")
            server.fetch({key: file[key] for key in ("filename", "subfolder", "type")}, path)
            try:
                parts.append(Statistics.load(path))
            except Error as error:
                raise StatisticsError(
                    f"cannot use the file {shown(file['filename'])} that the server sent: {error.problem}",
                    path=server.address,
                    hint="if it happens again, install the same version of convert_to_quant on the server and here",
                ) from None
    return merge(*parts)
