from pathlib import Path

import pytest
import torch
from torch import nn

from convert_to_quant.engines import session as session_module
from convert_to_quant.engines.session import Batch, Session, fingerprint
from convert_to_quant.errors import CalibrationError, OutputError, StatisticsError
from convert_to_quant.recorder import record
from convert_to_quant.stats import Statistics

BATCHES = [Batch("small" if number < 3 else "large", (2 * number, 2 * number + 1)) for number in range(6)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


class StopError(Exception):
    """Ends a run in the middle of it."""


def go(session, model, batches=BATCHES, *, stop_at=None, ran=None, **options):
    """Run batches with growing inputs."""

    def generate(batch, tick):
        number = BATCHES.index(batch)
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(2, 3, 8, generator=generator) * (number + 1))
        if number == stop_at:
            raise StopError
        tick(2)
        if ran is not None:
            ran.append(number)

    with record(model) as recording:
        model(torch.full((1, 1, 8), 1e6))  # what was recorded before the run does not count
        return session.run(recording, batches, generate, "model.safetensors", seed=1, **options)


@pytest.fixture
def whole(model):
    """What an unbroken run sees."""
    return go(Session(), model)


def test_batches_add_up_to_what_one_recording_sees(model, whole):
    with record(model) as recording:
        for number in range(len(BATCHES)):
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(2, 3, 8, generator=generator) * (number + 1))
    assert whole.statistics == recording.statistics(2 * len(BATCHES), seed=1, steps=1)


@pytest.mark.parametrize(("silent", "strong", "moves"), [(1, 2, False), (1, 2.1, True), (2.1, 1, True), (2, 1, False)])
def test_a_layer_follows_the_conditioning_if_its_range_moves_by_two_either_way(tmp_path, silent, strong, moves):
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

    def generate(batch, _):
        model[0](torch.full((1, 1), float({"silent": silent, "strong": strong}[batch.way])))
        model[1](torch.ones(1, 1))

    batches = [Batch("silent", (0,)), Batch("strong", (1,))]
    with record(model) as recording:
        for resumed in (False, True):
            session = Session(tmp_path / "stats.safetensors", resume=resumed)
            seen = session.run(recording, batches[: 1 + resumed], generate, "model.safetensors")
    assert seen.conditioned == (("0",) if moves else ())


def test_without_an_output_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    go(Session(save_every_seconds=0), model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop_at", [0, 1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(model, whole, tmp_path, stop_at):
    output = tmp_path / "stats.safetensors"
    with pytest.raises(StopError):
        go(Session(output, {"a": 1}, save_every_seconds=0), model, stop_at=stop_at)
    assert [path.name for path in tmp_path.iterdir()] == ([] if stop_at == 0 else ["stats.safetensors.partial"])
    if stop_at:
        seen_before = go(Session(), model, BATCHES[:stop_at]).statistics
        assert Statistics.load(output.with_name("stats.safetensors.partial")) == seen_before
    ran = []
    calls = []
    session = Session(output, {"a": 1}, resume=True, save_every_seconds=0)
    seen = go(session, model, ran=ran, progress=lambda *call: calls.append(call))
    assert ran == list(range(stop_at, 6))
    assert calls == [(2 * number, 12) for number in range(stop_at, 7)]
    assert seen.statistics == whole.statistics
    output.mkdir()
    with pytest.raises(OutputError):
        session.finish(seen.statistics)
    output.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors.partial"], "progress is never lost"
    session.finish(seen.statistics)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]
    assert Statistics.load(output) == whole.statistics


def test_a_session_of_one_process_waits_for_no_other(model, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "gather", lambda _: pytest.fail("a process of torchrun may run it alone"))
    session = Session(tmp_path / "stats.safetensors")
    seen = go(session, model)
    session.finish(seen.statistics)
    assert Statistics.load(tmp_path / "stats.safetensors") == whole.statistics


def test_saving_waits_for_its_time_or_the_last_batch(model, tmp_path):
    with pytest.raises(StopError):
        go(Session(tmp_path / "stats.safetensors", save_every_seconds=60), model, stop_at=5)
    assert list(tmp_path.iterdir()) == []
    go(Session(tmp_path / "stats.safetensors", save_every_seconds=60), model)  # trials may follow
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors.partial"]


def test_inputs_that_are_not_finite_are_refused_after_their_batch(model):
    ran = []
    torch.nn.init.constant_(model[0].bias, torch.inf)
    with pytest.raises(CalibrationError, match=r"model\.safetensors: 2: the inputs of 1 layer have infinities"):
        go(Session(), model, ran=ran)
    assert ran == [0]


