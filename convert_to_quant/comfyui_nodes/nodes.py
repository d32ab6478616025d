"""The nodes, in the form that every ComfyUI loads (V1): classes whose attributes say what goes in and out.

    Load Diffusion Model ─MODEL→ Record Activations ─MODEL→ KSampler ─LATENT→ Save Activation Stats ─→ Calibrate FP8 …
                                        └──────────ACTIVATION_STATS──────────────────↗             └→ Activation Report

ComfyUI runs a node when its inputs changed, and remembers what it gave otherwise. So:

    Record      starts afresh when the model before it changes or with `reset`; else the same recorder keeps adding up.
    Save        always runs. One recorder writes one file, again and again, as its totals grow.
    Calibrate   runs when its inputs changed, or the files that it reads. Statistics of a recorder are there before
    and Report  anything was sampled, so they take them from Save, or wait for a LATENT of their own.

Save Conditioning stands alone: it keeps a prompt's embeddings, for `check --conditioning`. So does Quantize Checkpoint,
which takes statistics where FP8 layers are to have scales from them.

Nodes keep nothing in themselves. A new node is a class and an entry of `NODES`. ComfyUI's newer form (V3) is not
offered: where a pack has both, it loads this one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import naming
from ..best import plan_best
from ..calibrate_activation_scales import Calibration, apply_statistics, calibrate_written, patch_model_with_scales
from ..checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, write_bytes
from ..convert import ConversionPlan, convert, plan_conversion
from ..damaged import refuse_damaged
from ..errors import Error, OptionError
from ..formats import FORMATS, WRITTEN
from ..formats.record import GPUS
from ..options import BITS, BestOptions, ConvertOptions, RunOptions, SolveOptions, inputs_of
from ..solve import METHODS
from ..stats import Statistics
from ..telling import Progress, advance, plural
from . import folders
from .recording import Recorder

if TYPE_CHECKING:
    import torch

STATS = "ACTIVATION_STATS"
NO_CHECKPOINT = "none"
"""What is chosen in a list of checkpoints for a report of ranges alone."""

BEST = "best"
"""What is chosen in the list of formats for a mix of them."""

QUANTIZED = (*(name for name in WRITTEN if FORMATS[name].reader == "ComfyUI"), BEST)
"""What a checkpoint can be quantized to: what ComfyUI reads without further nodes."""

EMBEDDINGS = {"pooled_output": "pooled_prompt_embeds", "attention_mask": "prompt_attention_mask"}
"""What a CONDITIONING has beside its embeddings -> what files of embeddings call it."""

Input = tuple[Any, dict[str, Any]]
Inputs = dict[str, dict[str, Any]]

_SHOWN_NOTES = 20


def _text(tooltip: str, default: str = "", **more: Any) -> Input:
    return "STRING", {"default": default, "tooltip": tooltip, **more}


def _switch(tooltip: str) -> Input:
    return "BOOLEAN", {"default": False, "tooltip": tooltip}


_SOLVING: Mapping[str, Input] = inputs_of(
    SolveOptions,
    {
        "method": {"tooltip": " ".join(f"{name}: {method.words}." for name, method in METHODS.items())},
        "margin": {
            "max": 64.0,
            "step": 0.05,
            "tooltip": "Factor on ranges: room for inputs larger than any that was recorded. 0: as much as costs "
            "nothing.",
        },
        "full_precision_budget": {
            "tooltip": "Share of the multiply-adds that may move to full precision, worst layers first."
        },
    },
)

_OPTIONAL: Mapping[str, Input] = {
    "stats": (STATS, {"tooltip": "From Save Activation Stats, or from Record Activations with a latent."}),
    "latent": ("LATENT", {"tooltip": "Waits for it. Needed where stats come from Record Activations."}),
    "statistics_file": _text("Instead of stats: a file in ComfyUI's output (or input) folder."),
    **inputs_of(SolveOptions, {"percentile": {"min": 0.01, "tooltip": "For that method."}}),
    "allow_partial": _switch("Go on where not all FP8 layers were recorded: the others keep their scales."),
}


def show_text(node_id: str | None, text: str) -> None:
    """Progress text on a node, where a ComfyUI server runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def shown_progress(node_id: str | None) -> Progress:
    """A progress bar on a node, of one piece of work; cancelling in ComfyUI ends that work."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar = ProgressBar(1, node_id)

    def show(done: int, total: int) -> None:
        throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return show


def statistics_of(recorded: Recorder | Statistics) -> Statistics:
    """What a link of type ACTIVATION_STATS carries, as it is now."""
    return recorded.statistics() if isinstance(recorded, Recorder) else recorded


def solving(
    *,
    stats: Recorder | Statistics | None = None,
    latent: Mapping[str, Any] | None = None,
    statistics_file: str = "",
    margin: float = 0.0,
    allow_partial: bool = False,
    **options: Any,
) -> tuple[SolveOptions, Statistics, bool]:
    """What the inputs of `_SOLVING` and `_OPTIONAL` say: how to solve, from what, and whether some layers may lack.

    Raises:
        OptionError: both or neither of a link and a file were given, the link's statistics come before anything was
            sampled, or an option is out of range.
        StatisticsError: there is no such file, or it holds no statistics.
        CalibrationError: nothing was recorded.
    """
    how = SolveOptions(margin=margin or None, **options)
    if (stats is None) != bool(statistics_file.strip()):
        raise OptionError("statistics come from a link or from a file: exactly one of stats and statistics_file")
    if isinstance(stats, Recorder) and latent is None:
        raise OptionError(
            "this node would run before the sampler",
            hint="take stats from Save Activation Stats, or connect the sampler's LATENT to this node, too",
        )
    found = Statistics.load(folders.statistics_file(statistics_file)) if stats is None else statistics_of(stats)
    return how, found, allow_partial


class Node:
    """What all nodes have in common. The docstring of each is what ComfyUI shows of it."""

    DESCRIPTION: str
    CATEGORY = "convert_to_quant"
    OUTPUT_NODE = True
    REQUIRED: Mapping[str, Input] = {}
    OPTIONAL: Mapping[str, Input] = {}
    HIDDEN: Mapping[str, str] = {"unique_id": "UNIQUE_ID"}

    def __init_subclass__(cls) -> None:
        cls.DESCRIPTION = " ".join((cls.__doc__ or "").split())

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        return {"required": {**cls.REQUIRED}, "optional": {**cls.OPTIONAL}, "hidden": {**cls.HIDDEN}}


class Saving(Node):
    """A node that writes into ComfyUI's output folder."""

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a bad name before anything is sampled."""
        return _refusal(lambda: filename_prefix is None or folders.next_output(filename_prefix))


class Reading(Node):
    """A node that takes a checkpoint, how to solve, its own inputs, and statistics.

    Attributes:
        CHECKPOINT: what is said of the checkpoint.
        INSTEAD: what can be chosen in its place.
        SOLVING: how to solve.
    """

    OPTIONAL = _OPTIONAL
    CHECKPOINT = "A checkpoint of the recorded model with layers in FP8. Layers in other formats stay as they are."
    INSTEAD: tuple[str, ...] = ()
    SOLVING = _SOLVING

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        checkpoint = ([*cls.INSTEAD, *folders.checkpoint_names()], {"tooltip": cls.CHECKPOINT})
        return {**super().INPUT_TYPES(), "required": {"checkpoint": checkpoint, **cls.SOLVING, **cls.REQUIRED}}

    @classmethod
    def IS_CHANGED(cls, checkpoint: str | None = None, statistics_file: str = "", **_inputs: Any) -> str:
        """When the files that are read change, also twice within one tick of the clock: a file of ours is a new one."""
        paths = []
        try:
            if checkpoint not in (None, NO_CHECKPOINT):
                paths.append(folders.choose_checkpoint(str(checkpoint)).path)
            if statistics_file.strip():
                paths.append(folders.statistics_file(statistics_file))
        except Error:
            return ""  # running says what is wrong
        stats = [path.stat() for path in paths]
        return " ".join(f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for stat in stats)


class Making(Reading):
    """A node that makes a new checkpoint.

    Attributes:
        ENDING: of its name, where the call names none; None for the format.
    """

    ENDING: str | None = None
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("file", "report")
    OUTPUT_TOOLTIPS = ("The new checkpoint, in its models folder.", "What was done.")

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        checkpoint: str | None = None,
        output_name: str | None = None,
        overwrite: bool | None = None,
        format: str | None = None,  # noqa: A002  # the input's name
        exclude: str | None = None,
    ) -> bool | str:
        """Refuse what is known to be wrong before anything is sampled; None comes from another node, or by default."""

        def check() -> None:
            conversion_options(BEST if format is None else format, exclude or "")
            if checkpoint is not None:
                choice, ending = folders.choose_checkpoint(checkpoint), cls.ENDING if format is None else format
                if output_name is not None and overwrite is not None and ending is not None:
                    choice.output(output_name, overwrite, ending)

        return _refusal(check)

    def made(self, choice: folders.Choice, output: Path, lines: Sequence[str], node_id: str | None) -> dict[str, Any]:
        """Say what was done, and where the new file is."""
        more = len(lines) - _SHOWN_NOTES
        text = "\n".join(lines[:_SHOWN_NOTES]) + (f"\nand {more} more notes" if more > 0 else "")
        file = output.relative_to(choice.root).as_posix()
        show_text(node_id, f"{lines[0]}\n{file}")
        return {"ui": {"text": [f"{file}\n{text}"]}, "result": (file, text)}


class RecordActivations(Node):
    """Records what every linear layer receives while a sampler runs this MODEL.

    Nothing else changes: latents are the same to the last bit. Totals add up over prompts and seeds until the model
    changes. Best done with the 16-bit model.
    """

    FUNCTION = "record"
    OUTPUT_NODE = False
    REQUIRED: Mapping[str, Input] = {"model": ("MODEL", {"tooltip": "Behind all LoRAs, in front of the sampler."})}
    OPTIONAL: Mapping[str, Input] = {
        "statistics_file": _text(
            "Go on from this file, made by Save Activation Stats: its path in ComfyUI's output (or input) folder. "
            "Empty: start from nothing."
        ),
        "reset": _switch("Forget what was recorded, each time this is queued."),
    }
    HIDDEN: Mapping[str, str] = {}
    RETURN_TYPES = ("MODEL", STATS)
    RETURN_NAMES = ("model", "stats")
    OUTPUT_TOOLTIPS = ("Records while it samples.", "Grows with every sampling.")

    @classmethod
    def IS_CHANGED(cls, reset: bool = False, **_inputs: Any) -> float | str:
        """Never the same with `reset`."""
        return math.nan if reset else ""

    def record(self, model: Any, statistics_file: str = "", reset: bool = False) -> tuple[Any, Recorder]:  # noqa: ARG002
        """A clone of the model, and the recorder that sees it run."""
        before = Statistics.load(folders.statistics_file(statistics_file)) if statistics_file.strip() else None
        recorder = Recorder(before)
        return recorder.attach(model), recorder


class SaveActivationStats(Saving):
    """Writes what was recorded into ComfyUI's output folder, after the sampler is done.

    The same recording goes to the same file; another one, or one whose file was moved away, gets the next number.
    """

    FUNCTION = "save"
    REQUIRED: Mapping[str, Input] = {
        "stats": (STATS, {"tooltip": "From Record Activations."}),
        "latent": ("LATENT", {"tooltip": "From the sampler: waits until it is done."}),
        "filename_prefix": _text("Folder and name in ComfyUI's output folder.", "activation_stats/stats"),
    }
    RETURN_TYPES = (STATS, "STRING")
    RETURN_NAMES = ("stats", "file")
    OUTPUT_TOOLTIPS = ("As saved: what follows runs after sampling.", "The file, in ComfyUI's output folder.")

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        """Always: the recorder is the same, and what it holds is not."""
        return math.nan

    def save(
        self,
        stats: Recorder | Statistics,
        latent: Mapping[str, Any],  # noqa: ARG002
        filename_prefix: str,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Write them, and pass them on as they are now."""
        statistics = statistics_of(stats)
        recording, files = (stats.recording, stats.files) if isinstance(stats, Recorder) else ("", {})
        path, written = files.get(filename_prefix, (None, None))
        if path is None or folders.written_at(path) != written:  # moved away, and another may have its name
            path = folders.next_output(filename_prefix)
        folders.prepare(path)
        statistics.save(path)
        files[filename_prefix] = (path, folders.written_at(path))
        file = folders.output_name(path)
        layers = plural(int(statistics.visited.sum()), "layer")
        text = f"{layers}, {plural(statistics.samples, 'sample')}: {file}"
        if unseen := statistics.unseen:
            text += f"\ncould not see the inputs of {plural(len(unseen), 'layer')} that ran (first: {unseen[0]})"
        show_text(unique_id, text)
        entry = {**folders.as_output(path), "recording": recording, "samples": statistics.samples}
        return {"ui": {"text": [text], "statistics": [entry]}, "result": (statistics, file)}


