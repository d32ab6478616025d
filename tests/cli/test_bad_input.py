"""Bad input at the command line: its message, its exit code, and nothing written or changed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Command = Callable[..., Any]
Folder = Callable[[], dict[str, bytes]]
Save = Callable[..., Path]

LAYER = ("--actcal", "--actcal-engine", "layer")


@pytest.fixture
def refused(ctq: Command, folder: Folder) -> Callable[..., None]:
    """refused(code, message, words...): the command fails that way and every file stays as it is."""

    def check(code: int, message: str, *words: object, **options: Any) -> None:
        before = folder()
        outcome = ctq(*words, **options)
        assert outcome.err == f"error: {message}\n"
        assert outcome.code == code
        assert outcome.out == ""
        assert folder() == before

    return check


@pytest.fixture
def fp8(save: Save, build: Any) -> Callable[..., Path]:
    """A file of two FP8 layers that no family claims, after changes to its tensors."""

    def make(change: Callable[[dict[str, Any]], Any] | None = None, marking: str = "tensor", **options: Any) -> Path:
        tensors, metadata = build.quantized(["blocks.0", "blocks.1"], marking, **options)
        if change is not None:
            change(tensors)
        return save("in.safetensors", tensors, metadata)

    return make


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("words", [LAYER, ()], ids=["calibrate", "convert"])
class TestInputsThatCannotBeRead:
    def test_missing(self, refused: Any, tmp_path: Path, words: Any) -> None:
        path = tmp_path / "none.safetensors"
        refused(1, f"{path}: no such file", "-i", path, "-o", tmp_path / "out.safetensors", *words)

    def test_a_folder(self, refused: Any, tmp_path: Path, words: Any) -> None:
        refused(1, f"{tmp_path}: a folder, not a file", "-i", tmp_path, "-o", tmp_path / "out.safetensors", *words)

    def test_empty(self, refused: Any, tmp_path: Path, words: Any) -> None:
        path = write(tmp_path / "a.safetensors", b"")
        refused(1, expected(path), "-i", path, "-o", tmp_path / "out.safetensors", *words)

    def test_not_a_safetensors_file(self, refused: Any, tmp_path: Path, words: Any) -> None:
        path = write(tmp_path / "a.safetensors", b"GGUF" + bytes(1000))
        refused(1, expected(path), "-i", path, "-o", tmp_path / "out.safetensors", *words)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
    def test_truncated(self, refused: Any, fp8: Any, words: Any, share: float) -> None:
        path = fp8()
        whole = path.read_bytes()
        write(path, whole[: int(len(whole) * share)])
        refused(1, expected(path), "-i", path, "-o", path.with_name("out.safetensors"), *words)

    def test_a_header_length_that_lies(self, refused: Any, fp8: Any, words: Any) -> None:
        path = fp8()
        write(path, struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
        refused(1, expected(path), "-i", path, "-o", path.with_name("out.safetensors"), *words)

    @pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
    def test_a_pickle_is_refused_and_never_opened(self, refused: Any, tmp_path: Path, words: Any, name: str) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "it ran",))

        path = write(tmp_path / name, pickle.dumps(Bomb()))
        message = (
            f"{path}: a pickled checkpoint; opening one runs the code in it, so it was not opened "
            "(convert it to safetensors in a sandbox first)"
        )
        refused(1, message, "-i", path, "-o", tmp_path / "out.safetensors", *words)
        assert not (tmp_path / "it ran").exists()


def expected(path: Path) -> str:
    """The reader's own words, which its own tests check; here only that they arrive."""
    from convert_to_quant.checkpoint import open_checkpoint
    from convert_to_quant.errors import HeaderError

    with pytest.raises(HeaderError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_nan_in_a_weight_to_be_converted(
    refused: Any, save: Save, flux_tensors: Callable[[], dict[str, Any]], build: Any, bad: float
) -> None:
    tensors = flux_tensors()
    bits = tensors["double_blocks.0.img_mlp.2.weight"][1].copy()
    bits[7, 3] = {"nan": 0x7FC0, "inf": 0xFF80}[str(bad)]
    tensors["double_blocks.0.img_mlp.2.weight"] = ("BF16", bits)
    path = save("in.safetensors", tensors)
    message = (
        f"{path}: double_blocks.0.img_mlp.2.weight: the weight has NaN or infinite values "
        "(FP8 cannot repair them; the input file is damaged or its training diverged)"
    )
    for words in ((), LAYER):
        refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), *words)


