"""Paths that nodes read and write. They stay inside ComfyUI's folders, whatever an untrusted workflow asks for.

Checkpoints come from ComfyUI's model lists. Outputs go below ComfyUI's output folder, or below the models folder of the
source checkpoint. Names must be plain on both Windows and Unix: no drive, root or "..", no special character or ending,
no overlong part. Symbolic links must not lead outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..checkpoint import check_output, refuse_same_file
from ..checkpoint.positioned import is_plain_on_windows
from ..errors import OptionError, OutputError, StatisticsError

KINDS = ("diffusion_models", "checkpoints")
"""ComfyUI's model lists that may contain diffusion models."""

SUFFIX = ".safetensors"

_SPECIAL = re.compile(r'[\x00-\x1f<>:"|?*\ud800-\udfff]')
_MOST_BYTES = 230
"""Maximum length of a part: file systems allow 255, and a number and a suffix may follow."""


def inside(folder: Path, name: str) -> Path:
    """The path of a name below a folder.

    Args:
        folder: one of ComfyUI's.
        name: from the workflow, with slashes or backslashes.

    Raises:
        OptionError: the name is empty, not plain, or leads outside.
    """
    parsed = PureWindowsPath(name)
    if not parsed.parts or parsed.anchor or any(map(_is_bad, parsed.parts)):
        raise OptionError(f"{name!r} is not a file name below {folder}", hint="use plain names, with / between folders")
    path = folder.joinpath(*parsed.parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OptionError(f"{name!r} leads out of {folder} through a symbolic link", hint="choose another folder")
    return path


def _is_bad(part: str) -> bool:
    """Whether a part of a path is special on some system."""
    special = _SPECIAL.search(part) or part.startswith("~") or not is_plain_on_windows(part)
    return bool(special) or len(part.encode()) > _MOST_BYTES


def with_suffix(name: str) -> str:
    """A name with the suffix .safetensors."""
    return name if name.lower().endswith(SUFFIX) else name + SUFFIX


@dataclass(frozen=True)
class Choice:
    """A checkpoint in one of ComfyUI's lists, and the models folder that contains it."""

    root: Path
    path: Path

    def output(self, name: str, overwrite: bool, ending: str) -> Path:
        """Path for a file made from this checkpoint.

        Args:
            name: below the models folder; empty: next to the checkpoint, with its name and `ending`.
            overwrite: whether an existing file may be replaced. The checkpoint itself never is.
            ending: suffix of the default name, after an underscore.

        Raises:
            OptionError: the name leads out of the models folder.
            OutputError: the file exists, or is the checkpoint.
        """
        if name.strip():
            path = inside(self.root, with_suffix(name.strip()))
        else:
            path = self.path.with_name(f"{self.path.stem}_{ending}{SUFFIX}")
        refuse_same_file(path, [self.path], hint="choose another name")
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError("it already exists", path=path, hint="choose another name, or switch overwrite on")
        if path.exists():
            check_output(path)
        return path


def checkpoint_names() -> list[str]:
    """All checkpoints as LIST/NAME, for ComfyUI's lists in `KINDS`."""
    import folder_paths

    return [
        f"{kind}/{name}"
        for kind in KINDS
        for name in folder_paths.get_filename_list(kind)
        if name.lower().endswith(SUFFIX)
    ]


def choose_checkpoint(name: str) -> Choice:
    """A checkpoint by its entry in `checkpoint_names`."""
    import folder_paths

    kind, _, listed = name.partition("/")
    path = folder_paths.get_full_path(kind, listed) if name in checkpoint_names() else None
    if path is None:
        raise OptionError(f"ComfyUI lists no checkpoint {name!r}", hint="choose another, or refresh the lists")
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind)]
    return Choice(next(root for root in roots if Path(path).is_relative_to(root)), Path(path))


def output_folder() -> Path:
    """ComfyUI's output folder."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def output_name(path: Path) -> str:
    """A file's path below the output folder, with slashes."""
    return path.relative_to(output_folder()).as_posix()


def as_output(path: Path) -> dict[str, str]:
    """A file in the output folder, in the form that ComfyUI's clients expect (`/view`)."""
    return {"filename": path.name, "subfolder": output_name(path).rpartition("/")[0], "type": "output"}


def next_output(prefix: str, suffix: str = SUFFIX) -> Path:
    """The next unused path in ComfyUI's output folder, numbered like ComfyUI's images."""
    start = inside(output_folder(), prefix)
    taken = re.compile(rf"{re.escape(start.name)}_(\d+)_{re.escape(suffix)}", re.IGNORECASE)
    matches = (taken.fullmatch(path.name) for path in start.parent.glob("*")) if start.parent.is_dir() else ()
    number = max((int(match[1]) for match in matches if match is not None), default=0) + 1
    return start.with_name(f"{start.name}_{number:05}_{suffix}")


def statistics_file(name: str) -> Path:
    """A file in ComfyUI's output folder, or else in its input folder."""
    import folder_paths

    folders = [output_folder(), Path(folder_paths.get_input_directory())]
    paths = [inside(folder, with_suffix(name.strip())) for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise StatisticsError("no such file in ComfyUI's output and input folders", path=name)
    return path


def written_at(path: Path) -> int | None:
    """Modification time in nanoseconds; None if the file is missing."""
    return path.stat().st_mtime_ns if path.exists() else None


def prepare(path: Path) -> list[str]:
    """Create the folder of a file.

    Returns:
        A note if an existing file will be replaced.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"its folder cannot be created: {error.strerror}", path=path) from None
    return ["replaced the existing file of that name"] if path.exists() else []
