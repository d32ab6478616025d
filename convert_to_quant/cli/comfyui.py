"""`convert_to_quant comfyui install|uninstall|observe`: the nodes in a ComfyUI, and recording on a running one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibrationError, OptionError
from ..telling import plural
from .output import foresee, note, progress_bar, say, write_json, wrote
from .shared import read_prompts, read_text

if TYPE_CHECKING:
    from ..engines.comfyui.remote import Run
    from ..engines.comfyui.workflow import NodeType, Place, Plan
    from ..stats import Statistics

DESCRIPTION = "Install the nodes in a ComfyUI, or record the models of a workflow on a running one."
EPILOG = """\
examples:
  convert_to_quant comfyui install ~/ComfyUI
  convert_to_quant comfyui observe --server http://127.0.0.1:8188 \\
      --workflow flux_api.json -o flux.safetensors
  convert_to_quant comfyui uninstall ~/ComfyUI
"""

INSTALL = """\
Install the nodes in a ComfyUI: a small folder in custom_nodes that imports this installed package. Run it with the
Python that runs ComfyUI, so that the nodes find this package."""

UNINSTALL = "Remove what install wrote. A folder that holds anything else is refused."

OBSERVE = """\
Run your own workflow on a running ComfyUI that has the nodes, with many prompts and seeds, and fetch the statistics of
its model's linear layers, for `apply`. A recorder is put between model and sampler. No image is decoded or saved."""
OBSERVE_EPILOG = """\
examples:
  convert_to_quant comfyui observe --server http://127.0.0.1:8188 \\
      --workflow flux_api.json -o flux.safetensors
  convert_to_quant comfyui observe --server http://127.0.0.1:8188 \\
      --workflow wan_api.json --prompts prompts.txt --seeds 2 -o wan.safetensors

Export the workflow in API format: in ComfyUI, File > Export (API). Of several models (Wan has two), each gets a file of
its own, with the model's name added. No other address is contacted. Ctrl-C cancels the run on the server; what earlier
runs recorded stays in ComfyUI's output folder, in activation_stats.
"""