@pytest.mark.parametrize("place", ["-o", "--in-place"])
def test_nan_in_an_fp8_weight(refused: Any, fp8: Any, place: str) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        tensors["blocks.1.weight"][1][2, 3] = 0xFF

    path = fp8(damage)
    target = [place] if place == "--in-place" else [place, path.with_name("out.safetensors")]
    message = f"{path}: blocks.1.weight: the weight has NaN or infinite values"
    refused(1, message, "-i", path, *target, *LAYER)


@pytest.mark.parametrize("layer", ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"])
def test_nan_in_an_fp8_weight_of_a_model_that_runs(ctq: Command, folder: Folder, fp8_file: Path, layer: str) -> None:
    from convert_to_quant.checkpoint import open_checkpoint

    with open_checkpoint(fp8_file) as checkpoint:
        info = checkpoint.tensors[layer + ".weight"]
        offset = checkpoint.files[0].header.data_start + info.start + 5
    with fp8_file.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x7f")
    before = folder()
    outcome = ctq("-i", fp8_file, "-o", fp8_file.with_name("out.safetensors"), "--actcal", "--actcal-samples", 1)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {fp8_file}: double_blocks.0.img_attn.qkv: the inputs of ")
    assert "layers have infinities or NaN" in outcome.err
    assert folder() == before


def test_nan_in_a_bias_of_a_model_that_is_converted_is_told_of_the_input(
    ctq: Command, folder: Folder, flux_file: Path
) -> None:
    from convert_to_quant.checkpoint import open_checkpoint

    with open_checkpoint(flux_file) as checkpoint:
        info = checkpoint.tensors["img_in.bias"]
        offset = checkpoint.files[0].header.data_start + info.start
    with flux_file.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * info.nbytes)
    before = folder()
    outcome = ctq("-i", flux_file, "-o", flux_file.with_name("out.safetensors"), "--actcal", "--actcal-samples", 1)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {flux_file}: double_blocks.0.")
    assert "layers have infinities or NaN" in outcome.err
    assert folder() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0], ids=str)
def test_a_bad_weight_scale(refused: Any, fp8: Any, value: float) -> None:
    path = fp8(lambda tensors: tensors.update({"blocks.0.weight_scale": np.float32(value)}))
    message = f"{path}: blocks.0.weight_scale: scales should be finite and not negative, found {value}"
    refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), *LAYER)


def damage_input_scale(path: Path, value: float) -> str:
    """Overwrite one of the tiny Flux.1's input scales; returns its name."""
    from convert_to_quant.checkpoint import open_checkpoint

    key = "double_blocks.0.img_mlp.0.input_scale"
    with open_checkpoint(path) as checkpoint:
        place = checkpoint.files[0].header.data_start + checkpoint.tensors[key].start
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<f", value))
    return key


@pytest.mark.parametrize(("value", "engine"), [(np.nan, "layer"), (-1.0, "layer"), (np.inf, "model")])
def test_a_bad_input_scale_is_written_anew(ctq: Command, fp8_file: Path, flux: Any, value: float, engine: str) -> None:
    from convert_to_quant.checkpoint import open_checkpoint

    key = damage_input_scale(fp8_file, value)
    words = ("--in-place", "--actcal", "--actcal-engine", engine, "--actcal-samples", 1)
    outcome = ctq("-i", fp8_file, *words)
    assert outcome.code == 0, outcome.err
    problem = f"scales should be finite and not negative, found {value}"
    assert f"note: {key}: {problem}: of no use until a calibration writes it anew\n" in outcome.err
    with open_checkpoint(fp8_file) as checkpoint:
        assert 0 < checkpoint.float32(key) <= 1
    assert "of no use" not in ctq("-i", fp8_file, *words, "--dry-run").err


def test_a_bad_input_scale_that_is_used_is_refused(
    refused: Any, save: Save, flux_file: Path, fp8_file: Path, flux_tensors: Any
) -> None:
    key = damage_input_scale(fp8_file, np.nan)
    message = f"{fp8_file}: {key}: scales should be finite and not negative, found nan"
    refused(1, message, "check", flux_file, fp8_file, "--height", 32, "--width", 32, "--steps", 1, "--samples", 1)


