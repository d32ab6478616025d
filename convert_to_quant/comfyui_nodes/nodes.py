"""The nodes, in the form that every ComfyUI loads (V1): classes whose attributes say what goes in and out.

    Load Diffusion Model ─MODEL→ Record Activations ─MODEL→ KSampler ─LATENT→ Save Activation Stats ─→ Calibrate FP8 …
                                        └──────────ACTIVATION_STATS──────────────────↗             └→ Activation Report

ComfyUI runs a node when its inputs changed, and remembers what it gave otherwise. So:

    Record      starts afresh when the model before it changes or with `reset`; else the same recorder keeps adding up.
    Save        always runs. One recorder writes one file, again and again, as its totals grow.
    Calibrate   runs when its inputs changed, or the files that it reads. Statistics of a recorder are there before
    and Report  anything was sampled, so they take them from Save, or wait for a LATENT of their own.

Save Conditioning stands alone: it keeps a prompt's embeddings, for `check --conditioning`.

Nodes keep nothing in themselves. ComfyUI's newer form (V3) is not offered: where a pack has both, it loads this one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..calibrate_activation_scales import Calibration, apply_statistics, patch_model_with_scales
from ..checkpoint import open_checkpoint, write_bytes
from ..errors import Error, OptionError
from ..options import SolveOptions, inputs_of
from ..solve import METHODS
from ..stats import Statistics
from ..telling import plural
from . import folders
from .recording import Recorder

if TYPE_CHECKING:
    import torch

CATEGORY = "convert_to_quant"
STATS = "ACTIVATION_STATS"
NO_CHECKPOINT = "none"
"""What is chosen in a list of checkpoints for a report of ranges alone."""

EMBEDDINGS = {"pooled_output": "pooled_prompt_embeds", "attention_mask": "prompt_attention_mask"}
"""What a CONDITIONING has beside its embeddings -> what files of embeddings call it."""

Input = tuple[Any, dict[str, Any]]
Inputs = dict[str, dict[str, Any]]

_SHOWN_NOTES = 20

_FROM_STATS: dict[str, Input] = {
    "stats": (STATS, {"tooltip": "From Save Activation Stats, or from Record Activations with a latent."}),
    "latent": ("LATENT", {"tooltip": "Waits for it. Needed where stats come from Record Activations."}),
    "statistics_file": (
        "STRING",
        {"default": "", "tooltip": "Instead of stats: a file in ComfyUI's output (or input) folder."},
    ),
}

_SOLVING: dict[str, Input] = inputs_of(
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

_RARELY: dict[str, Input] = {
    **inputs_of(SolveOptions, {"percentile": {"min": 0.01, "tooltip": "For that method."}}),
    "allow_partial": (
        "BOOLEAN",
        {"default": False, "tooltip": "Go on where not all FP8 layers were recorded: the others keep their scales."},
    ),
}


def show_text(node_id: str | None, text: str) -> None:
    """Progress text on a node, where a ComfyUI server runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def statistics_of(recorded: Recorder | Statistics) -> Statistics:
    """What a link of type ACTIVATION_STATS carries, as it is now."""
    return recorded.statistics() if isinstance(recorded, Recorder) else recorded


def statistics_from(
    stats: Recorder | Statistics | None, latent: Mapping[str, Any] | None, statistics_file: str
) -> Statistics:
    """What a node is to work on, from a link or a file.

    Raises:
        OptionError: both or neither were given, or the link's statistics come before anything was sampled.
        StatisticsError: there is no such file, or it holds no statistics.
        CalibrationError: nothing was recorded.
    """
    if (stats is None) != bool(statistics_file.strip()):
        raise OptionError("statistics come from a link or from a file: exactly one of stats and statistics_file")
    if isinstance(stats, Recorder) and latent is None:
        raise OptionError(
            "this node would run before the sampler",
            hint="take stats from Save Activation Stats, or connect the sampler's LATENT to this node, too",
        )
    return Statistics.load(folders.statistics_file(statistics_file)) if stats is None else statistics_of(stats)


def state_of_files(checkpoint: str | None, statistics_file: str) -> str:
    """A text that changes when these files do, also twice within one tick of the clock: a file of ours is a new one."""
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


