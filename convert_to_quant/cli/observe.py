"""`convert_to_quant observe MODEL -o STATS`: run a model and keep what its layers received."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ..engines.devices import find_device
from ..errors import OptionError, UnsupportedModelError
from ..options import COMFYUI_VARIABLE, SAMPLES, STEPS, RunOptions, options_of
from ..telling import part, size
from .calibration import loras_of
from .output import configure, note, progress_bar, say, write_json, wrote
from .running import NOISE, add_running_arguments, check_running_options, geometry_of, settle
from .shared import read_text

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..engines.prompts import Prompts
    from ..engines.session import Observation, Session
    from ..layers import LayerTable
    from ..lora import Lora
    from ..stats import Statistics
    from ..telling import Progress
    from ..trials import Trials

ENGINES = ("auto", "diffusers", "comfyui")
WARNING_LETTERS = 300
"""ComfyUI may list every tensor of a file in one warning."""

DESCRIPTION = """\
Run a model, quantized or in high precision, and record what its linear layers receive in a statistics file. `apply`
chooses scales from it."""
EPILOG = """\
examples:
  convert_to_quant observe flux.safetensors -o stats.safetensors --device cuda
  convert_to_quant observe sdxl.safetensors -o stats.safetensors \\
      --comfyui-dir ~/ComfyUI
  convert_to_quant observe --pipeline FLUX.1-dev --prompts prompts.txt \\
      -o stats.safetensors

Noise takes at least 3 images. --pipeline without MODEL records layers under both naming schemes. Under torchrun,
processes share the work.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("input", nargs="?", metavar="MODEL", help="a checkpoint; optional with --pipeline")
    parser.add_argument("-o", "--output", required=True, metavar="STATS", help="the statistics file to write")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                        help="LoRA to use with the model; repeatable")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue a stopped run, or start one")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS",
                        help="save progress this often (120)")  # fmt: skip
    parser.add_argument("--trials", action="store_true",
                        help="also try every format in every layer (--best)")  # fmt: skip
    parser.add_argument("--moments", action="store_true",
                        help="also keep second moments (--round)")  # fmt: skip
    engine = parser.add_argument_group("what runs it")
    engine.add_argument("--engine", choices=ENGINES, default=ENGINES[0], metavar="WHICH",
                        help="diffusers, comfyui, or whichever can (auto)")  # fmt: skip
    engine.add_argument("--comfyui-dir", metavar="DIR", help=f"ComfyUI folder to run it in (${COMFYUI_VARIABLE})")
    engine.add_argument("--pipeline", metavar="DIR", help="diffusers pipeline, run on real prompts")
    engine.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line")
    engine.add_argument("--component", metavar="NAME", help="pipeline component to record (transformer)")
    add_running_arguments(parser, seed=42)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_options(args)
    if os.environ.get("RANK", "0") != "0":
        configure(quiet=True)
    with processes() as distributed:
        args.device = device_of_this_process(str(find_device(args.device)))
        try:
            return observe_pipeline(args, distributed) if args.pipeline else observe_model(args, distributed)
        except KeyboardInterrupt:
            if partial_of(args.output).exists():
                note(f"progress is saved in {partial_of(args.output)}: --resume continues")
            raise