def test_a_missing_weight_scale(refused: Any, fp8: Any) -> None:
    path = fp8(lambda tensors: tensors.pop("blocks.1.weight_scale"))
    message = f"{path}: blocks.1: marked as float8_e4m3fn, but there is no .weight_scale (convert it again)"
    refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), *LAYER)


def test_a_weight_scale_whose_shape_fits_no_rule(refused: Any, fp8: Any) -> None:
    path = fp8(lambda tensors: tensors.update({"blocks.0.weight_scale": np.ones(5, np.float32)}))
    message = (
        f"{path}: blocks.0.weight_scale: a weight scale of shape [5] fits no rule for a weight of shape [16, 32]; "
        "expected one value, one per row, or one per block"
    )
    refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), *LAYER)


def test_comfy_quant_that_is_not_json(refused: Any, fp8: Any) -> None:
    path = fp8(lambda tensors: tensors.update({"blocks.0.comfy_quant": np.frombuffer(b"{oops", np.uint8)}))
    problem = "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)), found b'{oops'"
    message = f"{path}: blocks.0.comfy_quant: {problem}"
    refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), *LAYER)


def test_a_file_without_fp8_layers_is_no_model_to_calibrate(refused: Any, save: Save) -> None:
    from convert_to_quant.cli import calibrate

    path = save("in.safetensors", {"norm.weight": np.ones(4, np.float32)})
    message = (
        f"{path}: no FP8 layers with weight scales in this file "
        "(convert and calibrate in one step: convert_to_quant -i IN -o OUT --actcal)"
    )

    refused(1, message, path, "-o", path.with_name("out.safetensors"), main=calibrate.main)


def test_a_file_without_linear_layers_is_nothing_to_convert(refused: Any, save: Save) -> None:
    path = save("in.safetensors", {"norm.weight": np.ones(4, np.float32)})
    message = f"{path}: nothing to convert: no layer would become FP8 (--dry-run says why, per layer)"
    refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), "-q")


@pytest.mark.parametrize("words", [("-o", "out.safetensors"), ("-o", "out.safetensors", "--dry-run"), ("--in-place",)])
def test_a_plain_cast_has_nothing_to_calibrate(refused: Any, save: Save, words: Any) -> None:
    codes = np.full((64, 64), 0x38, np.uint8)
    path = save(
        "in.safetensors", {"blocks.0.a.weight": ("F8_E4M3", codes), "head.weight": np.eye(64, dtype=np.float32)}
    )
    message = (
        f"{path}: blocks.0.a: its 1 FP8 layers are a plain cast without scales, and nothing reads input scales beside "
        "them (convert the original, in 16 or 32 bits)"
    )
    refused(1, message, "-i", path, "--actcal", *words)


@pytest.mark.parametrize("words", [LAYER, ()], ids=["calibrate", "convert"])
class TestOutputsThatCannotBe:
    @pytest.fixture
    def source(self, fp8: Any, flux_file: Path, words: Any) -> Path:
        return fp8() if words else flux_file

    def test_missing_folder(self, refused: Any, source: Path, words: Any) -> None:
        output = source.with_name("none") / "out.safetensors"
        message = f"{output}: cannot be written: the folder {output.parent} does not exist"
        refused(1, message, "-i", source, "-o", output, *words)

    def test_no_permission(self, ctq: Command, source: Path, words: Any) -> None:
        with tempfile.TemporaryDirectory() as name:  # root may write anywhere, so root becomes nobody meanwhile
            folder = Path(name)
            folder.chmod(0o755)
            readable = shutil.copy(source, folder / "in.safetensors")
            assert ctq("-i", readable, "-o", folder / "made.safetensors", *words).code == 0, "all is imported now"
            locked = folder / "locked"
            locked.mkdir(mode=0o555)
            output = locked / "out.safetensors"
            user = os.geteuid()
            if user == 0:
                os.seteuid(65534)
            try:
                outcome = ctq("-i", readable, "-o", output, "-q", *words)
            finally:
                os.seteuid(user)
            assert outcome.err == f"error: {output}: cannot be written: no permission to write there\n"
            assert outcome.code == 1
            assert not list(locked.iterdir())

    def test_a_folder(self, refused: Any, source: Path, words: Any) -> None:
        output = source.with_name("a folder")
        output.mkdir()
        before = source.read_bytes()
        refused(1, f"{output}: cannot be written: it is a folder", "-i", source, "-o", output, *words)
        assert source.read_bytes() == before

    @pytest.mark.parametrize("link", ["itself", "symbolic link", "hard link", "another spelling"])
    def test_the_input(self, refused: Any, source: Path, words: Any, link: str) -> None:
        output = source.with_name("link.safetensors")
        if link == "itself":
            output = source
        elif link == "symbolic link":
            output.symlink_to(source)
        elif link == "hard link":
            output.hardlink_to(source)
        else:
            output = source.parent / ".." / source.parent.name / source.name
        hint = " (name another output, or add --in-place)" if words else ""
        message = f"{output}: the output is the same file as the input {source}{hint}"
        refused(1, message, "-i", source, "-o", output, *words)