MADE_WITH = {"steps": 8, "model": fingerprint()}


@pytest.fixture
def unfinished(model, tmp_path):
    """The output of a run that was stopped."""
    output = tmp_path / "stats.safetensors"
    with pytest.raises(StopError):
        go(Session(output, MADE_WITH, save_every_seconds=0), model, stop_at=2)
    return output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**MADE_WITH, "steps": 4}, "cannot resume: made with steps 8, not 4"),
        ({**MADE_WITH, "model": "sha256:1"}, "cannot resume: made with another model"),
        ({"steps": 8}, "cannot resume: made with another model"),
        ({**MADE_WITH, "lora": "x"}, "cannot resume: made with lora unset, not x"),
    ],
)
def test_other_options_or_models_are_not_resumed(model, unfinished, options, message):
    before = unfinished.with_name("stats.safetensors.partial").read_bytes()
    with pytest.raises(StatisticsError, match=message):
        go(Session(unfinished, options, resume=True), model)
    assert unfinished.with_name("stats.safetensors.partial").read_bytes() == before


def test_other_layers_are_not_resumed(unfinished):
    other = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    with pytest.raises(StatisticsError, match="it recorded other layers"), record(other) as recording:
        Session(unfinished, MADE_WITH, resume=True).run(recording, [], None, "model.safetensors")


@pytest.mark.parametrize(
    ("partial", "resume", "message"),
    [("s.safetensors.partial-0-of-2", True, "processes other than 1"), ("s[1].safetensors.partial", False, "exists")],
)
def test_an_unfinished_run_is_not_overwritten(tmp_path, partial, resume, message):
    (tmp_path / partial).touch()
    output = tmp_path / partial.partition(".partial")[0]
    with pytest.raises(OutputError, match=f"an unfinished run .*{message}"):
        Session(output, resume=resume)
    Session(output.with_name("s1.safetensors"))  # brackets in a name are no pattern


def test_a_run_of_another_version_is_not_resumed(model, unfinished, monkeypatch):
    monkeypatch.setattr(session_module, "__version__", "0.0.0")
    with pytest.raises(StatisticsError, match=r"cannot resume: made with tool version .*, not 0\.0\.0"):
        go(Session(unfinished, MADE_WITH, resume=True), model)


def test_only_the_first_process_writes_the_output(whole, tmp_path):
    session = Session(tmp_path / "s.safetensors")
    for session.rank in (1, 0):
        session.finish(whole.statistics)
        assert (tmp_path / "s.safetensors").exists() is (session.rank == 0)


def test_a_damaged_partial_file_is_an_error_of_ours(model, unfinished):
    partial = unfinished.with_name("stats.safetensors.partial")
    partial.write_bytes(partial.read_bytes()[:-9])
    with pytest.raises(Exception, match=r"stats\.safetensors\.partial: ") as caught:
        go(Session(unfinished, MADE_WITH, resume=True), model)
    assert type(caught.value).__module__ == "convert_to_quant.errors"


def test_a_complete_output_is_recognized_and_another_is_not(model, tmp_path):
    output = tmp_path / "stats.safetensors"
    session = Session(output, {"steps": 8}, resume=True)
    assert session.finished() is None
    seen = go(session, model)
    session.finish(seen.statistics)
    assert Session(output, {"steps": 8}).finished() is None  # without --resume it is made anew
    assert Session(output, {"steps": 8}, resume=True).finished() == seen.statistics
    with pytest.raises(OutputError, match="the file is complete and was made with steps 8, not 9"):
        Session(output, {"steps": 9}, resume=True).finished()
    seen.statistics.save(output)
    with pytest.raises(OutputError, match="the file is complete and was not made by a session"):
        Session(output, {"steps": 8}, resume=True).finished()


def test_fingerprints_tell_contents_apart_and_not_names(tmp_path, monkeypatch):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    zeros = bytes(3_000_000)
    one, same = write("one", zeros), write("same", zeros)
    assert fingerprint(one) == fingerprint(same)
    for other in (zeros[:-1], b"x" + zeros[1:], zeros[:-1] + b"x"):
        assert fingerprint(write("other", other)) != fingerprint(one)
    write("folder/a", b"1")
    first = fingerprint(tmp_path / "folder")
    write("folder/b", b"")
    both = fingerprint(tmp_path / "folder")
    assert both != first
    listed = sorted((tmp_path / "folder").rglob("*"))
    for order in (listed, listed[::-1]):  # in whatever order a disk lists it
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rglob", lambda *_, order=order: iter(order))
            assert fingerprint(tmp_path / "folder") == both
    assert fingerprint(one, same) != fingerprint(one)