def check_options(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or do nothing, and outputs that cannot be written.

    Raises:
        OptionError: flags do.
        OutputError: an output is an input, a folder or a special file, or has no folder to be in.
    """
    from ..checkpoint import check_output

    excluded = {"lora": args.lora, "comfyui-dir": args.comfyui_dir, "engine comfyui": args.engine == "comfyui"}
    check_running_options(args, ("prompts", "component"), excluded)
    for flag, given in {"pipeline": args.pipeline, **excluded}.items():
        for asked in ("trials", "moments"):
            if getattr(args, asked) and given:
                raise OptionError(f"--{asked} does not go with --{flag}: it needs the model itself")
    if args.save_every < 0:
        raise OptionError(f"--save-every should not be negative, found {args.save_every:g}")
    if args.pipeline is None and args.input is None:
        raise OptionError("name a MODEL, or a --pipeline")
    if args.engine == "diffusers" and args.comfyui_dir:
        raise OptionError("--comfyui-dir does not go with --engine diffusers")
    if args.engine == "comfyui" and args.conditioning != NOISE:
        raise OptionError(
            "--conditioning does not go with --engine comfyui, which shows noise",
            hint="convert_to_quant comfyui observe runs a workflow of yours, on its own prompts",
        )
    check_output(partial_of(args.output))


def partial_of(output: str) -> Path:
    """Where a run keeps what it has, if it is the only process."""
    from ..engines.session import PARTIAL_SUFFIX

    return Path(output + PARTIAL_SUFFIX)


@contextmanager
def processes() -> Iterator[bool]:
    """Join the other processes that torchrun started, if it did: whether there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield False
        return
    from datetime import timedelta

    from torch import distributed

    # Statistics are reduced on the host, once. The process that is done first waits for the slowest.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield True
    finally:
        distributed.destroy_process_group()


def device_of_this_process(device: str) -> str:
    """Under torchrun "cuda" is this process's own card."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


Run = Callable[["Session", "Progress"], "Observation"]
"""What runs a model, as one of the engines does: told where to keep what it sees, and how far it is."""


def observe_model(args: argparse.Namespace, distributed: bool) -> int:
    """Run a checkpoint."""
    from ..best import INSTEAD, plan_any
    from ..calibrate_activation_scales import refuse_unrunnable
    from ..checkpoint import open_checkpoint
    from ..engines.session import fingerprint
    from ..layers import find_layers

    with open_checkpoint(args.input) as checkpoint, loras_of(args) as adapters:
        table = find_layers(checkpoint)
        if args.trials or args.moments:
            refuse_unrunnable(checkpoint, table, "tried" if args.trials else "observed", INSTEAD)
            plan_any(checkpoint)  # says whether there is anything to quantize
        settle(args, checkpoint)
        inside = engine_of(args, checkpoint, table) == "comfyui"
        prepare = observe_in_comfyui if inside else observe_in_diffusers
        made_with, run = prepare(args, checkpoint, table, adapters)
        made_with["model"] = fingerprint(checkpoint)
        made_with["lora"] = [f"{one.strength:g} {fingerprint(one.checkpoint)}" for one in adapters]
        return observe(args, distributed, made_with, run, table)


def engine_of(args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable) -> str:
    """The engine for a checkpoint: the one that was asked for, or else the first that can run it.

    Raises:
        UnsupportedModelError: diffusers cannot run it, and no ComfyUI is named.
    """
    if args.engine != "auto":
        return str(args.engine)
    from ..calibrate_activation_scales import unrunnable
    from ..identity import identify

    reason = unrunnable(checkpoint, table)
    if reason is None or args.conditioning != NOISE:
        return "diffusers"
    if args.comfyui_dir or os.environ.get(COMFYUI_VARIABLE):
        note(f"ComfyUI runs it: {reason}")
        return "comfyui"
    unfit = identify(checkpoint, table).kind not in (None, "diffusion")
    hint = None if unfit else "--comfyui-dir DIR runs it in ComfyUI"
    raise UnsupportedModelError(reason, path=checkpoint.path, hint=hint)


def observe_in_diffusers(
    args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable, adapters: Sequence[Lora]
) -> tuple[dict[str, Any], Run]:
    """How diffusers' classes run a checkpoint: what the statistics are made with, and the run."""
    from dataclasses import replace

    from ..engines import diffusers
    from ..engines.prompts import Prompts
    from ..engines.session import fingerprint
    from ..lora import match_checkpoint

    geometry = geometry_of(args, diffusers.plan(checkpoint, table).family)
    prompts = None if args.conditioning == NOISE else Prompts.load(args.conditioning)
    match = match_checkpoint(adapters, checkpoint, table) if adapters else None
    options = options_of(RunOptions, args)  # of trials, whose images are counted otherwise
    args.samples = args.samples or (SAMPLES if prompts is None else 1)

    def run(session: Session, progress: Progress) -> Observation:
        note(*(match.notes() if match is not None else ()))
        further = [name for name in ("trials", "moments") if getattr(args, name)]
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
        **{name: True for name in ("trials", "moments") if getattr(args, name)},
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
    """Try every format in every layer; each process takes some of the layers."""
    from ..best import TrialModel, candidates, input_scales, plan_any
    from ..choose import CANDIDATES
    from ..formats import FORMATS
    from ..recorder import gather
    from ..trials import Trials

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
    """Keep the second moments of every layer that can be quantized; each process takes some of the layers.

    Returns:
        What the statistics' header says of them.
    """
    import hashlib

    from ..best import plan_any
    from ..engines.moments import Gathering
    from ..recorder import gather
    from ..rounding import KeptMoments, kept_bytes

    assert session.output is not None
    kept = KeptMoments(session.output, hashlib.sha256(json.dumps(session.options).encode()).hexdigest())
    if session.rank == 0:
        kept.prepare(resume=session.resume)
    everyones: list[KeptMoments] = gather(kept)
    kept = everyones[0]
    plan = plan_any(checkpoint)
    layers = [layer for layer, _ in plan.quantized]
    note(
        f"second moments take {size(sum(kept_bytes(layer.in_features) for layer in layers))} at most, in {kept.folder}"
    )
    gathering = Gathering(checkpoint, plan.table, layers, options, prompts=prompts, done=list(kept.files),
                          share=(session.rank, session.processes), progress=progress)  # fmt: skip
    for band in gathering.bands:
        for together, moments in gathering.gather(band).items():
            kept.write(together, moments.cpu().numpy())
    for other in gather(kept):
        kept.files |= other.files
    return kept.entry()


def observe_in_comfyui(
    args: argparse.Namespace, checkpoint: Checkpoint, table: LayerTable, adapters: Sequence[Lora]
) -> tuple[dict[str, Any], Run]:
    """How a ComfyUI runs a checkpoint: what the statistics are made with, and the run."""
    from ..engines.comfyui import inprocess, inprocess_tree

    folder = inprocess_tree.folder_of(args.comfyui_dir)
    args.samples = args.samples or SAMPLES
    options = options_of(RunOptions, args)
    height, width, frames, text_tokens = inprocess.size_of(options)

    def warn(text: str) -> None:
        note(f"ComfyUI: {shorten(text, WARNING_LETTERS, placeholder=' ...')}")

    def run(session: Session, progress: Progress) -> Observation:
        return inprocess.observe(checkpoint, table, folder, options, adapters=adapters, session=session,
                                 progress=progress, warn=warn)  # fmt: skip

    return {
        "engine": f"comfyui {inprocess_tree.version(folder)}",
        "size": f"{frames} x {height} x {width}, text {text_tokens}",
    }, run


def observe_pipeline(args: argparse.Namespace, distributed: bool) -> int:
    """Run a pipeline."""
    from ..checkpoint import open_checkpoint
    from ..engines import pipeline
    from ..engines.session import fingerprint
    from ..layers import find_layers

    pipeline.require_pipeline(args.pipeline)  # before all of its files are read
    prompts = read_prompts(Path(args.prompts))
    args.samples, args.steps = args.samples or len(prompts), args.steps or STEPS
    options = options_of(RunOptions, args)
    with nullcontext() if args.input is None else open_checkpoint(args.input) as checkpoint:
        made_with = {
            "pipeline": fingerprint(args.pipeline),
            "prompts": fingerprint(args.prompts),
            "model": None if checkpoint is None else fingerprint(checkpoint),
            "component": args.component,
            "size": f"{args.frames} x {args.height} x {args.width}, text {args.text_tokens}",
        }

        def run(session: Session, progress: Progress) -> Observation:
            return pipeline.observe(args.pipeline, prompts, options, session, checkpoint=checkpoint,
                                    component=args.component, progress=progress)  # fmt: skip

        return observe(args, distributed, made_with, run, None if checkpoint is None else find_layers(checkpoint))


def shown(args: argparse.Namespace) -> dict[str, Any]:
    """What every engine is told of the images."""
    return {name: getattr(args, name) for name in ("samples", "steps", "seed", "device")}


def observe(
    args: argparse.Namespace, distributed: bool, made_with: dict[str, Any], run: Run, table: LayerTable | None
) -> int:
    """Run a model, unless there is nothing left to do: an earlier run made the output, or this one is dry.

    Args:
        args: the options, with the number of samples.
        distributed: whether other processes share the work.
        made_with: what may not change when the run is resumed, beside what is said here.
        run: does the work.
        table: the layers of the checkpoint, where there is one.
    """
    from ..engines.session import Session
    from ..naming import knowing_weights

    made_with |= {**shown(args), "device": args.device.partition(":")[0]}
    session = Session(args.output, made_with, resume=args.resume, save_every_seconds=args.save_every,
                      distributed=distributed)  # fmt: skip
    statistics = session.finished()
    if args.dry_run:
        say(f"dry run: would {'replace' if Path(args.output).exists() else 'write'} {args.output}; nothing was written")
        write_json(args.json, {"statistics": str(args.output), "dry_run": True})
        return 0
    if statistics is not None:
        session.discard()
        say(f"{args.output} is complete already")
    else:
        with progress_bar("observing") as progress:
            observation = run(session, progress)
        statistics = observation.statistics
        if table is not None:
            statistics = knowing_weights(statistics, table)
        session.finish(statistics, observation.trials, observation.moments)
        tell(observation, args)
    report(statistics, args)
    return 0


def tell(observation: Observation, args: argparse.Namespace) -> None:
    """Say what was seen, and what was not."""
    statistics = observation.statistics
    unseen = set(statistics.unseen)
    for name in observation.unvisited:
        note(f"{name}: {'ran, but its input could not be seen' if name in unseen else 'never ran'}")
    if observation.conditioned:
        note(
            f"observed on noise: the ranges of {len(observation.conditioned)} layers depend on the conditioning, "
            f"which noise only imitates (first: {min(observation.conditioned)})"
        )
    say(f"observed {int(statistics.visited.sum())} layers over {statistics.samples} images; {wrote(args.output)}")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        OptionError: it cannot be read, or has none.
    """
    text = read_text(path, lambda problem: OptionError(f"the prompts {problem}", path=path))
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise OptionError("no prompts", path=path, hint="one per line")
    return prompts


def report(statistics: Statistics, args: argparse.Namespace) -> None:
    """Write the report that was asked for; one process of several does."""
    if args.json is None or os.environ.get("RANK", "0") != "0":
        return
    columns = (statistics.absmax.tolist(), statistics.visited.tolist(), statistics.calls.tolist())
    document = {
        "statistics": str(args.output),
        "fingerprint": statistics.fingerprint,
        "samples": statistics.samples,
        "provenance": {name: list(texts) for name, texts in statistics.provenance.items()},
        "layers": [
            {"layer": name, "absmax": absmax if visited else None, "calls": calls}
            for name, absmax, visited, calls in zip(statistics.names, *columns, strict=True)
        ],
    }
    write_json(args.json, document)
