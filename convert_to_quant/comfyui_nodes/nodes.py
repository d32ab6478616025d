"""ComfyUI nodes in the V1 form: classes whose attributes describe inputs and outputs.

    Load Diffusion Model ─MODEL→ Record Activations ─MODEL→ KSampler ─LATENT→ Save Activation Stats ─→ Calibrate FP8 …
                                        └──────────ACTIVATION_STATS──────────────────↗             └→ Activation Report

ComfyUI runs a node if its inputs changed and caches its outputs otherwise. Therefore:

    Record      starts a new recording if the model before it changes, or with `reset`; otherwise the recorder
                accumulates.
    Save        always runs. Each recorder keeps one file, which is rewritten as its totals grow.
    Calibrate   run if their inputs or the files they read changed. A recorder exists before sampling, so they take
    and Report  statistics from Save, or wait for a LATENT of their own.

Save Conditioning writes prompt embeddings for `check --conditioning`. Quantize Checkpoint accepts statistics for the
input scales of FP8 layers.

Nodes have no state. A new node is a class and an entry of `NODES`. There is no V3 form: ComfyUI loads only V1 from a
pack that has both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from ..methods import METHODS
from ..options import BITS, BestOptions, ConvertOptions, RunOptions, SolveOptions, inputs_of
from ..stats import Statistics
from ..telling import Progress, advance, plural
from . import folders
from .recording import Recorder

if TYPE_CHECKING:
    import torch

STATS = "ACTIVATION_STATS"
NO_CHECKPOINT = "none"
"""Entry of the checkpoint list for a report without a checkpoint."""

BEST = "best"
"""Entry of the format list for a mix of formats."""

QUANTIZED = (*(name for name in WRITTEN if FORMATS[name].reader == "ComfyUI"), BEST)
"""Formats that ComfyUI reads without further nodes."""

EMBEDDINGS = {"pooled_output": "pooled_prompt_embeds", "attention_mask": "prompt_attention_mask"}
"""Key in a CONDITIONING -> name in a file of embeddings."""

Input = tuple[Any, dict[str, Any]]
Inputs = dict[str, dict[str, Any]]

_SHOWN_NOTES = 20


def _text(tooltip: str, default: str = "", **more: Any) -> Input:
    return "STRING", {"default": default, "tooltip": tooltip, **more}


def _by_gpus() -> Iterator[str]:
    """Formats with the same native GPUs, and these GPUs."""
    for gpus in dict.fromkeys(FORMATS[name].cards for name in QUANTIZED[:-1]):
        yield f"{', '.join(name for name in QUANTIZED[:-1] if FORMATS[name].cards == gpus)} ({gpus})"


def _switch(tooltip: str) -> Input:
    return "BOOLEAN", {"default": False, "tooltip": tooltip}


OVERWRITE = _switch("Replace an existing file of that name. The source checkpoint is never replaced.")

_SOLVING: Mapping[str, Input] = inputs_of(
    SolveOptions,
    {
        "method": {
            "tooltip": "How a layer's range is chosen. "
            + " ".join(f"{name}: {method.words}." for name, method in METHODS.items())
        },
        "margin": {
            "max": 64.0,
            "step": 0.05,
            "tooltip": "Multiplies every range, as headroom for inputs larger than recorded. 0: automatic, as much "
            "headroom as costs no accuracy.",
        },
        "full_precision_budget": {
            "tooltip": "Share of the model's compute that may run in full precision, from 0 to 1. Moves the layers "
            "with the largest error first."
        },
    },
)

_OPTIONAL: Mapping[str, Input] = {
    "stats": (STATS, {"tooltip": "From Save Activation Stats. From Record Activations only with latent connected."}),
    "latent": (
        "LATENT",
        {"tooltip": "From the sampler: this node waits for it. Required if stats come from Record Activations."},
    ),
    "statistics_file": _text("Instead of stats: path of a statistics file in ComfyUI's output or input folder."),
    **inputs_of(
        SolveOptions, {"percentile": {"min": 0.01, "tooltip": "For method percentile: larger inputs are clipped."}}
    ),
    "allow_partial": _switch("Continue if some FP8 layers were not recorded. These keep their current scales."),
}


def show_text(node_id: str | None, text: str) -> None:
    """Show progress text on a node, if a ComfyUI server runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def shown_progress(node_id: str | None) -> Progress:
    """A progress bar on a node; cancelling in ComfyUI interrupts the work."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar = ProgressBar(1, node_id)

    def show(done: int, total: int) -> None:
        throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return show


def statistics_of(recorded: Recorder | Statistics) -> Statistics:
    """The current statistics of an ACTIVATION_STATS link."""
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
    """Solver options, statistics and `allow_partial`, from the inputs of `_SOLVING` and `_OPTIONAL`.

    Raises:
        OptionError: not exactly one of `stats` and `statistics_file` is given, a recorder comes without a latent, or
            an option is out of range.
        StatisticsError: the file is missing or not a statistics file.
        CalibrationError: nothing was recorded.
    """
    how = SolveOptions(margin=margin or None, **options)
    if (stats is None) != bool(statistics_file.strip()):
        raise OptionError("connect stats or set statistics_file, but not both")
    if isinstance(stats, Recorder) and latent is None:
        raise OptionError(
            "this node would run before the sampler",
            hint="connect stats from Save Activation Stats, or also connect the sampler's LATENT to this node",
        )
    found = Statistics.load(folders.statistics_file(statistics_file)) if stats is None else statistics_of(stats)
    return how, found, allow_partial


class Node:
    """Base of all nodes. ComfyUI shows a node's docstring as its description."""

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
        """The inputs."""
        return {"required": {**cls.REQUIRED}, "optional": {**cls.OPTIONAL}, "hidden": {**cls.HIDDEN}}


