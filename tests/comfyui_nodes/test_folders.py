"""File names stay inside ComfyUI's folders, whatever a workflow says."""

from __future__ import annotations

import pytest

from convert_to_quant.comfyui_nodes import folders
from convert_to_quant.errors import OptionError, OutputError, StatisticsError

OUTSIDE = [
    "", ".", "..", "../x", "a/../../x", "a/../b", "..\\x", "a\\..\\..\\x", "/etc/passwd", "\\\\server\\share\\x",
    "//server/share/x", "C:\\x", "C:x", "~/x", "~root", "x\0y", "x\ny", "x:stream", "a*", "what?", "x.", "x ", ".. /x",
    ".../x", "x" * 240, "\u00fc" * 120 + "/x", "half a letter \ud800",
    "aux", "a/Con.safetensors/b", "COM1.txt", "NUL .x",
]  # fmt: skip
"""The long ones leave no room for _00001_.safetensors."""


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_or_could_are_refused(tmp_path, name):
    with pytest.raises(OptionError, match="is not a file name below"):
        folders.inside(tmp_path, name)


@pytest.mark.parametrize("name", ["x", "a/b/c.safetensors", "a\\b.safetensors", "Flux (1) – ü.safetensors", ".hidden"])
def test_plain_names_are_taken(tmp_path, name):
    path = folders.inside(tmp_path, name)
    assert path == tmp_path.joinpath(*name.replace("\\", "/").split("/"))


def test_symbolic_links_that_lead_out_are_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "file.safetensors").symlink_to(tmp_path / "outside" / "file")

    for name in ("link/x", "file.safetensors"):
        with pytest.raises(OptionError, match="symbolic link"):
            folders.inside(tmp_path / "inside", name)


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "real")
    assert folders.inside(tmp_path / "models", "x") == tmp_path / "models" / "x"


def test_checkpoints_are_those_that_comfyui_lists(comfyui):
    (comfyui.models / "sub").mkdir()
    for name in ("a.safetensors", "sub/b.safetensors", "notes.txt"):
        (comfyui.models / name).touch()
    (comfyui.root / "other" / "unet" / "c.SAFETENSORS").touch()
    (comfyui.root / "models" / "checkpoints" / "a.safetensors").touch()
    (comfyui.root / "models" / "secret.safetensors").touch()

    names = folders.checkpoint_names()

    assert sorted(names) == [
        "checkpoints/a.safetensors",
        "diffusion_models/a.safetensors",
        "diffusion_models/c.SAFETENSORS",
        "diffusion_models/sub/b.safetensors",
    ]
    chosen = folders.choose_checkpoint("diffusion_models/c.SAFETENSORS")
    assert chosen == folders.Choice(comfyui.root / "other" / "unet", comfyui.root / "other" / "unet" / "c.SAFETENSORS")
    for name in ("diffusion_models/../secret.safetensors", "vae/a.safetensors", "a.safetensors", ""):
        with pytest.raises(OptionError, match="ComfyUI lists no checkpoint"):
            folders.choose_checkpoint(name)


def test_outputs_stay_in_the_folder_of_their_checkpoint(tmp_path):
    (tmp_path / "sub").mkdir()
    source, other = tmp_path / "sub" / "flux.safetensors", tmp_path / "other.safetensors"
    source.touch()
    other.touch()
    choice = folders.Choice(tmp_path, source)

    assert choice.output("", False, "calibrated") == tmp_path / "sub" / "flux_calibrated.safetensors"
    assert choice.output("new/flux1.1", False, "calibrated") == tmp_path / "new" / "flux1.1.safetensors"
    assert choice.output("other.safetensors", True, "calibrated") == other
    with pytest.raises(OutputError, match=r"already exists .*switch overwrite on"):
        choice.output("other", False, "calibrated")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="same file as the input"):
            choice.output("sub/flux", overwrite, "calibrated")
        with pytest.raises(OptionError, match="is not a file name below"):
            choice.output("../flux2", overwrite, "calibrated")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        choice.output("folder", True, "calibrated")


def test_statistics_files_are_numbered(comfyui):
    output = comfyui.root / "output"
    assert folders.next_output("a/stats") == output / "a" / "stats_00001_.safetensors"
    (output / "a").mkdir()
    for name in ("stats_00007_.safetensors", "stats_b_00009_.safetensors", "stats_x_.safetensors", "stats.png"):
        (output / "a" / name).touch()
    assert folders.next_output("a\\stats") == output / "a" / "stats_00008_.safetensors"
    with pytest.raises(OptionError, match="is not a file name below"):
        folders.next_output("../stats")


def test_statistics_are_looked_for_in_the_output_and_then_in_the_input_folder(comfyui):
    (comfyui.root / "input" / "x.safetensors").touch()
    assert folders.statistics_file("x") == comfyui.root / "input" / "x.safetensors"
    (comfyui.root / "output" / "x.safetensors").touch()
    assert folders.statistics_file(" x.safetensors ") == comfyui.root / "output" / "x.safetensors"
    with pytest.raises(StatisticsError, match="no such file in ComfyUI's output and input folders"):
        folders.statistics_file("y")
    with pytest.raises(OptionError, match="is not a file name below"):
        folders.statistics_file("../models/secret.safetensors")
