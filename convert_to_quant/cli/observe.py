"""`convert_to_quant observe MODEL -o STATS`: run a model and keep what its layers received."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from .calibration import loras_of
from .output import note, progress_bar, require_folder, say, write_json
from .running import NOISE, PICTURES, add_running_arguments, check_report, check_running_options, geometry_of

if TYPE_CHECKING:
    from ..engines.diffusers import Observation
    from ..engines.session import Session
    from ..stats import Statistics

DESCRIPTION = """\
Run a model, in FP8 or in high precision, on noise, on prompt embeddings, or as a diffusers pipeline on real prompts,
and write what its linear layers received into a statistics file, from which `apply` chooses scales."""
EPILOG = """\
examples:
  convert_to_quant observe flux_bf16.safetensors -o stats.safetensors --device cuda
  convert_to_quant observe flux_bf16.safetensors -o stats.safetensors --conditioning embeddings.safetensors
  convert_to_quant observe --pipeline FLUX.1-dev/ --prompts prompts.txt -o stats.safetensors --device cuda --steps 20
  torchrun --nproc-per-node 8 -m convert_to_quant observe wan.safetensors -o stats.safetensors --device cuda --resume

With --pipeline, layers are named as in MODEL, or, without one, both as diffusers and as the model's authors name them:
the statistics fit a checkpoint of either kind. A run that was stopped, even killed, goes on with --resume and gives the
same statistics. Under torchrun the processes share the work.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("input", nargs="?", metavar="MODEL", help="a checkpoint; optional with --pipeline")
    parser.add_argument("-o", "--output", required=True, metavar="STATS", help="the statistics file to write")
    parser.add_argument("--engine", choices=("diffusers",), default="diffusers", help="what runs it (diffusers)")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                        help="adapter that will be used with the model; may be given more than once")  # fmt: skip
    pipeline = parser.add_argument_group("a diffusers pipeline")
    pipeline.add_argument("--pipeline", metavar="DIR", help="its folder; nothing is downloaded")
    pipeline.add_argument("--prompts", metavar="FILE", help="one prompt per line")
    pipeline.add_argument("--component", metavar="NAME", help="which part to record (transformer, or unet)")
    add_running_arguments(parser, seed=42)
    long = parser.add_argument_group("long runs")
    long.add_argument("--resume", action="store_true", help="go on with a run that was stopped, or begin one")
    long.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS",
                      help="keep what is done in STATS.partial this often (120)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write a report as JSON (- for stdout)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_options(args)
    with processes() as distributed:
        args.device = device_of_this_process(args.device)
        args.quiet = args.quiet or os.environ.get("RANK", "0") != "0"
        return observe_pipeline(args, distributed) if args.pipeline else observe_model(args, distributed)


