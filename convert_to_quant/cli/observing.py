"""The work of `observe`: run a model in one of three engines, in one or several processes, and save statistics."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..best import INSTEAD, TrialModel, candidates, input_scales, plan_any
from ..calibrate_activation_scales import refuse_unrunnable, unrunnable
from ..checkpoint import Checkpoint, open_checkpoint
from ..choose import CANDIDATES
from ..engines import diffusers, pipeline, sizes
from ..engines.comfyui import inprocess, inprocess_tree
from ..engines.devices import find_device
from ..engines.moments import Gathering
from ..engines.prompts import Prompts
from ..engines.session import Observation, Session, fingerprint
from ..errors import UnsupportedModelError
from ..formats import FORMATS
from ..identity import identify
from ..layers import LayerTable, find_layers
from ..lora import Lora, match_checkpoint, open_loras
from ..naming import knowing_weights
from ..options import COMFYUI_VARIABLE, SAMPLES, STEPS, RunOptions, options_of
from ..recorder import gather
from ..rounding import KeptMoments, kept_bytes
from ..stats import Statistics
from ..telling import Progress, part, size
from ..trials import Trials
from .merge import report
from .output import note, progress_bar, say, write_json, wrote
from .running import NOISE, geometry_of, settle
from .shared import read_prompts

WARNING_LETTERS = 300
"""Longest warning shown: ComfyUI may list every tensor of a file in one."""

Run = Callable[[Session, Progress], Observation]
"""Runs a model in a session and reports progress."""


@contextmanager
def processes() -> Iterator[bool]:
    """Join the other processes started by torchrun; yields whether there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield False
        return
    from datetime import timedelta

    from torch import distributed

    # Statistics are reduced on the host, once; fast processes wait for the slowest.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield True
    finally:
        distributed.destroy_process_group()


def device_of_this_process(device: str) -> str:
    """Under torchrun, "cuda" is this process's own GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def observe(args: argparse.Namespace) -> None:
    """Run a model and save statistics, unless an earlier run completed them or this is a dry run."""
    source = nullcontext() if args.input is None else open_checkpoint(args.input)
    with processes() as distributed, source as checkpoint, open_loras(args.lora) as adapters:
        args.device = device_of_this_process(str(find_device(args.device)))
        table = None if checkpoint is None else find_layers(checkpoint)
        if args.pipeline:
            made_with, run = prepare_pipeline(args, checkpoint)
        else:
            assert checkpoint is not None
            assert table is not None
            made_with, run = prepare_model(args, checkpoint, table, adapters)
        made_with |= {**shown(args), "device": args.device.partition(":")[0]}
        made_with["model"] = None if checkpoint is None else fingerprint(checkpoint)
        made_with["lora"] = [f"{one.strength:g} {fingerprint(one.checkpoint)}" for one in adapters]
        session = Session(args.output, made_with, resume=args.resume, save_every_seconds=args.save_every,
                          distributed=distributed)  # fmt: skip
        statistics = session.finished()
        if args.dry_run:
            say(f"dry run: {wrote(args.output, would=True)}; nothing was written")
            write_json(args.json, {"statistics": str(args.output), "dry_run": True})
            return
        if statistics is not None:
            session.discard()
            say(f"{args.output} is already complete")
        else:
            with progress_bar("observing") as progress:
                seen = run(session, progress)
            statistics = seen.statistics if table is None else knowing_weights(seen.statistics, table)
            session.finish(statistics, seen.trials, seen.moments)
            tell(seen, args)
        report(statistics, args)


def shown(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the images, common to all engines."""
    return {name: getattr(args, name) for name in ("samples", "steps", "seed", "device")}


def prepare_model(
    args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable, adapters: Sequence[Lora]
) -> tuple[dict[str, Any], Run]:
    """How to run a checkpoint: facts for the statistics, and the function that runs it."""
    if args.trials or args.moments:
        refuse_unrunnable(checkpoint, table, "tried" if args.trials else "observed", INSTEAD)
        plan_any(checkpoint)  # raises if there is nothing to quantize
    settle(args, checkpoint)
    prepare = prepare_comfyui if engine_of(args, checkpoint, table) == "comfyui" else prepare_diffusers
    return prepare(args, checkpoint, table, adapters)


def engine_of(args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable) -> str:
    """The engine for a checkpoint: the requested one, or the first that can run it.

    Raises:
        UnsupportedModelError: diffusers cannot run it, and no ComfyUI folder is given.
    """
    if args.engine != "auto":
        return str(args.engine)
    reason = unrunnable(checkpoint, table)
    if reason is None or args.conditioning != NOISE:
        return "diffusers"
    if args.comfyui_dir or os.environ.get(COMFYUI_VARIABLE):
        note(f"ComfyUI runs it: {reason}")
        return "comfyui"
    unfit = identify(checkpoint, table).kind not in (None, "diffusion")
    hint = None if unfit else "--comfyui-dir DIR runs it in ComfyUI"
    raise UnsupportedModelError(reason, path=checkpoint.path, hint=hint)