def test_a_full_disk(ctq: Command, folder: Folder, flux_file: Path) -> None:
    """A limit on file sizes stands in for it: the write fails half-way."""
    import resource
    import signal

    before = folder()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        outcome = ctq("-i", flux_file, "-o", flux_file.with_name("out.safetensors"), *LAYER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert outcome.code == 1
    assert outcome.err.endswith("out.safetensors: cannot be written: the file system allows no file that large\n")
    assert folder() == before


class TestReports:
    def test_missing_folder_is_seen_before_the_work(self, refused: Any, fp8: Any) -> None:
        path = fp8()
        report = path.with_name("none") / "report.json"
        message = f"{report}: cannot be written: the folder {report.parent} does not exist"
        refused(1, message, "-i", path, "-o", path.with_name("out.safetensors"), "--json", report, *LAYER)

    def test_the_model_itself(self, refused: Any, fp8: Any) -> None:
        path = fp8()
        message = f"{path}: --json and -i are the same file (name another file for --json)"
        refused(1, message, "-i", path, "--dry-run", "--json", path, *LAYER)

    def test_the_output(self, refused: Any, fp8: Any) -> None:
        path = fp8()
        output = path.with_name("out.safetensors")
        message = f"{output}: --json and -o are the same file (name another file for --json)"
        refused(1, message, "-i", path, "-o", output, "--json", output, *LAYER)


class TestAdapters:
    def lora(self, save: Save, name: str, rows: int = 16, columns: int = 32) -> Path:
        tensors = {f"{name}.lora_A.weight": np.ones((2, columns), np.float32)}
        return save("lora.safetensors", {**tensors, f"{name}.lora_B.weight": np.ones((rows, 2), np.float32)})

    def test_missing(self, refused: Any, fp8: Any) -> None:
        path = fp8()
        lora = path.with_name("none.safetensors")
        refused(1, f"{lora}: no such file", "-i", path, "--in-place", *LAYER, "--actcal-lora", lora)

    def test_that_match_nothing(self, refused: Any, fp8: Any, save: Save) -> None:
        path, lora = fp8(), self.lora(save, "transformer.other.0")
        message = (
            f"{lora}: transformer.other.0: nothing in this LoRA can be applied: 1 adapters match no layer of the "
            "checkpoint unambiguously; its layers have names like blocks.0 (is it made for this model?)"
        )
        refused(1, message, "-i", path, "--in-place", *LAYER, "--actcal-lora", lora)

    def test_whose_shapes_do_not_fit(self, refused: Any, fp8: Any, save: Save) -> None:
        path, lora = fp8(), self.lora(save, "diffusion_model.blocks.1", columns=48)
        message = (
            f"{lora}: diffusion_model.blocks.1.lora_A.weight: its shape should be [2, 32], since blocks.1 is [16, 32], "
            "but it is [2, 48] (the LoRA was made for another model)"
        )
        refused(1, message, "-i", path, "--in-place", *LAYER, "--actcal-lora", lora)

    def test_that_do_not_fit_are_refused_before_anything_is_converted(
        self, refused: Any, flux_file: Path, save: Save, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from convert_to_quant import convert

        monkeypatch.setattr(convert, "convert", None)
        lora = self.lora(save, "diffusion_model.double_blocks.0.img_mlp.0")
        message = (
            f"{lora}: diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight: its shape should be [128, 2], since "
            "double_blocks.0.img_mlp.0 is [128, 32], but it is [16, 2] (the LoRA was made for another model)"
        )
        output = flux_file.with_name("out.safetensors")
        refused(1, message, "-i", flux_file, "-o", output, *LAYER, "--actcal-lora", lora)

    def test_with_nan(self, refused: Any, fp8: Any, save: Save) -> None:
        lora = save("lora.safetensors", {"blocks.0.lora_A.weight": np.full((1, 32), np.nan, np.float32),
                                         "blocks.0.lora_B.weight": np.ones((16, 1), np.float32)})  # fmt: skip
        path = fp8()
        message = f"{lora}: blocks.0.lora_A.weight: holds NaN or infinite values (the file is damaged)"
        refused(1, message, "-i", path, "--in-place", *LAYER, "--actcal-lora", lora)

    def test_as_output(self, refused: Any, fp8: Any, save: Save) -> None:
        path, lora = fp8(), self.lora(save, "blocks.0")
        message = f"{lora}: the output is the same file as the input {lora} (name another output)"
        refused(1, message, "-i", path, "-o", lora, *LAYER, "--actcal-lora", f"{lora}:0.5")

    def test_of_a_strength_that_is_no_number(self, refused: Any, fp8: Any, save: Save) -> None:
        path, lora = fp8(), self.lora(save, "blocks.0")
        message = f"{lora}: a LoRA's strength should be a finite number, found nan"
        refused(2, message, "-i", path, "--in-place", *LAYER, "--actcal-lora", f"{lora}:nan")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--actcal-samples", "0"), "samples should be at least 1, found 0"),
        (("--actcal-samples", "-3"), "samples should be at least 1, found -3"),
        (("--actcal-percentile", "0"), "a percentile should be above 0 and at most 100, found 0.0"),
        (("--actcal-percentile", "100.01"), "a percentile should be above 0 and at most 100, found 100.01"),
        (("--actcal-percentile", "nan"), "a percentile should be above 0 and at most 100, found nan"),
        (("--actcal-margin", "0.9"), "a margin should be at least 1, found 0.9 (below 1 clips what was seen)"),
        (("--actcal-margin", "nan"), "a margin should be at least 1, found nan (below 1 clips what was seen)"),
        (("--actcal-seed", "-1"), "a seed should not be negative, found -1"),
        (("--actcal-device", "gpu"), "unknown device 'gpu' (cpu, cuda, cuda:0 or xpu)"),
        (("--actcal-device", "cuda:x"), "unknown device 'cuda:x' (cpu, cuda, cuda:0 or xpu)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_out_of_range_are_misuse(refused: Any, fp8: Any, words: Any, message: str) -> None:
    refused(2, message, "-i", fp8(), "--in-place", "--actcal", *words)


def test_a_device_that_this_machine_lacks(ctq: Command, folder: Folder, fp8_file: Path) -> None:
    before = folder()
    outcome = ctq("-i", fp8_file, "--in-place", "--actcal", "--actcal-device", "cuda:77")
    assert outcome.code == 2
    assert outcome.err.startswith("error: device 'cuda:77' cannot be used: ")
    assert outcome.err.endswith("(without a device the model runs on the CPU)\n")
    assert folder() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the new file with -o OUT (or --in-place, or --dry-run)"),
        (("--in-place",), "--in-place needs --actcal: only scales can be written in place"),
        (
            ("--in-place", "--actcal"),
            "--in-place calibrates a model that is FP8 already, and this one is not; use -o OUT",
        ),
        (("--dry-run", "--actcal-lora", "a"), "--actcal-lora needs --actcal"),
        (("--dry-run", "--actcal-samples", "3"), "--actcal-samples needs --actcal"),
        (("--dry-run", "--actcal-text-tokens", "3"), "--actcal-text-tokens needs --actcal"),
        (
            ("--dry-run", "--enable-fp8-matmul"),
            "--enable-fp8-matmul needs --actcal: without input scales FP8 products would use 1.0",
        ),
        (
            ("--dry-run", "--float16-safe"),
            "--float16-safe needs --actcal: it is about the input scales that --actcal finds",
        ),
        (
            ("--dry-run", "--actcal", "--no-input-scale"),
            "--no-input-scale leaves out what --actcal is asked to find",
        ),
        (
            ("--dry-run", "--legacy", "--scaling-mode", "row"),
            "legacy files know one scale per tensor only, not --scaling_mode row",
        ),
        (("--dry-run", "--block-size", "0"), "--block_size should be at least 1 and below 65536, found 0"),
        (
            ("--dry-run", "--exclude-layers", "("),
            "--exclude-layers '(' is no regular expression: missing ), unterminated subpattern at position 0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_flags_that_contradict_each_other_or_do_nothing_are_misuse(
    refused: Any, flux_file: Path, words: Any, message: str
) -> None:
    refused(2, message, "-i", flux_file, *words)


def test_an_unknown_preset_suggests_the_nearest(ctq: Command, flux_file: Path, folder: Folder) -> None:
    before = folder()
    outcome = ctq("-i", flux_file, "-o", flux_file.with_name("out.safetensors"), "--preset", "flxu1")
    assert outcome.code == 2
    assert outcome.err.startswith("error: unknown preset 'flxu1' (did you mean 'flux1'? presets: chroma, ")
    assert folder() == before


def test_in_place_with_another_output_is_misuse(refused: Any, fp8: Any) -> None:
    path = fp8()
    output = path.with_name("out.safetensors")
    message = f"--in-place changes {path}; leave -o out, or drop --in-place to write {output}"
    refused(2, message, "-i", path, "-o", output, "--in-place", *LAYER)


@pytest.mark.parametrize(
    ("input_scale", "problem"),
    [
        (None, "the file has no such tensor yet"),
        (("BF16", np.uint16(0x3F80)), "it is BF16 [] and must become F32 []"),
    ],
    ids=["no scale", "a scale in bfloat16"],
)
def test_in_place_where_no_float32_scalar_exists_is_refused_before_any_work(
    refused: Any, fp8: Any, monkeypatch: pytest.MonkeyPatch, input_scale: Any, problem: str
) -> None:
    from convert_to_quant.cli import convert

    def change(tensors: dict[str, Any]) -> None:
        tensors.pop("blocks.1.input_scale")
        if input_scale is not None:
            tensors["blocks.1.input_scale"] = input_scale

    monkeypatch.setattr(convert, "calibrate", None)
    path = fp8(change)
    message = f"{path}: blocks.1.input_scale: in place is not possible: {problem} (write a new file with -o instead)"
    refused(1, message, "-i", path, "--in-place", *LAYER)


def test_a_damaged_undo_file_stops_everything(refused: Any, fp8: Any) -> None:
    path = fp8()
    undo = write(path.with_name(path.name + ".undo"), b"rubbish")
    message = f"{undo}: the undo file is damaged, so nothing was restored (check its contents)"
    refused(1, message, "-i", path, "--in-place", *LAYER)


def test_a_report_of_layers_that_saw_nothing_is_still_json(ctq: Command, fp8: Any) -> None:
    path = fp8(lambda tensors: tensors["blocks.0.weight"][1].fill(0))
    outcome = ctq("-i", path, "--dry-run", "--json", "-", *LAYER)
    document = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = document["layers"]
    assert (first["range"], first["scale_after"]) == (None, 1.0)
    assert first["reason"] == "weight is empty or all zero: keeps its scale"
    assert second["range"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ("-i", "in", "-o", "out", "--actcal", "--actcal-device", "cuda:99"),
        ("-i", "in", "--dry-run", "--actcal", "--actcal-device", "cuda:99"),
        ("observe", "in", "-o", "out", "--device", "cuda:99"),
        ("check", "in", "out", "--device", "cuda:99"),
    ],
    ids=" ".join,
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(ctq: Any, words: tuple[str, ...]) -> None:
    outcome = ctq(*words)
    assert outcome.code == 2
    assert outcome.err.startswith("error: device 'cuda:99' cannot be used: ")


@pytest.mark.parametrize("module", [("-i", "in", "--dry-run", "--actcal"), ("observe", "in", "-o", "out")])
def test_mps_is_not_offered_and_it_says_why(ctq: Any, module: tuple[str, ...]) -> None:
    flag = "--actcal-device" if "--actcal" in module else "--device"
    outcome = ctq(*module, flag, "mps")
    assert (outcome.code, outcome.err) == (
        2,
        "error: device 'mps' cannot be used: it has no float64, in which statistics are kept "
        "(cpu, cuda, cuda:0 or xpu)\n",
    )