class Saving(Node):
    """A node that writes to ComfyUI's output folder."""

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Reject an invalid name before sampling."""
        return _refusal(lambda: filename_prefix is None or folders.next_output(filename_prefix))


class Reading(Node):
    """A node that reads a checkpoint and statistics.

    Attributes:
        CHECKPOINT: tooltip of the checkpoint list.
        INSTEAD: further entries of that list.
        SOLVING: inputs for the solver.
    """

    OPTIONAL = _OPTIONAL
    CHECKPOINT = "An FP8 checkpoint of the recorded model. Layers in other formats stay unchanged."
    INSTEAD: tuple[str, ...] = ()
    SOLVING = _SOLVING

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The inputs."""
        checkpoint = ([*cls.INSTEAD, *folders.checkpoint_names()], {"tooltip": cls.CHECKPOINT})
        return {**super().INPUT_TYPES(), "required": {"checkpoint": checkpoint, **cls.SOLVING, **cls.REQUIRED}}

    @classmethod
    def IS_CHANGED(cls, checkpoint: str | None = None, statistics_file: str = "", **_inputs: Any) -> str:
        """Changes with the files it reads; the inode tells two of our writes within one clock tick apart."""
        paths = []
        try:
            if checkpoint not in (None, NO_CHECKPOINT):
                paths.append(folders.choose_checkpoint(str(checkpoint)).path)
            if statistics_file.strip():
                paths.append(folders.statistics_file(statistics_file))
        except Error:
            return ""  # reported when the node runs
        stats = [path.stat() for path in paths]
        return " ".join(f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for stat in stats)