class RecordActivations:
    """Records what each linear layer of a MODEL receives while a sampler runs it. The picture stays the same."""

    DESCRIPTION = (
        "Records what every linear layer receives while a sampler paints with this MODEL. Nothing else changes: "
        "latents are the same to the last bit. Totals add up over prompts and seeds until the model changes. Best "
        "done with the 16-bit model."
    )
    CATEGORY = CATEGORY
    FUNCTION = "record"
    RETURN_TYPES = ("MODEL", STATS)
    RETURN_NAMES = ("model", "stats")
    OUTPUT_TOOLTIPS = ("Records while it samples.", "Grows with every sampling.")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        return {
            "required": {"model": ("MODEL", {"tooltip": "Behind all LoRAs, in front of the sampler."})},
            "optional": {
                "statistics_file": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Go on from this file, made by Save Activation Stats: its path in ComfyUI's output "
                        "(or input) folder. Empty: start from nothing.",
                    },
                ),
                "reset": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Forget what was recorded, each time this is queued."},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, reset: bool = False, **_inputs: Any) -> float | str:
        """Never the same with `reset`."""
        return math.nan if reset else ""

    def record(self, model: Any, statistics_file: str = "", reset: bool = False) -> tuple[Any, Recorder]:  # noqa: ARG002
        """A clone of the model, and the recorder that sees it run."""
        before = Statistics.load(folders.statistics_file(statistics_file)) if statistics_file.strip() else None
        recorder = Recorder(before)
        return recorder.attach(model), recorder