def check_options(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or do nothing, and outputs that cannot be written.

    Raises:
        OptionError: flags do.
        OutputError: an output is an input, or has no folder.
    """
    from ..checkpoint import refuse_same_file

    check_running_options(args)
    if args.save_every < 0:
        raise OptionError(f"--save-every should not be negative, found {args.save_every:g}")
    if args.pipeline is None:
        if args.input is None:
            raise OptionError("name a MODEL, or a --pipeline")
        for name in ("prompts", "component"):
            if getattr(args, name) is not None:
                raise OptionError(f"--{name} needs --pipeline")
    else:
        if args.prompts is None:
            raise OptionError("--pipeline needs --prompts FILE")
        for name, given in (("conditioning", args.conditioning != NOISE), ("lora", args.lora)):
            if given:
                raise OptionError(f"--{name} does not go with --pipeline")
    output = Path(args.output)
    inputs = [args.input, args.prompts, None if args.conditioning == NOISE else args.conditioning]
    refuse_same_file(output, [Path(path) for path in inputs if path is not None], hint="name another output")
    require_folder(output)
    check_report(args.json, {"-o": args.output, "MODEL": args.input, "--prompts": args.prompts})


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


def session_of(args: argparse.Namespace, distributed: bool, **options: Any) -> Session:
    """The session that was asked for: what is in `options` may not change when it is resumed."""
    from ..engines.session import Session

    return Session(
        args.output,
        {"steps": args.steps, "seed": args.seed, "device": args.device.partition(":")[0], **options},
        resume=args.resume,
        save_every_seconds=args.save_every,
        distributed=distributed,
    )


def observe_model(args: argparse.Namespace, distributed: bool) -> int:
    """Run a checkpoint."""
    from ..calibrate_activation_scales import lora_notes
    from ..checkpoint import open_checkpoint
    from ..engines import diffusers
    from ..engines.prompts import Prompts
    from ..engines.session import fingerprint
    from ..layers import find_layers
    from ..lora import match_loras

    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(args.input))
        adapters = stack.enter_context(loras_of(args))
        table = find_layers(checkpoint)
        geometry = geometry_of(args, diffusers.plan(checkpoint, table).family)
        prompts = None if args.conditioning == NOISE else Prompts.load(args.conditioning)
        match = None
        if adapters:
            match = match_loras(adapters, table.shapes())
        pictures = args.samples or (PICTURES if prompts is None else 1)
        session = session_of(
            args,
            distributed,
            model=fingerprint(checkpoint),
            conditioning=NOISE if prompts is None else fingerprint(args.conditioning),
            samples=pictures,
            size=f"{geometry.frames} x {geometry.height} x {geometry.width} tokens, text {geometry.text_tokens}",
            lora=[f"{one.strength:g} {fingerprint(one.checkpoint)}" for one in adapters],
        )
        if done(session, args):
            return 0
        if match is not None and not args.quiet:
            for text in lora_notes(match):
                note(text)
        with progress_bar("observing", quiet=args.quiet) as progress:
            observation = diffusers.observe(
                checkpoint,
                table,
                samples=pictures * args.steps,
                steps=args.steps,
                seed=args.seed,
                device=args.device,
                geometry=geometry,
                prompts=prompts,
                adapters=match,
                session=session,
                progress=progress,
            )
    return finish(session, observation, args)


def observe_pipeline(args: argparse.Namespace, distributed: bool) -> int:
    """Run a pipeline."""
    from ..checkpoint import open_checkpoint
    from ..engines import pipeline
    from ..engines.session import fingerprint

    prompts = read_prompts(Path(args.prompts))
    painting = pipeline.Painting(
        args.samples or len(prompts), args.steps, args.seed, args.height, args.width, args.frames, args.text_tokens
    )
    with ExitStack() as stack:
        checkpoint = None if args.input is None else stack.enter_context(open_checkpoint(args.input))
        session = session_of(
            args,
            distributed,
            pipeline=fingerprint(args.pipeline),
            prompts=fingerprint(args.prompts),
            model=None if checkpoint is None else fingerprint(checkpoint),
            component=args.component,
            samples=painting.pictures,
            size=f"{args.frames} x {args.height} x {args.width}, text {args.text_tokens}",
        )
        if done(session, args):
            return 0
        with progress_bar("observing", quiet=args.quiet) as progress:
            observation = pipeline.observe(
                args.pipeline,
                prompts,
                painting,
                session,
                checkpoint=checkpoint,
                component=args.component,
                device=args.device,
                progress=progress,
            )
    return finish(session, observation, args)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        OptionError: it cannot be read, or has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: the prompts cannot be read: {error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise OptionError(f"{path}: no prompts", hint="one per line")
    return prompts


def done(session: Session, args: argparse.Namespace) -> bool:
    """Whether an earlier run made the output already; says so, and reports."""
    statistics = session.finished()
    if statistics is None:
        return False
    session.discard()
    if not args.quiet:
        say(f"{args.output} is complete already")
    report(statistics, args)
    return True


def finish(session: Session, observation: Observation, args: argparse.Namespace) -> int:
    """Write the statistics, and say what they hold."""
    statistics = observation.statistics
    session.finish(statistics)
    if not args.quiet:
        for name in observation.unvisited:
            note(f"{name}: never ran")
        if observation.conditioned:
            note(
                f"observed on noise: the ranges of {len(observation.conditioned)} layers depend on the conditioning, "
                f"which noise only imitates (first: {min(observation.conditioned)})"
            )
        say(f"observed {int(statistics.visited.sum())} layers over {statistics.samples} pictures; wrote {args.output}")
    report(statistics, args)
    return 0


def report(statistics: Statistics, args: argparse.Namespace) -> None:
    """Write the report that was asked for; one process of several does."""
    if args.json is None or os.environ.get("RANK", "0") != "0":
        return
    absmax, visited = statistics.absmax.tolist(), statistics.visited.tolist()
    write_json(
        args.json,
        {
            "statistics": str(args.output),
            "fingerprint": statistics.fingerprint,
            "samples": statistics.samples,
            "provenance": {name: list(texts) for name, texts in statistics.provenance.items()},
            "layers": [
                {"layer": name, "absmax": largest if ran else None, "calls": calls}
                for name, largest, ran, calls in zip(
                    statistics.names, absmax, visited, statistics.calls.tolist(), strict=True
                )
            ],
        },
    )