class SaveConditioning(Saving):
    """Writes the embeddings of a prompt into ComfyUI's output folder.

    convert_to_quant's check and observe take them with --conditioning. Each gets the next number.
    """

    FUNCTION = "save"
    REQUIRED: Mapping[str, Input] = {
        "conditioning": ("CONDITIONING", {"tooltip": "From CLIP Text Encode, as the sampler gets it."}),
        "filename_prefix": _text("Folder and name in ComfyUI's output folder.", "conditioning/prompt"),
    }
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_TOOLTIPS = ("The file, in ComfyUI's output folder.",)

    def save(
        self,
        conditioning: Sequence[tuple[torch.Tensor, Mapping[str, Any]]],
        filename_prefix: str,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Write it."""
        from ..engines.prompts import Prompts

        prompts = Prompts(embeddings_of(conditioning))
        path = folders.next_output(filename_prefix)
        folders.prepare(path)
        prompts.save(path)
        file = folders.output_name(path)
        text = f"{plural(prompts.count, 'prompt')}: {file}"
        show_text(unique_id, text)
        return {"ui": {"text": [text]}, "result": (file,)}


class CalibrateFP8Checkpoint(Making):
    """Chooses the input scale of every FP8 layer, and the layers that need full precision, from what was recorded.

    Writes a new checkpoint into the models folder. The chosen checkpoint stays as it is.
    """

    FUNCTION = "calibrate"
    ENDING = "calibrated"
    REQUIRED: Mapping[str, Input] = {
        "output_name": _text(
            "Name of the new file in the checkpoint's models folder. Empty: the checkpoint's name with _calibrated."
        ),
        "overwrite": _switch("Replace a file of that name."),
    }

    def calibrate(
        self,
        *,
        checkpoint: str,
        output_name: str = "",
        overwrite: bool = False,
        unique_id: str | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Solve, and write the new checkpoint."""
        choice = folders.choose_checkpoint(checkpoint)
        output = choice.output(output_name, overwrite, self.ENDING)
        options, statistics, partial = solving(**inputs)
        show_text(unique_id, f"calibrating {choice.path.name}")
        with open_checkpoint(choice.path) as opened:
            calibration = apply_statistics(opened, statistics, options, force=partial)
            replaced = folders.prepare(output)
            patch = patch_model_with_scales(opened, calibration, output)
        return self.made(choice, output, [*summary(calibration), *replaced, *patch.notes], unique_id)


class QuantizeCheckpoint(Making):
    """Quantizes a checkpoint in 16 or 32 bits: to one format, or each layer to the one that keeps most at a size.

    Writes a new checkpoint into the models folder. The chosen checkpoint stays as it is. "best" runs the model on noise
    first, on ComfyUI's device. FP8 layers get their input scales from statistics, where they are given.
    """

    FUNCTION = "quantize"
    CHECKPOINT = "A checkpoint in 16 or 32 bits."
    SOLVING: Mapping[str, Input] = {}
    REQUIRED: Mapping[str, Input] = {
        "format": (
            list(QUANTIZED),
            {
                "default": BEST,
                "tooltip": f"{BEST}: the mix that keeps most. "
                + " ".join(f"{name}: fast on {FORMATS[name].cards}." for name in QUANTIZED if name != BEST),
            },
        )
    }
    OPTIONAL: Mapping[str, Input] = {
        **inputs_of(
            BestOptions,
            {
                "bits": {
                    "default": 8.0,
                    "min": BITS.least,
                    "step": 0.25,
                    "tooltip": f"For {BEST}: bits per weight at most, with scales.",
                }
            },
        ),
        "gpu": (list(GPUS), {"default": "any", "tooltip": f"For {BEST}: a card that multiplies all of its formats."}),
        "exclude": _text(
            "Regular expressions, one per line: layers in whose names one is found stay as they are.", multiline=True
        ),
        "output_name": _text(
            "Name of the new file in the checkpoint's models folder. Empty: the checkpoint's name with the format."
        ),
        "overwrite": _switch("Replace a file of that name."),
        **{name: _OPTIONAL[name] for name in ("stats", "latent", "statistics_file", "allow_partial")},
    }

    def quantize(
        self,
        *,
        checkpoint: str,
        format: str,  # noqa: A002
        bits: float = 8.0,
        gpu: str = "any",
        exclude: str = "",
        output_name: str = "",
        overwrite: bool = False,
        unique_id: str | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Choose formats, and write the new checkpoint."""
        choice = folders.choose_checkpoint(checkpoint)
        output = choice.output(output_name, overwrite, format)
        options, solved = conversion_options(format, exclude), None
        if inputs.get("stats") is not None or inputs.get("statistics_file", "").strip():
            solved = solving(**inputs)
        with open_checkpoint(choice.path) as opened:
            plan = plan_conversion(opened, options)
            refuse_damaged(opened, plan.table)
            if solved is not None:  # another model's statistics show before the work as well as after
                wanted = {layer.name: layer for layer, _ in plan.quantized}
                naming.fitting(solved[1], plan.table, wanted, force=solved[2])
            done = plan.summary()
            if format == BEST:
                show_text(unique_id, f"trying formats on {choice.path.name}")
                shown = RunOptions(device=_device())
                best = plan_best(
                    opened, options, BestOptions(bits=bits, gpu=gpu), shown, progress=shown_progress(unique_id)
                )
                plan, done = best.plan, best.summary()
            show_text(unique_id, f"quantizing {choice.path.name}")
            replaced = folders.prepare(output)
            scaled = write_quantized(opened, plan, output, solved, shown_progress(unique_id))
        return self.made(choice, output, [done, *replaced, *scaled, *plan.readers(), *plan.notes], unique_id)


class ActivationReport(Reading):
    """Draws what each layer receives on the range of FP8, and says which layers are at risk.

    With a checkpoint: at its present scales, and at those that Calibrate FP8 Checkpoint would choose with the same
    settings. Changes no checkpoint.
    """

    FUNCTION = "draw"
    CHECKPOINT = f"A checkpoint of the recorded model with layers in FP8. {NO_CHECKPOINT}: what was recorded alone."
    INSTEAD = (NO_CHECKPOINT,)
    REQUIRED: Mapping[str, Input] = {
        "filename_prefix": _text(
            "Folder and name in ComfyUI's output folder, for a page to open in a browser. Empty: no page.",
            "activation_stats/report",
        )
    }
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "verdict")
    OUTPUT_TOOLTIPS = ("To preview or save.", "What is at risk, and what calibration changes.")

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a bad name before anything is sampled."""
        return _refusal(lambda: not (filename_prefix or "").strip() or folders.next_output(str(filename_prefix)))

    def draw(
        self,
        *,
        checkpoint: str = NO_CHECKPOINT,
        filename_prefix: str = "activation_stats/report",
        unique_id: str | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Solve, draw, and write the page."""
        import numpy as np
        import torch

        from ..report import figures, page, picture

        model = None if checkpoint == NO_CHECKPOINT else folders.choose_checkpoint(checkpoint).path
        path = folders.next_output(filename_prefix, ".html") if filename_prefix.strip() else None
        options, statistics, partial = solving(**inputs)
        show_text(unique_id, "drawing")
        report = figures.build(figures.Source(statistics, model, options), force=partial)
        text = "\n".join((report.verdict.headline, *report.verdict.points))
        pixels = np.asarray(picture.draw(report).convert("RGB"), np.float32) / 255
        image = torch.from_numpy(pixels)[None]  # as ComfyUI has images: [1, height, width, 3], 0 to 1
        pages = []
        if path is not None:
            folders.prepare(path)
            write_bytes(path, page.render(report.document()).encode())
            pages = [folders.as_output(path)]
        show_text(unique_id, text)
        return {"ui": {"text": [text], "pages": pages}, "result": (image, text)}


def embeddings_of(conditioning: Sequence[tuple[torch.Tensor, Mapping[str, Any]]]) -> dict[str, torch.Tensor]:
    """The tensors of a file of embeddings.

    Args:
        conditioning: as ComfyUI has it: embeddings [prompts, tokens, channels] each, with what goes with them.

    Returns:
        By name, each [prompts, ...], the prompts of all entries.

    Raises:
        OptionError: there are no entries, or their lengths differ, or what they have.
    """
    import torch

    entries = [
        {"prompt_embeds": context} | {name: more[key] for key, name in EMBEDDINGS.items() if more.get(key) is not None}
        for context, more in conditioning
    ]
    shapes = [", ".join(f"{name} {list(value.shape[1:])}" for name, value in entry.items()) for entry in entries]
    if len(set(shapes)) != 1:
        found = "; ".join(dict.fromkeys(shapes)) or "none"
        raise OptionError(
            f"prompts that go into one file have the same length and parts, found {found}",
            hint="save each CONDITIONING by a node of its own; check takes several files",
        )
    return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}


def summary(calibration: Calibration) -> list[str]:
    """What a calibration did: a line of numbers, then what a user should know."""
    scales = calibration.scales.values()
    full = sum(result.full_precision_after for result in calibration.results)
    line = f"calibrated {len(scales)} of {len(calibration.results)} layers, {full} in full precision"
    if scales:
        line += f", scales {min(scales):.3g} to {max(scales):.3g}"
    return [line, *calibration.notes]


def conversion_options(name: str, exclude: str) -> ConvertOptions:
    """What Quantize Checkpoint was asked for.

    Args:
        name: one of `QUANTIZED`.
        exclude: regular expressions, one per line.

    Raises:
        OptionError: there is no such format, or a line is no regular expression.
    """
    if name not in QUANTIZED:
        raise OptionError(f"no format {name!r} that ComfyUI reads", hint=f"one of {', '.join(QUANTIZED)}")
    patterns = tuple(line.strip() for line in exclude.splitlines() if line.strip())
    return ConvertOptions(format="int8" if name == BEST else name, exclude=patterns)  # INT8 takes every layer


def write_quantized(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    output: Path,
    solved: tuple[SolveOptions, Statistics, bool] | None,
    progress: Progress,
) -> list[str]:
    """Write a checkpoint, with input scales out of statistics where they are given.

    Args:
        checkpoint: in high precision.
        plan: what becomes of it.
        output: the new file.
        solved: see `solving`.
        progress: told of the bytes that were done.

    Returns:
        What a user should know of the input scales.
    """
    static = [each for each in plan.decisions if each.format is not None and each.format.static]
    told: list[str] = []

    def calibrate(writer: CheckpointWriter) -> None:
        assert solved is not None
        options, statistics, partial = solved
        calibration, patch = calibrate_written(
            writer, checkpoint.path, lambda made: apply_statistics(made, statistics, options, force=partial)
        )
        told.extend([*summary(calibration), *patch.notes])

    if solved is not None and not static:
        told.append("statistics were not used: readers scale the inputs of all layers as they come")
    if solved is None and any(each.input_scale is None for each in static):
        told.append("input scales are not measured: give stats, or use Calibrate FP8 Checkpoint on the new file")
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    calibrating = calibrate if solved is not None and static else None
    device = _device()
    convert(
        checkpoint, plan, output, device=device if device.startswith("cuda") else "cpu",
        progress=advance(progress, total), before_commit=calibrating,
    )  # fmt: skip
    return told


def _device() -> str:
    """Where ComfyUI runs models."""
    from comfy.model_management import get_torch_device

    return str(get_torch_device())


class _Refusal(str):
    """Why not. ComfyUI asks for its text once for each input that the check takes, and shows all of them."""

    said = False

    def __str__(self) -> str:
        if self.said:
            return "see above"
        self.said = True
        return super().__str__()


def _refusal(check: Any) -> bool | str:
    """True, or why not."""
    try:
        check()
    except Error as error:
        return _Refusal(error)
    return True


NODES: Mapping[str, tuple[type, str]] = {
    "ConvertToQuantRecordActivations": (RecordActivations, "Record Activations"),
    "ConvertToQuantSaveActivationStats": (SaveActivationStats, "Save Activation Stats"),
    "ConvertToQuantSaveConditioning": (SaveConditioning, "Save Conditioning"),
    "ConvertToQuantCalibrateFP8Checkpoint": (CalibrateFP8Checkpoint, "Calibrate FP8 Checkpoint"),
    "ConvertToQuantQuantizeCheckpoint": (QuantizeCheckpoint, "Quantize Checkpoint"),
    "ConvertToQuantActivationReport": (ActivationReport, "Activation Report"),
}
"""Name in workflows, which never changes -> the node, and its title."""

NODE_CLASS_MAPPINGS = {name: kind for name, (kind, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