class SaveActivationStats:
    """Writes recorded statistics into ComfyUI's output folder, once the LATENT is there."""

    DESCRIPTION = (
        "Writes what was recorded into ComfyUI's output folder, after the sampler is done. The same recording "
        "goes to the same file; another one, or one whose file was moved away, gets the next number."
    )
    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = (STATS, "STRING")
    RETURN_NAMES = ("stats", "file")
    OUTPUT_TOOLTIPS = ("As saved: what follows runs after sampling.", "The file, in ComfyUI's output folder.")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        return {
            "required": {
                "stats": (STATS, {"tooltip": "From Record Activations."}),
                "latent": ("LATENT", {"tooltip": "From the sampler: waits until it is done."}),
                "filename_prefix": (
                    "STRING",
                    {"default": "activation_stats/stats", "tooltip": "Folder and name in ComfyUI's output folder."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        """Always: the recorder is the same, and what it holds is not."""
        return math.nan

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a bad name before anything is sampled."""
        return _refusal(lambda: filename_prefix is None or folders.next_output(filename_prefix))

    def save(
        self,
        stats: Recorder | Statistics,
        latent: Mapping[str, Any],  # noqa: ARG002
        filename_prefix: str,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Write them, and pass them on as they are now."""
        statistics = statistics_of(stats)
        files = stats.files if isinstance(stats, Recorder) else {}
        path, written = files.get(filename_prefix, (None, None))
        if path is None or folders.written_at(path) != written:  # moved away, and another may have its name
            path = folders.next_output(filename_prefix)
        folders.make_parent(path)
        statistics.save(path)
        files[filename_prefix] = (path, folders.written_at(path))
        file = path.relative_to(folders.output_folder()).as_posix()
        layers = plural(int(statistics.visited.sum()), "layer")
        text = f"{layers}, {plural(statistics.samples, 'sample')}: {file}"
        if unseen := statistics.unseen:
            text += f"\n{len(unseen)} layers ran, but their inputs could not be seen (first: {unseen[0]})"
        show_text(unique_id, text)
        entry = {
            **folders.as_output(path),
            "recording": stats.recording if isinstance(stats, Recorder) else "",
            "samples": statistics.samples,
        }
        return {"ui": {"text": [text], "statistics": [entry]}, "result": (statistics, file)}


class SaveConditioning:
    """Writes a CONDITIONING into ComfyUI's output folder, for `check --conditioning`."""

    DESCRIPTION = (
        "Writes the embeddings of a prompt into ComfyUI's output folder, as convert_to_quant's check and observe take "
        "them with --conditioning. Each gets the next number."
    )
    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_TOOLTIPS = ("The file, in ComfyUI's output folder.",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        return {
            "required": {
                "conditioning": ("CONDITIONING", {"tooltip": "From CLIP Text Encode, as the sampler gets it."}),
                "filename_prefix": (
                    "STRING",
                    {"default": "conditioning/prompt", "tooltip": "Folder and name in ComfyUI's output folder."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a bad name before anything is sampled."""
        return _refusal(lambda: filename_prefix is None or folders.next_output(filename_prefix))

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
        folders.make_parent(path)
        prompts.save(path)
        file = path.relative_to(folders.output_folder()).as_posix()
        text = f"{plural(prompts.count, 'prompt')}: {file}"
        show_text(unique_id, text)
        return {"ui": {"text": [text]}, "result": (file,)}


class CalibrateFP8Checkpoint:
    """Chooses the input scale and precision of every FP8 layer from statistics, and writes a new checkpoint."""

    DESCRIPTION = (
        "Chooses the input scale of every FP8 layer, and the layers that need full precision, from what was recorded, "
        "and writes a new checkpoint into the models folder. The chosen checkpoint stays as it is."
    )
    CATEGORY = CATEGORY
    FUNCTION = "calibrate"
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("file", "report")
    OUTPUT_TOOLTIPS = ("The new checkpoint, in its models folder.", "What was done.")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        return {
            "required": {
                "checkpoint": (folders.checkpoint_names(), {"tooltip": "An FP8 checkpoint of the recorded model."}),
                **_SOLVING,
                "output_name": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Name of the new file in the checkpoint's models folder. Empty: the checkpoint's "
                        "name with _calibrated.",
                    },
                ),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of that name."}),
            },
            "optional": {**_FROM_STATS, **_RARELY},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str | None = None, statistics_file: str = "", **_inputs: Any) -> str:
        """When the files that are read change."""
        return state_of_files(checkpoint, statistics_file)

    @classmethod
    def VALIDATE_INPUTS(
        cls, checkpoint: str | None = None, output_name: str | None = None, overwrite: bool | None = None
    ) -> bool | str:
        """Refuse an output that cannot be before anything is sampled."""
        if checkpoint is None or output_name is None or overwrite is None:  # from another node, later
            return True
        return _refusal(lambda: folders.choose_checkpoint(checkpoint).output(output_name, overwrite))

    def calibrate(
        self,
        *,
        checkpoint: str,
        method: Any = "absmax",
        margin: float = 0.0,
        full_precision_budget: float = 0.0,
        output_name: str = "",
        overwrite: bool = False,
        stats: Recorder | Statistics | None = None,
        latent: Mapping[str, Any] | None = None,
        statistics_file: str = "",
        percentile: float = 99.9,
        allow_partial: bool = False,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Solve, and write the new checkpoint."""
        choice = folders.choose_checkpoint(checkpoint)
        output = choice.output(output_name, overwrite)
        options = SolveOptions(
            method=method, margin=margin or None, percentile=percentile, full_precision_budget=full_precision_budget
        )
        statistics = statistics_from(stats, latent, statistics_file)
        show_text(unique_id, f"calibrating {choice.path.name}")
        with open_checkpoint(choice.path) as opened:
            calibration = apply_statistics(opened, statistics, options, force=allow_partial)
            folders.make_parent(output)
            patch = patch_model_with_scales(opened, calibration, output)
        text = summary(calibration, patch.notes)
        file = output.relative_to(choice.root).as_posix()
        show_text(unique_id, f"{text.splitlines()[0]}\n{file}")
        return {"ui": {"text": [f"{file}\n{text}"]}, "result": (file, text)}


class ActivationReport:
    """Draws what was recorded on FP8's range, before and after calibration, and says what is at risk."""

    DESCRIPTION = (
        "Draws what each layer receives on the range of FP8, and says which layers are at risk. With a checkpoint: at "
        "its present scales, and at those that Calibrate FP8 Checkpoint would choose with the same settings. Changes "
        "no checkpoint."
    )
    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "verdict")
    OUTPUT_TOOLTIPS = ("To preview or save.", "What is at risk, and what calibration changes.")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """What goes in."""
        return {
            "required": {
                "checkpoint": (
                    [NO_CHECKPOINT, *folders.checkpoint_names()],
                    {"tooltip": f"An FP8 checkpoint of the recorded model. {NO_CHECKPOINT}: what was recorded alone."},
                ),
                **_SOLVING,
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "activation_stats/report",
                        "tooltip": "Folder and name in ComfyUI's output folder, for a page to open in a browser. "
                        "Empty: no page.",
                    },
                ),
            },
            "optional": {**_FROM_STATS, **_RARELY},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str | None = None, statistics_file: str = "", **_inputs: Any) -> str:
        """When the files that are read change."""
        return state_of_files(checkpoint, statistics_file)

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse a bad name before anything is sampled."""
        return _refusal(lambda: not (filename_prefix or "").strip() or folders.next_output(str(filename_prefix)))

    def draw(
        self,
        *,
        checkpoint: str = NO_CHECKPOINT,
        method: Any = "absmax",
        margin: float = 0.0,
        full_precision_budget: float = 0.0,
        filename_prefix: str = "activation_stats/report",
        stats: Recorder | Statistics | None = None,
        latent: Mapping[str, Any] | None = None,
        statistics_file: str = "",
        percentile: float = 99.9,
        allow_partial: bool = False,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        """Solve, draw, and write the page."""
        from ..report import figures, page, picture

        model = None if checkpoint == NO_CHECKPOINT else folders.choose_checkpoint(checkpoint).path
        options = SolveOptions(
            method=method, margin=margin or None, percentile=percentile, full_precision_budget=full_precision_budget
        )
        path = folders.next_output(filename_prefix, ".html") if filename_prefix.strip() else None
        statistics = statistics_from(stats, latent, statistics_file)
        show_text(unique_id, "drawing")
        report = figures.build(figures.Source(statistics, model, options), force=allow_partial)
        image = as_image(picture.draw(report))
        text = "\n".join((report.verdict.headline, *report.verdict.points))
        if path is not None:
            folders.make_parent(path)
            write_bytes(path, page.render(report.document()).encode())
        show_text(unique_id, text)
        pages = [] if path is None else [folders.as_output(path)]
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


def as_image(picture: Any) -> torch.Tensor:
    """A PIL image as ComfyUI has images: [1, height, width, 3], float32, 0 to 1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def summary(calibration: Calibration, notes: list[str]) -> str:
    """What a calibration did: a line of numbers, then what a user should know.

    Args:
        calibration: what was solved.
        notes: of the patch.
    """
    scales = calibration.scales.values()
    full = sum(result.full_precision_after for result in calibration.results)
    lines = [f"calibrated {len(scales)} of {len(calibration.results)} FP8 layers, {full} in full precision"]
    if scales:
        lines[0] += f", scales {min(scales):.3g} to {max(scales):.3g}"
    lines += [*calibration.notes, *notes]
    if len(lines) > _SHOWN_NOTES:
        lines[_SHOWN_NOTES:] = [f"and {len(lines) - _SHOWN_NOTES} more notes"]
    return "\n".join(lines)


def _refusal(check: Any) -> bool | str:
    """True, or what ComfyUI shows beside the input."""
    try:
        check()
    except Error as error:
        return str(error)
    return True


NODE_CLASS_MAPPINGS: Mapping[str, type] = {
    "ConvertToQuantRecordActivations": RecordActivations,
    "ConvertToQuantSaveActivationStats": SaveActivationStats,
    "ConvertToQuantSaveConditioning": SaveConditioning,
    "ConvertToQuantCalibrateFP8Checkpoint": CalibrateFP8Checkpoint,
    "ConvertToQuantActivationReport": ActivationReport,
}
"""Names in workflows; they never change."""

NODE_DISPLAY_NAME_MAPPINGS: Mapping[str, str] = {
    "ConvertToQuantRecordActivations": "Record Activations",
    "ConvertToQuantSaveActivationStats": "Save Activation Stats",
    "ConvertToQuantSaveConditioning": "Save Conditioning",
    "ConvertToQuantCalibrateFP8Checkpoint": "Calibrate FP8 Checkpoint",
    "ConvertToQuantActivationReport": "Activation Report",
}