def prepare_diffusers(
    args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable, adapters: Sequence[Lora]
) -> tuple[dict[str, Any], Run]:
    """How to run a checkpoint in diffusers' classes; see `prepare_model`."""
    geometry = geometry_of(args, diffusers.plan(checkpoint, table).family)
    prompts = None if args.conditioning == NOISE else Prompts.load(args.conditioning)
    match = match_checkpoint(adapters, checkpoint, table) if adapters else None
    options = options_of(RunOptions, args)  # of trials, which count images differently
    args.samples = args.samples or (SAMPLES if prompts is None else 1)
    further = [name for name in ("trials", "moments") if getattr(args, name)]

    def run(session: Session, progress: Progress) -> Observation:
        note(*(match.notes() if match is not None else ()))
        runs = iter([part(progress, number, 1 + len(further)) for number in range(1 + len(further))])
        found = diffusers.observe(checkpoint, table, options_of(RunOptions, args), geometry=geometry, prompts=prompts,
                                  adapters=match, session=session, progress=next(runs))  # fmt: skip
        if args.trials:
            tried = try_all(checkpoint, found.statistics, options, session, prompts=prompts, progress=next(runs))
            found = replace(found, trials=tried)
        if args.moments:
            kept = keep_moments(checkpoint, options, session, prompts=prompts, progress=next(runs))
            found = replace(found, moments=kept)
        return found

    return {
        **dict.fromkeys(further, True),
        "conditioning": NOISE if prompts is None else fingerprint(args.conditioning),
        "size": f"{geometry.frames} x {geometry.height} x {geometry.width} tokens, text {geometry.text_tokens}",
    }, run


def try_all(
    checkpoint: Checkpoint,
    statistics: Statistics,
    options: RunOptions,
    session: Session,
    *,
    prompts: Prompts | None,
    progress: Progress | None,
) -> Trials:
    """Try every format in every layer; the processes share the layers."""
    plan = plan_any(checkpoint)
    layers = {layer.name: layer for layer, _ in plan.quantized}
    found = TrialModel(checkpoint, plan, options).try_formats(
        candidates(layers, input_scales(checkpoint, layers, statistics), [FORMATS[name] for name in CANDIDATES]),
        prompts=prompts, share=(session.rank, session.processes), progress=progress,
    )  # fmt: skip
    everyone: list[Trials] = gather(found)
    return reduce(Trials.plus, everyone)


def keep_moments(
    checkpoint: Checkpoint, options: RunOptions, session: Session, *, prompts: Prompts | None, progress: Progress | None
) -> dict[str, str]:
    """Save the second moments of every layer that can be quantized; the processes share the layers.

    Returns:
        Their entry in the statistics' header.
    """
    assert session.output is not None
    kept = KeptMoments(session.output, hashlib.sha256(json.dumps(session.options).encode()).hexdigest())
    if session.rank == 0:
        kept.prepare(resume=session.resume)
    everyones: list[KeptMoments] = gather(kept)
    kept = everyones[0]
    plan = plan_any(checkpoint)
    layers = [layer for layer, _ in plan.quantized]
    most = size(sum(kept_bytes(layer.in_features) for layer in layers))
    note(f"second moments take up to {most} in {kept.folder}")
    gathering = Gathering(checkpoint, plan.table, layers, options, prompts=prompts, done=list(kept.files),
                          share=(session.rank, session.processes), progress=progress)  # fmt: skip
    for band in gathering.bands:
        for together, moments in gathering.gather(band).items():
            kept.write(together, moments.cpu().numpy())
    for other in gather(kept):
        kept.files |= other.files
    return kept.entry()


def prepare_comfyui(
    args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable, adapters: Sequence[Lora]
) -> tuple[dict[str, Any], Run]:
    """How to run a checkpoint in ComfyUI; see `prepare_model`."""
    folder = inprocess_tree.folder_of(args.comfyui_dir)
    args.samples = args.samples or SAMPLES
    options = options_of(RunOptions, args)
    height, width, frames, text_tokens = sizes.usual(options.size)

    def warn(text: str) -> None:
        note(f"ComfyUI: {shorten(text, WARNING_LETTERS, placeholder=' ...')}")

    def run(session: Session, progress: Progress) -> Observation:
        return inprocess.observe(checkpoint, table, folder, options, adapters=adapters, session=session,
                                 progress=progress, warn=warn)  # fmt: skip

    return {
        "engine": f"comfyui {inprocess_tree.version(folder)}",
        "size": f"{frames} x {height} x {width}, text {text_tokens}",
    }, run


def prepare_pipeline(args: argparse.Namespace, checkpoint: Checkpoint | None) -> tuple[dict[str, Any], Run]:
    """How to run a pipeline on prompts; see `prepare_model`."""
    pipeline.require_pipeline(args.pipeline)  # before all of its files are read
    prompts = read_prompts(Path(args.prompts))
    args.samples, args.steps = args.samples or len(prompts), args.steps or STEPS
    options = options_of(RunOptions, args)

    def run(session: Session, progress: Progress) -> Observation:
        return pipeline.observe(args.pipeline, prompts, options, session, checkpoint=checkpoint,
                                component=args.component, progress=progress)  # fmt: skip

    return {
        "pipeline": fingerprint(args.pipeline),
        "prompts": fingerprint(args.prompts),
        "component": args.component,
        "size": f"{args.frames} x {args.height} x {args.width}, text {args.text_tokens}",
    }, run


def tell(seen: Observation, args: argparse.Namespace) -> None:
    """Report which layers were observed, and which were not."""
    statistics = seen.statistics
    unseen = set(statistics.unseen)
    for name in seen.unvisited:
        note(f"{name}: {'ran, but its input could not be observed' if name in unseen else 'never ran'}")
    if seen.conditioned:
        note(
            f"observed on noise: the ranges of {len(seen.conditioned)} layers depend on the conditioning, "
            f"which noise only approximates (first: {min(seen.conditioned)})"
        )
    say(f"observed {int(statistics.visited.sum())} layers over {statistics.samples} images; {wrote(args.output)}")
