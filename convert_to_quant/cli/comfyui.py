"""`convert_to_quant comfyui install|uninstall|observe`: install nodes, or record a workflow on a running ComfyUI."""

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
    from ..engines.comfyui.workflow import Plan
    from ..stats import Statistics

DESCRIPTION = "Install our nodes in ComfyUI, or record the models of a workflow on a running ComfyUI."
EPILOG = """\
examples:
  convert_to_quant comfyui install ~/ComfyUI
  convert_to_quant comfyui observe --server http://127.0.0.1:8188 \\
      --workflow flux_api.json -o flux.safetensors
  convert_to_quant comfyui uninstall ~/ComfyUI
"""

INSTALL = """\
Install our nodes in ComfyUI: a folder in custom_nodes with one small file that imports this package. Run this command
with ComfyUI's Python, so that the nodes find the package."""

UNINSTALL = "Remove the folder that install wrote. A folder that contains anything else stays."

OBSERVE = """\
Run your workflow on a running ComfyUI that has our nodes, with many prompts and seeds, and fetch statistics of its
model's linear layers, for `apply`. Inserts a recorder between model and sampler. Decodes and saves no images."""
OBSERVE_EPILOG = """\
examples:
  convert_to_quant comfyui observe --server http://127.0.0.1:8188 \\
      --workflow flux_api.json -o flux.safetensors
  convert_to_quant comfyui observe --server http://127.0.0.1:8188 \\
      --workflow wan_api.json --prompts prompts.txt --seeds 2 -o wan.safetensors

Export the workflow in API format: in ComfyUI, File > Export (API). If it has several models (Wan has two), each gets
its own file, with the model's name appended. Contacts no other address. Ctrl-C cancels the run on the server;
statistics of earlier runs stay in ComfyUI's output folder, in activation_stats.
"""

SEED = 42
FOLDER = "activation_stats"
"""In ComfyUI's output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for name, does, text in (
        ("install", "install our nodes in ComfyUI", INSTALL),
        ("uninstall", "remove our nodes", UNINSTALL),
    ):
        example = f"example:\n  convert_to_quant comfyui {name} ~/ComfyUI\n"
        one = actions.add_parser(name, help=does, description=text, epilog=example)
        one.add_argument("folder", metavar="DIR", help="ComfyUI's folder, which contains custom_nodes")
    one = actions.add_parser(
        "observe",
        help="record the models of a workflow on a running ComfyUI",
        description=OBSERVE,
        epilog=OBSERVE_EPILOG,
    )
    one.add_argument("--server", required=True, metavar="URL", help="address, such as http://127.0.0.1:8188")
    one.add_argument("--workflow", required=True, metavar="FILE", help="workflow in API format")
    one.add_argument("-o", "--output", required=True, metavar="STATS", help="statistics file to write")
    one.add_argument("--prompts", metavar="FILE", help="one prompt per line (the workflow's own)")
    one.add_argument("--seeds", type=int, metavar="N", help="runs per prompt, each with its own seed (4)")
    one.add_argument("--seed", type=int, default=SEED, metavar="S", help=f"first seed; each run adds 1 ({SEED})")


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
        return CalibrationError(problem, path=path, hint="in ComfyUI, use File > Export (API)")

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
            refuse_same_file(one, inputs, hint="choose another output")
            check_output(one)
        foresee(outputs.values(), dry=args.dry_run)
        tell = print if args.dry_run and args.json != "-" else say  # in a dry run this is the data
        for line in screen(plan, runs, outputs):
            tell(line)
        if args.dry_run:
            if missing := plan.missing(types):
                hint = "copy them to its models folders, or choose others in ComfyUI and export the workflow again"
                raise CalibrationError(f"missing on the server: {'; '.join(missing)}", path=path, hint=hint)
            say("dry run: nothing was queued or written")
        else:
            with progress_bar("observing") as progress:
                found, idle = remote.observe(server, plan, runs, FOLDER, progress)
    if idle:
        note(f"{idle} of {plural(len(runs), 'run')} recorded nothing: ComfyUI used its cache")
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


def screen(plan: Plan, runs: Sequence[Run], outputs: Mapping[str, Path]) -> Iterator[str]:
    """What was found in the workflow, and what will run."""
    for model in plan.models:
        yield f"model     {plan.listed(model.loaders)}"
        yield f"          sampled by {plan.listed(model.samplers)}, recorded into {outputs[model.name]}"
    yield f"prompts   {plan.listed(plan.texts)}"
    yield f"seeds     {plan.listed(plan.seeds)}"
    if plan.left_out():
        yield f"left out  {plan.listed(plan.left_out())}"
    seeds = [run.seed for run in runs if run.seed is not None]
    yield f"runs      {len(runs)}" + (f", seeds {seeds[0]} to {seeds[-1]}" if seeds else "")


def document(
    args: argparse.Namespace,
    plan: Plan,
    runs: Sequence[Run],
    outputs: Mapping[str, Path],
    found: Mapping[str, Statistics],
) -> dict[str, Any]:
    """The JSON report; without results after a dry run."""
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