class Making(Reading):
    """A node that writes a new checkpoint.

    Attributes:
        ENDING: suffix of the default output name; None: the format.
    """

    FUNCTION = "make"
    ENDING: str | None = None
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("file", "report")
    OUTPUT_TOOLTIPS = ("Path of the new checkpoint in its models folder.", "A summary of what was done.")

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        checkpoint: str | None = None,
        output_name: str | None = None,
        overwrite: bool | None = None,
        format: str | None = None,  # noqa: A002  # the input's name
        exclude: str | None = None,
    ) -> bool | str:
        """Reject invalid inputs before sampling. None: set by another node, or left at its default."""

        def check() -> None:
            conversion_options(BEST if format is None else format, exclude or "")
            if checkpoint is not None:
                choice, ending = folders.choose_checkpoint(checkpoint), cls.ENDING if format is None else format
                if output_name is not None and overwrite is not None and ending is not None:
                    choice.output(output_name, overwrite, ending)

        return _refusal(check)

    def make(
        self,
        *,
        checkpoint: str,
        output_name: str = "",
        overwrite: bool = False,
        unique_id: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write the new checkpoint, and report what was done."""
        choice = folders.choose_checkpoint(checkpoint)
        output = choice.output(output_name, overwrite, self.ENDING or more["format"])
        with open_checkpoint(choice.path) as opened:
            lines = self.write(opened, output, unique_id, **more)
        left_out = len(lines) - _SHOWN_NOTES
        text = "\n".join(lines[:_SHOWN_NOTES]) + (f"\nand {left_out} more notes" if left_out > 0 else "")
        file = output.relative_to(choice.root).as_posix()
        show_text(unique_id, f"{lines[0]}\n{file}")
        return {"ui": {"text": [f"{file}\n{text}"]}, "result": (file, text)}

    def write(self, opened: Checkpoint, output: Path, node_id: str | None) -> list[str]:
        """Write the new checkpoint; returns a line that says what was done, then notes."""
        raise NotImplementedError


class RecordActivations(Node):
    """Records the inputs of every linear layer while a sampler runs this MODEL.

    Images stay bit-identical. Statistics accumulate over prompts and seeds until the model changes. Record the 16-bit
    model if you can.
    """

    FUNCTION = "record"
    OUTPUT_NODE = False
    REQUIRED: Mapping[str, Input] = {
        "model": ("MODEL", {"tooltip": "The model with all LoRAs applied, as you would connect it to the sampler."})
    }
    OPTIONAL: Mapping[str, Input] = {
        "statistics_file": _text(
            "Continue from a file of Save Activation Stats: its path in ComfyUI's output or input folder. Empty: start "
            "a new recording."
        ),
        "reset": _switch("Start a new recording on every run."),
    }
    HIDDEN: Mapping[str, str] = {}
    RETURN_TYPES = ("MODEL", STATS)
    RETURN_NAMES = ("model", "stats")
    OUTPUT_TOOLTIPS = ("Connect this to the sampler.", "Statistics of everything recorded so far.")

    @classmethod
    def IS_CHANGED(cls, reset: bool = False, **_inputs: Any) -> float | str:
        """Always changed with `reset`."""
        return math.nan if reset else ""

    def record(self, model: Any, statistics_file: str = "", reset: bool = False) -> tuple[Any, Recorder]:  # noqa: ARG002
        """A clone of the model, and its recorder."""
        before = Statistics.load(folders.statistics_file(statistics_file)) if statistics_file.strip() else None
        recorder = Recorder(before)
        return recorder.attach(model), recorder


class SaveActivationStats(Saving):
    """Saves recorded statistics to ComfyUI's output folder when the sampler is done.

    Each recording keeps one file, which grows with every run. A new recording gets the next number.
    """

    FUNCTION = "save"
    REQUIRED: Mapping[str, Input] = {
        "stats": (STATS, {"tooltip": "From Record Activations."}),
        "latent": ("LATENT", {"tooltip": "From the sampler: this node waits for it."}),
        "filename_prefix": _text("Subfolder and name in ComfyUI's output folder.", "activation_stats/stats"),
    }
    RETURN_TYPES = (STATS, "STRING")
    RETURN_NAMES = ("stats", "file")
    OUTPUT_TOOLTIPS = (
        "The saved statistics, for nodes that run after sampling.",
        "Path of the file in the output folder.",
    )

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        """Always changed: the recorder stays the same, its totals do not."""
        return math.nan

    def save(
        self,
        stats: Recorder | Statistics,
        latent: Mapping[str, Any],  # noqa: ARG002
        filename_prefix: str,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Write the statistics, and pass on a snapshot."""
        statistics = statistics_of(stats)
        recording, files = (stats.recording, stats.files) if isinstance(stats, Recorder) else ("", {})
        path, written = files.get(filename_prefix, (None, None))
        if path is None or folders.written_at(path) != written:  # moved or replaced
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
    """Saves the embeddings of a prompt to ComfyUI's output folder.

    Use the file with --conditioning of convert_to_quant check and observe. Every run writes a new file.
    """

    FUNCTION = "save"
    REQUIRED: Mapping[str, Input] = {
        "conditioning": ("CONDITIONING", {"tooltip": "From CLIP Text Encode, as you would connect it to the sampler."}),
        "filename_prefix": _text("Subfolder and name in ComfyUI's output folder.", "conditioning/prompt"),
    }
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_TOOLTIPS = ("Path of the file in the output folder.",)

    def save(
        self,
        conditioning: Sequence[tuple[torch.Tensor, Mapping[str, Any]]],
        filename_prefix: str,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Write the file."""
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
    """Sets the input scale of every FP8 layer from recorded statistics. Layers that need it run in full precision.

    Writes a new checkpoint to the models folder. The source checkpoint stays unchanged.
    """

    ENDING = "calibrated"
    REQUIRED: Mapping[str, Input] = {
        "output_name": _text(
            "Name of the new file in the checkpoint's models folder. Empty: the checkpoint's name plus _calibrated."
        ),
        "overwrite": OVERWRITE,
    }

    def write(self, opened: Checkpoint, output: Path, node_id: str | None, **inputs: Any) -> list[str]:
        """Solve for scales, and write the new checkpoint."""
        options, statistics, partial = solving(**inputs)
        show_text(node_id, f"calibrating {opened.path.name}")
        calibration = apply_statistics(opened, statistics, options, force=partial)
        replaced = folders.prepare(output)
        patch = patch_model_with_scales(opened, calibration, output)
        return [*summary(calibration), *replaced, *patch.notes]


class QuantizeCheckpoint(Making):
    """Quantizes a 16-bit or 32-bit checkpoint to one format, or to the best mix of formats for a given size.

    Writes a new checkpoint to the models folder. The source checkpoint stays unchanged. Format "best" first runs the
    model on noise to measure each layer. Connect statistics to give FP8 layers calibrated input scales.
    """

    CHECKPOINT = "A 16-bit or 32-bit checkpoint."
    SOLVING: Mapping[str, Input] = {}
    REQUIRED: Mapping[str, Input] = {
        "format": (
            list(QUANTIZED),
            {
                "default": BEST,
                "tooltip": f"{BEST}: the mix of formats with the highest quality at this size. Others: one format, "
                f"fast on the GPUs in brackets. {'; '.join(_by_gpus())}.",
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
                    "tooltip": f"For {BEST}: maximum bits per weight, scales included.",
                }
            },
        ),
        "gpu": (
            list(GPUS),
            {"default": "any", "tooltip": f"For {BEST}: use only formats that this GPU runs natively."},
        ),
        "exclude": _text(
            "Regular expressions, one per line. Layers whose names match one are not quantized.", multiline=True
        ),
        "output_name": _text(
            "Name of the new file in the checkpoint's models folder. Empty: the checkpoint's name plus the format."
        ),
        "overwrite": OVERWRITE,
        **{name: _OPTIONAL[name] for name in ("stats", "latent", "statistics_file", "allow_partial")},
    }

    def write(
        self, opened: Checkpoint, output: Path, node_id: str | None, *, format: str = BEST,  # noqa: A002
        bits: float = 8.0, gpu: str = "any", exclude: str = "", **inputs: Any,
    ) -> list[str]:  # fmt: skip
        """Choose formats, and write the new checkpoint."""
        options, solved = conversion_options(format, exclude), None
        if inputs.get("stats") is not None or inputs.get("statistics_file", "").strip():
            solved = solving(**inputs)
        plan = plan_conversion(opened, options)
        refuse_damaged(opened, plan.table)
        if solved is not None:  # reject another model's statistics before the work
            wanted = {layer.name: layer for layer, _ in plan.quantized}
            naming.fitting(solved[1], plan.table, wanted, force=solved[2])
        done = plan.summary()
        if format == BEST:
            show_text(node_id, f"trying formats on {opened.path.name}")
            sizes, shown = BestOptions(bits=bits, gpu=gpu), RunOptions(device=_device())
            best = plan_best(opened, options, sizes, shown, progress=shown_progress(node_id))
            plan, done = best.plan, best.summary()
        show_text(node_id, f"quantizing {opened.path.name}")
        replaced = folders.prepare(output)
        scaled = write_quantized(opened, plan, output, solved, shown_progress(node_id))
        return [done, *replaced, *scaled, *plan.readers(), *plan.notes]


class ActivationReport(Reading):
    """Draws the inputs of every layer on the range of FP8, and names the layers at risk.

    With a checkpoint, compares its current scales with those that Calibrate FP8 Checkpoint would choose with the same
    settings. Does not change the checkpoint.
    """

    FUNCTION = "draw"
    CHECKPOINT = f"An FP8 checkpoint of the recorded model. {NO_CHECKPOINT}: show only the recorded ranges."
    INSTEAD = (NO_CHECKPOINT,)
    REQUIRED: Mapping[str, Input] = {
        "filename_prefix": _text(
            "Subfolder and name in ComfyUI's output folder, for an HTML page to open in a browser. Empty: no page.",
            "activation_stats/report",
        )
    }
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "verdict")
    OUTPUT_TOOLTIPS = ("For Preview Image or Save Image.", "Which layers are at risk, and what calibration changes.")

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Reject an invalid name before sampling."""
        return _refusal(lambda: not (filename_prefix or "").strip() or folders.next_output(str(filename_prefix)))

    def draw(
        self,
        *,
        checkpoint: str = NO_CHECKPOINT,
        filename_prefix: str = "activation_stats/report",
        unique_id: str | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Solve for scales, draw the image, and write the page."""
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
        image = torch.from_numpy(pixels)[None]  # ComfyUI's IMAGE: [1, height, width, 3], 0 to 1
        pages = []
        if path is not None:
            folders.prepare(path)
            write_bytes(path, page.render(report.document()).encode())
            pages = [folders.as_output(path)]
        show_text(unique_id, text)
        return {"ui": {"text": [text], "pages": pages}, "result": (image, text)}


def embeddings_of(conditioning: Sequence[tuple[torch.Tensor, Mapping[str, Any]]]) -> dict[str, torch.Tensor]:
    """The tensors for a file of embeddings, each [prompts, ...].

    Args:
        conditioning: a CONDITIONING: (embeddings [prompts, tokens, channels], further values) per entry.
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
            f"prompts in one file must have the same length and parts, found {found}",
            hint="use one Save Conditioning node per CONDITIONING; --conditioning accepts several files",
        )
    return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}


def summary(calibration: Calibration) -> list[str]:
    """What a calibration did: one line of numbers, then notes."""
    scales = calibration.scales.values()
    full = sum(result.full_precision_after for result in calibration.results)
    line = f"calibrated {len(scales)} of {len(calibration.results)} layers, {full} in full precision"
    if scales:
        line += f", scales {min(scales):.3g} to {max(scales):.3g}"
    return [line, *calibration.notes]


def conversion_options(name: str, exclude: str) -> ConvertOptions:
    """Options for a format of `QUANTIZED` and regular expressions, one per line."""
    if name not in QUANTIZED:
        raise OptionError(f"{name!r} is not a format that ComfyUI reads", hint=f"one of {', '.join(QUANTIZED)}")
    patterns = tuple(line.strip() for line in exclude.splitlines() if line.strip())
    return ConvertOptions(format="int8" if name == BEST else name, exclude=patterns)  # INT8 fits every layer


def write_quantized(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    output: Path,
    solved: tuple[SolveOptions, Statistics, bool] | None,
    progress: Progress,
) -> list[str]:
    """Convert a checkpoint; with statistics (`solved`, see `solving`), also set input scales.

    Returns:
        Notes about the input scales.
    """
    static = [each for each in plan.decisions if each.format is not None and each.format.static]
    notes: list[str] = []

    def calibrate(writer: CheckpointWriter) -> None:
        assert solved is not None
        options, statistics, partial = solved
        calibration, patch = calibrate_written(
            writer, checkpoint.path, lambda made: apply_statistics(made, statistics, options, force=partial)
        )
        notes.extend([*summary(calibration), *patch.notes])

    if solved is not None and not static:
        notes.append("statistics were not used: every layer scales its inputs dynamically")
    if solved is None and any(each.input_scale is None for each in static):
        notes.append("input scales are not set: connect stats, or run Calibrate FP8 Checkpoint on the new file")
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    calibrating = calibrate if solved is not None and static else None
    device = _device()
    convert(
        checkpoint, plan, output, device=device if device.startswith("cuda") else "cpu",
        progress=advance(progress, total), before_commit=calibrating,
    )  # fmt: skip
    return notes


def _device() -> str:
    """The device on which ComfyUI runs models."""
    from comfy.model_management import get_torch_device

    return str(get_torch_device())


class _Refusal(str):
    """A validation error. ComfyUI shows its text once per checked input, so only the first time says why."""

    shown = False

    def __str__(self) -> str:
        if self.shown:
            return "see above"
        self.shown = True
        return super().__str__()


def _refusal(check: Any) -> bool | str:
    """True, or the error of a check."""
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
"""Name in workflow files, which must never change -> class and display name."""

NODE_CLASS_MAPPINGS = {name: kind for name, (kind, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