SEED = 42
FOLDER = "activation_stats"
"""In ComfyUI's output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for name, does, text in (
        ("install", "install the nodes in a ComfyUI", INSTALL),
        ("uninstall", "remove the nodes again", UNINSTALL),
    ):
        example = f"example:\n  convert_to_quant comfyui {name} ~/ComfyUI\n"
        one = actions.add_parser(name, help=does, description=text, epilog=example)
        one.add_argument("folder", metavar="DIR", help="ComfyUI's folder (it has custom_nodes)")
    one = actions.add_parser(
        "observe", help="record a workflow's models on a running ComfyUI", description=OBSERVE, epilog=OBSERVE_EPILOG
    )
    one.add_argument("--server", required=True, metavar="URL", help="address, such as http://127.0.0.1:8188")
    one.add_argument("--workflow", required=True, metavar="FILE", help="a workflow in API format")
    one.add_argument("-o", "--output", required=True, metavar="STATS", help="the statistics file to write")
    one.add_argument("--prompts", metavar="FILE", help="one prompt per line (the workflow's own)")
    one.add_argument("--seeds", type=int, metavar="N", help="runs of each prompt, each with its own seed (4)")
    one.add_argument("--seed", type=int, default=SEED, metavar="S", help=f"first seed; others count up ({SEED})")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return observe(args) if args.action == "observe" else change_pack(args)


def change_pack(args: argparse.Namespace) -> int:
    """Install or uninstall the nodes."""
    from ..comfyui_nodes import pack

    folder, exists = pack.find(Path(args.folder))
    installs = args.action == "install"
    if not exists and not installs:
        raise OptionError(f"{folder} does not exist: nothing to remove")
    verb = ("replace" if exists else "write") if installs else "remove"
    if args.dry_run:
        say(f"dry run: would {verb} {folder}; nothing was changed")
    else:
        (pack.install if installs else pack.uninstall)(folder)
        after = ": restart ComfyUI and find the nodes under convert_to_quant" if installs else ""
        say(f"{'wrote' if verb == 'write' else verb + 'd'} {folder}{after}")
    write_json(args.json, {"folder": str(folder), "action": args.action, "dry_run": args.dry_run})
    return 0


def observe(args: argparse.Namespace) -> int:
    """Run a workflow on a server."""
    from ..checkpoint import check_output, refuse_same_file
    from ..engines.comfyui import remote, workflow
    from ..engines.comfyui.server import Server

    if args.seeds is not None and args.seeds < 1:
        raise OptionError(f"--seeds should be at least 1, found {args.seeds}")
    if args.seed < 0:
        raise OptionError(f"a seed should not be negative, found {args.seed}")
    path, output = Path(args.workflow), Path(args.output)

    def unreadable(problem: str) -> CalibrationError:
        return CalibrationError(problem, path=path, hint="in ComfyUI: File > Export (API)")

    nodes = workflow.parse(read_text(path, unreadable), path)
    prompts = None if args.prompts is None else read_prompts(Path(args.prompts))
    inputs = [Path(name) for name in (args.workflow, args.prompts, args.json) if name not in (None, "-")]
    found: Mapping[str, Statistics] = {}
    idle = 0
    with Server(args.server) as server:
        types = server.types(workflow.classes(nodes))
        plan = workflow.plan(nodes, types, path)
        runs = remote.plan_runs(plan, prompts, args.seeds, args.seed)
        outputs = {model.name: output.with_name(f"{output.stem}_{model.name}{output.suffix}") for model in plan.models}
        if len(outputs) == 1:
            outputs = dict.fromkeys(outputs, output)
        for one in outputs.values():
            refuse_same_file(one, inputs, hint="name another output")
            check_output(one)
        foresee(outputs.values(), dry=args.dry_run)
        tell = print if args.dry_run and args.json != "-" else say  # in a dry run this is the data
        for line in screen(plan, runs, outputs):
            tell(line)
        if args.dry_run:
            tell_missing(plan, types, path)
            say("dry run: nothing was queued, nothing was written")
        else:
            with progress_bar("observing") as progress:
                found, idle = remote.observe(server, plan, runs, FOLDER, progress)
    if idle:
        note(f"{idle} of {plural(len(runs), 'run')} recorded nothing: ComfyUI answered from its cache")
    for name, statistics in found.items():
        statistics.save(outputs[name])
        absent = [layer for layer, ran in zip(statistics.names, statistics.visited, strict=True) if not ran]
        unseen = statistics.unseen
        if silent := [layer for layer in absent if layer not in unseen]:
            note(f"{plural(len(silent), 'layer')} never ran (first: {silent[0]})")
        if unseen:
            note(f"could not see the inputs of {plural(len(unseen), 'layer')} that ran (first: {unseen[0]})")
        seen = f"{plural(int(statistics.visited.sum()), 'layer')} over {plural(statistics.samples, 'sample')}"
        say(f"observed {seen}; {wrote(outputs[name])}")
    write_json(args.json, document(args, plan, runs, outputs, found) | {"idle_runs": idle})
    return 0


def tell_missing(plan: Plan, types: Mapping[str, NodeType], path: Path) -> None:
    """Say which files of models the server does not list that the workflow names.

    Raises:
        CalibrationError: it needs them for recording.
    """
    from ..engines.comfyui.workflow import shown, title

    left_out = plan.left_out()
    needed = []
    for place, file in plan.missing(types):
        where = f"{title(plan.nodes, place.node)} {shown(place.input)}: {shown(file)}"
        if place.node in left_out:
            note(f"not on the server, and not needed: {where}")
        else:
            needed.append(where)
    if needed:
        hint = "put them into its models folders, or choose others in ComfyUI and export the workflow again"
        raise CalibrationError(f"not on the server: {'; '.join(needed)}", path=path, hint=hint)


def screen(plan: Plan, runs: Sequence[Run], outputs: Mapping[str, Path]) -> Iterator[str]:
    """What was found in the workflow, and what will be done with it."""
    from ..engines.comfyui.workflow import shown, title

    def several(names: Sequence[str]) -> str:
        return ", ".join(title(plan.nodes, name) for name in names) or "none"

    def places(found: Sequence[Place]) -> str:
        return ", ".join(f"{title(plan.nodes, place.node)} {shown(place.input)}" for place in found) or "none"

    for model in plan.models:
        yield f"model     {several(model.loaders)}"
        yield f"          sampled by {several(model.samplers)}, recorded into {outputs[model.name]}"
    yield f"prompts   {places(plan.texts)}"
    yield f"seeds     {places(plan.seeds)}"
    if plan.left_out():
        yield f"left out  {several(plan.left_out())}"
    seeds = [run.seed for run in runs if run.seed is not None]
    yield f"runs      {len(runs)}" + (f", seeds {seeds[0]} to {seeds[-1]}" if seeds else "")


def document(
    args: argparse.Namespace,
    plan: Plan,
    runs: Sequence[Run],
    outputs: Mapping[str, Path],
    found: Mapping[str, Statistics],
) -> dict[str, Any]:
    """The report; after a dry run, without what was observed."""
    from dataclasses import asdict

    models = []
    for model in plan.models:
        told: dict[str, Any] = {"name": model.name, "loaders": model.loaders, "samplers": model.samplers}
        told["statistics"] = str(outputs[model.name])
        if (statistics := found.get(model.name)) is not None:
            told |= {
                "fingerprint": statistics.fingerprint,
                "samples": statistics.samples,
                "layers": len(statistics.layers),
                "visited": int(statistics.visited.sum()),
                "provenance": statistics.provenance,
            }
        models.append(told)
    return {
        "server": args.server,
        "workflow": args.workflow,
        "dry_run": args.dry_run,
        "models": models,
        "prompts": [place._asdict() for place in plan.texts],
        "seeds": [place._asdict() for place in plan.seeds],
        "left_out": plan.left_out(),
        "runs": [asdict(run) for run in runs],
    }
