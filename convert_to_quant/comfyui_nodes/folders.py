"""Where nodes read and write: inside ComfyUI's own folders, whatever a workflow says.

A workflow is a file from somebody else. Checkpoints come from ComfyUI's model lists. What is written gets a name below
ComfyUI's output folder, or below the models folder of the checkpoint that it was made from. A name is taken apart by
the rules of Windows and of Unix together: no drive, no root, no "..", no character or ending that either treats in a
special way, no overlong part; and where it leads through symbolic links must be inside, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..checkpoint import check_output, refuse_same_file
from ..checkpoint.positioned import is_plain_on_windows
from ..errors import OptionError, OutputError, StatisticsError

KINDS = ("diffusion_models", "checkpoints")
"""ComfyUI's lists of models that may hold a diffusion model."""

SUFFIX = ".safetensors"

_SPECIAL = re.compile(r'[\x00-\x1f<>:"|?*\ud800-\udfff]')
_MOST_BYTES = 230
"""Of a name: systems take 255, and a number and an ending may follow."""


def inside(folder: Path, name: str) -> Path:
    """The path that a name means below a folder.

    Args:
        folder: one of ComfyUI's.
        name: from the workflow, its parts apart by slashes or backslashes.

    Raises:
        OptionError: the name is empty, or leads out of the folder, or could on some system.
    """
    said = PureWindowsPath(name)
    if not said.parts or said.anchor or any(map(_is_bad, said.parts)):
        raise OptionError(
            f"{name!r} is not a file name below {folder}", hint="use plain names, with / between folder and file"
        )
    path = folder.joinpath(*said.parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OptionError(f"{name!r} leads out of {folder}, through a symbolic link", hint="name another folder")
    return path


def _is_bad(part: str) -> bool:
    """Whether some system would not take a part of a path as a plain name."""
    special = _SPECIAL.search(part) or part.startswith("~") or not is_plain_on_windows(part)
    return bool(special) or len(part.encode()) > _MOST_BYTES


def with_suffix(name: str) -> str:
    """A name that ends as safetensors files do: ComfyUI's lists have no others."""
    return name if name.lower().endswith(SUFFIX) else name + SUFFIX


@dataclass(frozen=True)
class Choice:
    """A checkpoint in one of ComfyUI's lists.

    Attributes:
        root: the models folder that has it.
        path: the file.
    """

    root: Path
    path: Path

    def output(self, name: str, overwrite: bool, ending: str) -> Path:
        """Where a file made from this one goes.

        Args:
            name: below the models folder; empty for one beside the checkpoint, with its name and an ending.
            overwrite: whether a file of that name may be replaced. The checkpoint itself never is.
            ending: says what was done.

        Raises:
            OptionError: the name leads out of the models folder.
            OutputError: the file exists, or is the checkpoint.
        """
        if name.strip():
            path = inside(self.root, with_suffix(name.strip()))
        else:
            path = self.path.with_name(f"{self.path.stem}_{ending}{SUFFIX}")
        refuse_same_file(path, [self.path], hint="name another output")
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError("it exists already", path=path, hint="name another output, or switch overwrite on")
        if path.exists():
            check_output(path)
        return path


def checkpoint_names() -> list[str]:
    """What a checkpoint can be chosen from: LIST/NAME, for ComfyUI's lists in `KINDS`."""
    import folder_paths

    return [
        f"{kind}/{name}"
        for kind in KINDS
        for name in folder_paths.get_filename_list(kind)
        if name.lower().endswith(SUFFIX)
    ]


def choose_checkpoint(name: str) -> Choice:
    """The checkpoint of a name in `checkpoint_names`.

    Raises:
        OptionError: ComfyUI does not list it.
    """
    import folder_paths

    kind, _, listed = name.partition("/")
    path = folder_paths.get_full_path(kind, listed) if name in checkpoint_names() else None
    if path is None:
        raise OptionError(f"ComfyUI lists no checkpoint {name!r}", hint="choose another, or refresh the lists")
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind)]
    return Choice(next(root for root in roots if Path(path).is_relative_to(root)), Path(path))


def output_folder() -> Path:
    """ComfyUI's."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def output_name(path: Path) -> str:
    """A file's name below the output folder, with slashes."""
    return path.relative_to(output_folder()).as_posix()


def as_output(path: Path) -> dict[str, str]:
    """A file in the output folder, as ComfyUI's clients are told of files and ask for them (`/view`)."""
    return {"filename": path.name, "subfolder": output_name(path).rpartition("/")[0], "type": "output"}


def next_output(prefix: str, suffix: str = SUFFIX) -> Path:
    """A path in ComfyUI's output folder that no file has yet, numbered as ComfyUI numbers its images.

    Args:
        prefix: folder and name below the output folder.
        suffix: how the file ends.

    Raises:
        OptionError: the prefix leads out of the output folder.
    """
    start = inside(output_folder(), prefix)
    taken = re.compile(rf"{re.escape(start.name)}_(\d+)_{re.escape(suffix)}", re.IGNORECASE)
    matches = (taken.fullmatch(path.name) for path in start.parent.glob("*")) if start.parent.is_dir() else ()
    number = max((int(match[1]) for match in matches if match is not None), default=0) + 1
    return start.with_name(f"{start.name}_{number:05}_{suffix}")


def statistics_file(name: str) -> Path:
    """A file in ComfyUI's output folder or, where it has none of that name, in its input folder.

    Raises:
        OptionError: the name leads out of them.
        StatisticsError: there is no such file.
    """
    import folder_paths

    folders = [output_folder(), Path(folder_paths.get_input_directory())]
    paths = [inside(folder, with_suffix(name.strip())) for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise StatisticsError("no such file in ComfyUI's output and input folders", path=name)
    return path


def written_at(path: Path) -> int | None:
    """When a file was written, in nanoseconds; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def prepare(path: Path) -> list[str]:
    """Make the folder of a file.

    Returns:
        The line that says that an older file is replaced; none where there is none.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"its folder cannot be made: {error.strerror}", path=path) from None
    return ["replaced the older file of that name"] if path.exists() else []
