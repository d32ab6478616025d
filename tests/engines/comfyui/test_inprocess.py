"""What of the ComfyUI engine needs no ComfyUI: its table of conditionings, its tree, and its errors."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convert_to_quant import emoji
from convert_to_quant.cli import main
from convert_to_quant.engines import noise
from convert_to_quant.engines.comfyui import inprocess_tree
from convert_to_quant.engines.comfyui.inprocess_conditions import NOT_GENERATIVE, conditions_of, draw, wanted
from convert_to_quant.errors import CalibrationError, OptionError, UnsupportedModelError
from convert_to_quant.families import CONDITIONS, RECORDS, wan
from convert_to_quant.families.comfyui import BASE, Conditions, Scene, Want, measure
from convert_to_quant.families.running import Signal
from convert_to_quant.stats import Statistics

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself


def scene(network: nn.Module | None = None, **config: int) -> Scene:
    return Scene(network or nn.Module(), config, channels=4, height=8, width=6, frames=2, tokens=12, text_tokens=5)


@pytest.fixture
def tree(tmp_path):
    """A folder that looks like ComfyUI from outside."""
    (tmp_path / "comfy").mkdir()
    for name in inprocess_tree.REQUIRED_FILES:
        (tmp_path / name).touch()
    (tmp_path / inprocess_tree.VERSION_FILE).write_text('# generated\n__version__ = "0.33.0"\n')
    return tmp_path


# ---------------------------------------------------------------- the table


def test_a_family_has_what_it_derives_from_and_its_own_row_goes_first():
    animate = conditions_of(["WAN22_Animate", "WAN21", BASE, "Module"])

    assert {"cross_attn", "concat_latent_image", "pose_video_latent", "face_video_pixels"} <= set(animate.wants)
    assert animate.frames == 2
    assert conditions_of(["WAN21_SCAIL2", "WAN21_SCAIL", "WAN21", BASE]).wants["concat_latent_image"] is None
    assert conditions_of(["LongCatImage", "Flux", BASE]) == CONDITIONS["Flux"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Novelty", "the inputs of ComfyUI's Novelty model are unknown here"),
        *((name, f"ComfyUI's {name} is not a diffusion model: it ") for name in NOT_GENERATIVE),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_its_name(name, said):
    with pytest.raises(UnsupportedModelError, match=said):
        conditions_of([name, BASE, "Module", "object"])


def test_the_base_class_has_a_row_of_its_own_that_nothing_inherits():
    assert set(conditions_of([BASE, "Module"]).wants) == {"cross_attn"}
    assert set(CONDITIONS["StableAudio1"].wants) == set(conditions_of(["StableAudio1", BASE]).wants)


def test_no_class_of_comfyui_stands_in_two_records():
    assert sum(len(record.comfyui) for record in RECORDS) == len(CONDITIONS)
    assert not set(CONDITIONS) & set(NOT_GENERATIVE)


def test_sizes_are_measured_on_the_network():
    network = nn.Module()
    network.txt_in = nn.Linear(40, 8)
    assert "pooled_output" not in wanted(conditions_of(["Flux2", "Flux", BASE]), scene(network))  # it has no layer

    network.vector_in = nn.Module()
    network.vector_in.in_layer = nn.Linear(24, 8)
    flux = wanted(conditions_of(["Flux", BASE]), scene(network))

    assert {name: shape for name, (_, shape) in flux.items()} == {
        "cross_attn": (5, 40), "pooled_output": (24,), "concat_latent_image": (4, 8, 6)
    }  # fmt: skip


def test_a_network_without_the_layer_that_tells_a_size_is_refused_by_the_layer():
    with pytest.raises(
        UnsupportedModelError, match="the size of its conditioning is not known: the network has no txt_in"
    ):
        wanted(conditions_of(["Flux", BASE]), scene())
    with pytest.raises(UnsupportedModelError, match="the network has no context_dim"):
        wanted(conditions_of([BASE]), scene())


def test_parts_are_found_by_numbers_and_by_names():
    network = nn.Module()
    network.blocks = nn.Sequential(nn.Embedding(7, 3), nn.Conv2d(5, 2, 1), nn.RMSNorm(9))
    found = scene(network)

    assert [measure(f"blocks.{number}", found) for number in range(3)] == [7, 5, 9]
    assert found.part("blocks.1.kernel_size") == (1, 1)
    assert found.part("nothing.at.all") is None
    network.length = 77
    assert measure("length", found) == 77
    with pytest.raises(UnsupportedModelError, match="the network has no blocks"):
        measure("blocks", found)


def test_a_prompt_of_one_token_is_drawn_as_a_vector():
    """A picture as a prompt steers every block, as a pooled text does."""
    drawn = draw(conditions_of(["SVD_img2vid", BASE]), scene(context_dim=512), noise.STRONG, 7, 3)["cross_attn"]

    assert drawn.shape == (1, 1, 512)
    assert float(drawn.std()) == pytest.approx(noise.VECTOR_MAGNITUDE, rel=0.2)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(16, 16), (20, 16), (32, 16), (36, 16), (48, 32), (52, 32)],
    ids=["text to video", "a mask alone", "camera", "a picture and a mask", "a picture and a control", "all of them"],
)
def test_wan_models_are_shown_pictures_in_the_channels_beside_their_own(channels, expected):
    network = nn.Module()
    network.patch_embedding = nn.Conv3d(channels, 2, 1)
    shown = Scene(network, {}, channels=16, height=8, width=6, frames=2, tokens=12, text_tokens=5)

    assert wan.beside_channels(shown) == expected


# ---------------------------------------------------------------- drawing

ROWS = Conditions(
    {
        "stream": Want((5, 64)),
        "vector": Want((64,)),
        "picture": Want((4, 8, 6), "encoded"),
        "signal": Want((3, 8), "signal"),
        "ids": Want((50,), "ids", below=9),
        "ones": Want((5,), "ones", form=lambda values: [values]),
    },
    {"constant": None},
)


def test_streams_and_vectors_are_drawn_as_the_other_engine_draws_them():
    signals = {"stream": Signal((5, 64)), "vector": Signal((64,))}
    for way in noise.CONDITIONINGS:
        drawn = draw(ROWS, scene(), way, 7, 3)
        expected = noise.conditioning(signals, way, 7, 3)
        assert torch.equal(drawn["stream"], expected["stream"])
        assert torch.equal(drawn["vector"], expected["vector"])


def test_what_is_drawn_is_as_its_kind_says():
    drawn = draw(ROWS, scene(), noise.SILENT, 7, 3, as_encoded=lambda values: values * 100)

    assert 50 < drawn["picture"].std() < 200
    assert 0.5 < drawn["signal"].std() < 2
    assert drawn["constant"] is None
    assert drawn["ids"].shape == (1, 50)
    assert set(drawn["ids"].flatten().tolist()) <= set(range(9))
    assert drawn["ones"][0].dtype == torch.int64  # a float mask would be added to attention's logits
    assert drawn["ones"][0].tolist() == [[1] * 5]


def test_the_same_trajectory_is_drawn_again_and_another_differs():
    first, again, other = (draw(ROWS, scene(), noise.STRONG, 7, number) for number in (3, 3, 4))

    for name in ("stream", "vector", "picture", "signal", "ids"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_pictures_share_no_noise_with_latents_or_with_each_other():
    family = Conditions({name: Want((4, 8, 6), "encoded") for name in ("one", "two")})
    shown = [draw(family, scene(), noise.SILENT, 7, number) for number in (0, 1)]
    drawn = [values for conditioning in shown for values in conditioning.values()]
    drawn += [noise.latents((4, 8, 6), 7, number) for number in range(4)]

    assert len({values.sum().item() for values in drawn}) == len(drawn)


# ---------------------------------------------------------------- the tree


def test_the_tree_is_the_one_that_is_named_or_else_the_environments(tree, tmp_path, monkeypatch):
    monkeypatch.setenv(inprocess_tree.VARIABLE, str(tree))
    assert inprocess_tree.folder_of(None) == tree.resolve()
    monkeypatch.setenv(inprocess_tree.VARIABLE, str(tmp_path / "elsewhere"))
    assert inprocess_tree.folder_of(tree) == tree.resolve()


def test_the_version_is_read_without_importing_anything(tree):
    assert inprocess_tree.version(tree) == "0.33.0"
    (tree / inprocess_tree.VERSION_FILE).unlink()
    assert inprocess_tree.version(tree) == "unknown"


@pytest.fixture
def no_comfy():
    """Modules of a fake ComfyUI leave with the test."""
    yield
    for name in [name for name in sys.modules if name == "comfy" or name.startswith("comfy.")]:
        del sys.modules[name]


def fake(tree: Path, sd: str) -> None:
    """A ComfyUI that reads its command line as the real one does."""
    (tree / "comfy" / "__init__.py").touch()
    (tree / "comfy" / "options.py").write_text(
        "parsing = False\ndef enable_args_parsing():\n    global parsing\n    parsing = True\n"
    )
    (tree / "comfy" / "cli_args.py").write_text(
        "import sys, types, comfy.options\n"
        "args = types.SimpleNamespace(cpu=comfy.options.parsing and '--cpu' in sys.argv, words=sys.argv[:])\n"
    )  # fmt: skip
    (tree / "comfy" / "sd.py").write_text("import comfy.cli_args\n" + sd)


@pytest.mark.usefixtures("no_comfy")
def test_comfyui_gets_a_command_line_of_its_own_and_leaves_no_trace(tree, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    fake(tree, "import logging\nlogging.warning('a\\n warning')\nlogging.info('talk')\nprint('chatter')\n")
    argv, path, handlers = sys.argv[:], sys.path[:], logging.getLogger().handlers[:]

    with inprocess_tree.imported(tree, "cpu") as messages:
        import comfy.cli_args

        assert comfy.cli_args.args.cpu
        assert comfy.cli_args.args.words == ["main.py", "--cpu"]

    assert list(messages.texts) == ["a warning"]
    assert (sys.argv, sys.path, logging.getLogger().handlers) == (argv, path, handlers)
    assert capsys.readouterr().out == ""  # stdout is data
    assert not list(tree.rglob("__pycache__"))
    assert sys.dont_write_bytecode is False


@pytest.mark.usefixtures("no_comfy")
@pytest.mark.parametrize(
    ("sd", "said"),
    [
        ("import einops_of_another_world\n", r"No module named 'einops_of_another_world'.*use ComfyUI's Python"),
        ("raise RuntimeError('no driver\\nof this version')\n",
         r"cannot be imported: RuntimeError: no driver \[comfy/sd.py:2\] \(use ComfyUI's Python"),
    ],
)  # fmt: skip
def test_a_comfyui_that_cannot_be_imported_says_why(tree, sd, said):
    fake(tree, sd)
    with pytest.raises(CalibrationError, match=said), inprocess_tree.imported(tree, "cpu"):
        pass
    assert str(tree) not in sys.path


@pytest.mark.usefixtures("no_comfy")
@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (
            "comfy.of_tomorrow",
            CalibrationError,
            r"ComfyUI 0.33.0 .*'comfy.of_tomorrow'.*update ComfyUI",
        ),
        ("of_ours", ModuleNotFoundError, "of_ours"),
    ],
)
def test_a_module_that_is_missing_inside_is_comfyuis_fault_where_it_is_comfyuis(tree, name, error, said):
    fake(tree, "")
    with pytest.raises(error, match=said), inprocess_tree.imported(tree, "cpu"):
        importlib.import_module(name)


@pytest.mark.usefixtures("no_comfy")
def test_another_tree_or_another_kind_of_device_in_one_process_is_refused(tree, tmp_path_factory, monkeypatch):
    fake(tree, "")
    with inprocess_tree.imported(tree, "cpu"):
        pass
    with (
        pytest.raises(OptionError, match=r"already runs ComfyUI from .*, not from"),
        inprocess_tree.imported(tmp_path_factory.mktemp("other"), "cpu"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: pytest.MonkeyPatch.context())
    with (
        pytest.raises(OptionError, match="already runs ComfyUI on cpu, not on cuda"),
        inprocess_tree.imported(tree, "cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("device", "said"),
    [
        *((device, f"ComfyUI runs on cpu or cuda here, not on '{device}'")
          for device in ("mps", "gpu", "", "cuda:x", "cuda:", "cpu:1")),
        ("cuda:1", "device 'cuda:1' cannot be used: torch finds 1 CUDA devices"),
    ],
)  # fmt: skip
def test_a_device_that_comfyui_is_not_run_on_here_is_refused(tree, monkeypatch, device, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match=said), inprocess_tree.imported(tree, device):
        pass


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (RuntimeError("mat1\nand mat2"), UnsupportedModelError,
         r"^a.st: ComfyUI cannot run this Flux model: RuntimeError: mat1 \[test_inprocess.py:\d+\]$"),
        (torch.OutOfMemoryError("tried"), CalibrationError, "^a.st: .* run this Flux model, out of memory: .*--height"),
        (CalibrationError("ours"), CalibrationError, "^a.st: ours$"),
        (CalibrationError("ours", path="b"), CalibrationError, "^b: ours$"),
        (OptionError("ours"), OptionError, "^ours$"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)  # fmt: skip
def test_what_comfyui_raises_becomes_one_line_with_its_place(raised, error, said):
    with pytest.raises(error, match=said) as caught, inprocess_tree.understood("run", "a.st", "Flux"):
        raise raised
    assert type(caught.value) is error


def test_a_file_in_another_folder_named_comfy_is_not_comfyuis():
    code = compile("raise RuntimeError('no')", "/srv/comfy/plugin.py", "exec")
    with pytest.raises(UnsupportedModelError, match=r"no \[plugin.py:1\]$"), inprocess_tree.understood("run", "a.st"):
        exec(code)


# ---------------------------------------------------------------- the command


def test_the_engine_says_that_it_needs_a_comfyui(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(inprocess_tree.VARIABLE, raising=False)
    words = ["observe", str(emoji.WEIGHTS), "-o", str(tmp_path / "stats"), "--engine", "comfyui"]

    assert main(words) == 2
    assert "the ComfyUI engine needs ComfyUI (set --comfyui-dir DIR" in capsys.readouterr().err
    assert main([*words, "--comfyui-dir", str(tmp_path)]) == 2
    assert "is not a ComfyUI tree" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_auto_says_how_to_run_what_diffusers_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(inprocess_tree.VARIABLE, raising=False)
    model = tmp_path / "unet.safetensors"
    save_file({"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3), "time_embed.0.weight": torch.zeros(16, 8)}, model)

    assert main(["observe", str(model), "-o", str(tmp_path / "stats")]) == 1
    said = capsys.readouterr().err
    assert "its tensor names fit no known family (--comfyui-dir DIR runs it in ComfyUI" in said


def test_auto_takes_diffusers_where_it_can_even_with_a_comfyui(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(inprocess_tree.VARIABLE, str(tree))
    output = tmp_path / "stats.safetensors"
    size = ("--height", "32", "--width", "32", "--steps", "1", "--samples", "1", "--text-tokens", "4")

    assert main(["observe", str(emoji.WEIGHTS), "-o", str(output), *size]) == 0, capsys.readouterr().err
    assert dict(Statistics.load(output).provenance)["engine"] == ("model",)
