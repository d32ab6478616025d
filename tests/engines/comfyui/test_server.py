"""The client and its sessions against a double of ComfyUI's server: what is recorded, told, and left behind."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_server import answer, assert_same

from convert_to_quant.comfyui_nodes.recording import Recorder
from convert_to_quant.engines.comfyui import remote, server, workflow
from convert_to_quant.engines.comfyui.server import Server, check_address
from convert_to_quant.errors import CalibrationError, OptionError, StatisticsError
from convert_to_quant.stats import Statistics

Nodes = dict[str, Any]
PATIENT, HASTY = 20.0, 0.4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask as often as tests need."""
    monkeypatch.setattr(server, "LATER_SECONDS", 0.05)
    monkeypatch.setattr(server, "ARRIVAL_SECONDS", 0.5)


@pytest.fixture
def double(serve: Any) -> Any:
    """A running server."""
    return serve()


def observe(
    double: Any, nodes: Nodes, prompts: list[str] | None = None, seeds: int = 2, *,
    progress: Callable[[int, int], None] = lambda *_: None, patience: float = PATIENT,
) -> tuple[dict[str, Statistics], int]:  # fmt: skip
    """As the command does."""
    with Server(double.address, patience) as client:
        plan = workflow.plan(nodes, client.types(workflow.classes(nodes)))
        return remote.observe(client, plan, remote.plan_runs(plan, prompts, seeds, 42), "kept", progress)


def fails(double: Any, nodes: Nodes, said: str, error: type[Exception] = CalibrationError, **how: Any) -> None:
    """`observe` does, and says why."""
    with pytest.raises(error, match=said):
        observe(double, nodes, **how)


def is_not_comfyui(address: str, said: str, patience: float = PATIENT) -> None:
    with Server(address, patience) as client, pytest.raises(CalibrationError, match=said):
        client.types([])


def directly(comfyui: Any, seeds: list[int], steps: int = 3) -> Statistics:
    """What the double's model receives, without any server."""
    recorder = Recorder()
    model = recorder.attach(comfyui.model())
    for seed in seeds:
        noise = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
        comfyui.guider(model).sample(noise, tuple(1 - step / steps for step in range(steps)))
    return recorder.statistics()


def queue(double: Any, nodes: Nodes) -> str:
    """Queue a run as another client."""
    body = json.dumps({"prompt": nodes, "client_id": "somebody else"}).encode()
    request = urllib.request.Request(f"{double.address}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answered:
        return str(json.load(answered)["prompt_id"])


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


# What is recorded


def test_every_prompt_is_run_with_seeds_of_its_own_and_totals_add_up(double: Any, flux: Nodes, comfyui: Any) -> None:
    seen: list[tuple[int, int]] = []
    found, idle = observe(double, flux, ["a dog", "a cat"], 2, progress=lambda done, total: seen.append((done, total)))

    assert_same(found["flux"], directly(comfyui, [42, 43, 44, 45]))
    assert idle == 0
    assert seen == [(done, 4) for done in range(5)]
    asked = [(prompt["5"]["inputs"]["text"], prompt["9"]["inputs"]["seed"]) for prompt in double.prompts]
    assert asked == [("a dog", 42), ("a dog", 43), ("a cat", 44), ("a cat", 45)]
    facts = found["flux"].provenance
    assert (facts["engine"], facts["runs"], facts["prompts"], facts["seed"]) == (("comfyui",), ("4",), ("2",), ("42",))
    output = comfyui.root / "output"
    assert [path.relative_to(output) for path in output.rglob("*.*")] == [Path("kept/flux_00001_.safetensors")]
    assert double.requests.count("GET /view") == 1
    assert not {"POST /queue", "POST /interrupt"} & set(double.requests)  # nothing is left to cancel

    found, idle = observe(double, flux)  # another session does not go on from it
    assert_same(found["flux"], directly(comfyui, [42, 43]))
    assert idle == 0


def test_totals_are_whole_on_a_server_that_forgets(serve: Any, flux: Nodes, comfyui: Any) -> None:
    found, _ = observe(serve(remembers=False), flux, seeds=3)
    assert_same(found["flux"], directly(comfyui, [42, 43, 44]))
    assert len(list((comfyui.root / "output").rglob("*.*"))) == 3


def test_two_models_are_recorded_apart(double: Any, wan: Nodes, comfyui: Any) -> None:
    found, _ = observe(double, wan)
    assert list(found) == ["wan_high", "wan_low"]
    for statistics in found.values():
        assert_same(statistics, directly(comfyui, [42, 43], steps=4))
    files = ("folder/wan_high.safetensors", "wan_low.safetensors")
    assert double.sampled == [(name, seed) for seed in (42, 43) for name in files]


@pytest.mark.parametrize("change", [{"model": ["1", 0], "latent_image": ["9", 0]}, {"cfg": 2.0}],
                         ids=["one model on two ways", "two independent samplers"])  # fmt: skip
def test_two_samplers_of_one_model_are_one_file(double: Any, flux: Nodes, comfyui: Any, change: Nodes) -> None:
    again = {"class_type": "KSampler", "inputs": {**flux["9"]["inputs"], **change}}
    found, _ = observe(double, {**flux, "12": again})
    assert_same(found["flux"], directly(comfyui, [42, 42, 43, 43]))


def test_runs_that_the_server_answers_from_memory_are_counted(double: Any, flux: Nodes, comfyui: Any) -> None:
    with Server(double.address) as client:
        plan = workflow.plan(flux, client.types(workflow.classes(flux)))
        found, idle = remote.observe(client, plan, [remote.Run("a", 1)] * 2, "kept", lambda *_: None)
    assert idle == 1
    assert_same(found["flux"], directly(comfyui, [1]))


def test_an_address_may_have_a_path(serve: Any, flux: Nodes) -> None:
    double = serve(prefix="/proxy/comfy")
    assert observe(double, flux)[0]["flux"].samples == 2
    assert all(not asked.partition(" ")[2].startswith("/proxy") for asked in double.requests)


# What goes wrong


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_nobody_there() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    is_not_comfyui(address, f"^{address}: no answer: .*is ComfyUI running")


@pytest.mark.parametrize("said", [answer(status=404), answer([1]), answer(b"hello")])
def test_something_else_there(double: Any, said: Any) -> None:
    double.answer_with["/system_stats"] = lambda _: said
    is_not_comfyui(double.address, "the server is not ComfyUI|HTTP error 404 .*is this the address of ComfyUI?")


@pytest.mark.parametrize(
    ("greeting", "drip", "said"),
    [
        (b"SSH-2.0-x\x1b[2J\r\n", b"", r"no answer: .*SSH-2.0-x\\x1b"),
        (b"", b"", "no answer: timed out"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b" ", r"no answer: \d+ bytes in \d+ s"),
    ],
    ids=["speaks no HTTP", "says nothing", "drips"],
)
def test_somebody_who_does_not_answer_is_given_up(greeting: bytes, drip: bytes, said: str) -> None:
    over = threading.Event()

    def talk() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(greeting)
            while not over.wait(HASTY / 10):
                connection.sendall(drip)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=talk)
        thread.start()
        start = time.monotonic()
        is_not_comfyui(f"http://127.0.0.1:{listener.getsockname()[1]}", said, HASTY)
        assert time.monotonic() - start < HASTY + 2
        over.set()
        thread.join()


def test_an_answer_of_any_size_is_not_read(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_JSON_BYTES", 1000)
    double.answer_with["/system_stats"] = lambda _: answer(b"[" * 2000)
    is_not_comfyui(double.address, "its answer to /system_stats is larger than 1,000 bytes")


def test_a_server_without_our_nodes_is_told_how_to_get_them(double: Any, flux: Nodes) -> None:
    del double.classes[workflow.SAVE]
    fails(double, flux, r"does not have the nodes of convert_to_quant .*comfyui install COMFYUI_DIR`, and restart")


def test_redirects_are_not_followed(serve: Any) -> None:
    double, elsewhere = serve(), serve()
    target = f"{elsewhere.address}/system_stats"
    double.answer_with["/system_stats"] = lambda _: answer(status=302, Location=target)
    is_not_comfyui(double.address, f"redirects to {target}, which is not followed")
    assert elsewhere.requests == []


def test_proxies_of_the_environment_are_not_asked(double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    assert observe(double, flux)[0]["flux"].samples == 2


NOTHING = {"type": "x", "message": "no\n\x1b[31mway", "details": "", "extra_info": {}}
TOO_MANY = {"errors": [{"message": "Value 9 bigger than max of 3", "details": "steps"}]}
GONE = {"errors": [{"message": "Value not in list", "details": "unet_name: 'gone' not in ['flux']"}]}


@pytest.mark.parametrize(
    ("path", "said", "error"),
    [
        ("/prompt", answer({"error": NOTHING, "node_errors": []}, 400), r"rejected the workflow: no \\x1b\[31mway$"),
        ("/prompt", answer({"error": NOTHING, "node_errors": {"1": GONE, "9": TOO_MANY}}, 400),
         r"rejected the workflow: node 1 \(Load Diffusion Model\): Value not in list: unet_name: 'gone' not in "
         r"\['flux'\]; node 9 \(Paint\): Value 9 bigger than max of 3: steps$"),
        ("/prompt", answer(b"<html>", 502), "HTTP error 502 for /prompt"),
        ("/prompt", answer(b"<html>", 500), "HTTP error 500 for /prompt"),
        *(("/prompt", answer(said), "rejected the workflow: no reason given")
          for said in (None, [], {"x": 1}, {"prompt_id": 3}, {"prompt_id": "\ud800", "node_errors": [1]})),
        ("/object_info/KSampler", answer({"KSampler": {"input": 3}}), "cannot read .* node type KSampler"),
    ],
)  # fmt: skip
def test_strange_answers_are_errors_and_no_crash(double: Any, flux: Nodes, path: str, said: Any, error: str) -> None:
    double.answer_with[path] = lambda _: said
    fails(double, flux, error)


def test_a_failed_run_is_told_by_node_and_exception(double: Any, flux: Nodes) -> None:
    def happen(step: int) -> None:
        raise MemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    double.happen = happen
    said = r"failed in node 9 \(Paint\) of type KSampler: MemoryError: CUDA out of memory. Tried to allocate 3 GiB$"
    fails(double, flux, said)


def test_what_was_recorded_before_a_failure_is_told(double: Any, flux: Nodes, comfyui: Any) -> None:
    def happen(step: int) -> None:
        if len(double.sampled) == 3:
            raise RuntimeError("enough")

    double.happen = happen
    fails(double, flux, r"enough \(statistics of 2 runs are in .*: kept/flux_00001_.safetensors\)", seeds=4)
    assert Statistics.load(comfyui.root / "output" / "kept" / "flux_00001_.safetensors").samples == 2


def test_a_run_that_somebody_cancels_is_told(double: Any, flux: Nodes) -> None:
    double.happen = lambda _: setattr(double, "interrupted", True)
    fails(double, flux, r"the run was cancelled on the server, in node 9 \(Paint\)")


def test_a_server_that_dies_midway_is_told(double: Any, flux: Nodes) -> None:
    died = threading.Thread(target=double.close)

    def happen(step: int) -> None:
        if step == 1:
            died.start()
            wait_for(lambda: double.interrupted)

    double.happen = happen
    fails(double, flux, r"the server stopped answering during a run, .* s ago", patience=HASTY)
    died.join()


def nothing_queued(_: Any) -> Any:
    return answer({"queue_running": [], "queue_pending": []})


def late(_: Any) -> Any:
    time.sleep(1)
    return answer(status=503)


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        (late, r"stopped answering during a run, .*timed out"),
        (nothing_queued, r"no longer in the server's queue \(was the server restarted"),
    ],
    ids=["hangs", "was restarted"],
)
def test_a_server_that_loses_the_run_is_given_up(double: Any, flux: Nodes, instead: Any, said: str) -> None:
    release = threading.Event()

    def happen(step: int) -> None:
        double.answer_with |= {"/queue": instead}
        if instead is late:
            double.answer_with |= {f"/history/{double.running[0][1]}": late}
        release.wait(10)

    double.happen = happen
    try:
        fails(double, flux, said, patience=HASTY)
    finally:
        release.set()


def test_silence_is_counted_from_the_last_answer(double: Any, flux: Nodes) -> None:
    start = time.monotonic()

    def gateway(_: Any) -> Any:
        if 1.2 <= time.monotonic() - start < 1.4:
            return answer(status=502)
        return answer({"queue_running": [double.running[0][:4]], "queue_pending": []})

    def happen(step: int) -> None:
        if step == 0:
            double.answer_with["/queue"] = gateway
        time.sleep(0.1)
        if step == 15:
            del double.answer_with["/queue"]

    double.happen = happen
    flux["9"]["inputs"]["steps"] = 16
    assert observe(double, flux, seeds=1, patience=1.0)[0]["flux"].samples == 1


# Taking a run back


def test_ctrl_c_cancels_our_run_while_it_runs(double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep
    others: list[str] = []

    def pause(_seconds: float) -> None:
        if double.running and not others:
            others.append(queue(double, flux))
            raise KeyboardInterrupt

    double.happen = lambda _: sleep(0.1 if double.client != "somebody else" else 0)
    with monkeypatch.context() as patch:
        patch.setattr(server.time, "sleep", pause)
        with pytest.raises(KeyboardInterrupt):
            observe(double, flux)

    wait_for(lambda: others[0] in double.history)
    (ours,) = (entry for name, entry in double.history.items() if name != others[0])
    assert ours["status"]["messages"][-1][0] == "execution_interrupted"
    assert double.history[others[0]]["status"]["status_str"] == "success"


def test_ctrl_c_takes_our_run_out_of_the_queue_and_leaves_the_one_that_runs(
    double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, waiting = threading.Event(), threading.Event()
    double.happen = lambda _: (waiting.set(), release.wait(10))
    other = queue(double, flux)
    assert waiting.wait(10)

    def stop(self: Server, run: str) -> Any:
        assert len(double.queue) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "_wait", stop)
    with pytest.raises(KeyboardInterrupt):
        observe(double, flux)
    assert double.queue == []
    assert "POST /interrupt" not in double.requests  # older servers would interrupt the other run
    release.set()
    wait_for(lambda: other in double.history)
    assert double.history[other]["status"]["status_str"] == "success"
    assert len(double.history) == 1


def test_ctrl_c_before_the_answer_still_finds_the_run(
    double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.happen = lambda _: time.sleep(0.2)
    ask = Server._ask

    def interrupted(self: Server, path: str, body: Any = None) -> Any:
        if path == "/prompt":
            threading.Timer(0.2, lambda: ask(self, path, body)).start()
            raise KeyboardInterrupt
        return ask(self, path, body)

    monkeypatch.setattr(Server, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        observe(double, flux)
    wait_for(lambda: double.history)
    (entry,) = double.history.values()
    assert entry["status"]["status_str"] == "error"


def test_cancelling_on_a_dead_server_is_no_error(double: Any) -> None:
    with Server(double.address, HASTY) as client:
        client._queued = True
        double.close()


# What the server sends


def saving(double: Any, monkeypatch: pytest.MonkeyPatch, *entries: Any) -> None:
    """What our Save node says of its files."""
    save = double.classes[workflow.SAVE]
    before = save.save
    monkeypatch.setattr(
        save, "save", lambda self, **given: {**before(self, **given), "ui": {"statistics": list(entries)}}
    )


def test_a_pack_of_another_version_is_told(double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    saving(double, monkeypatch)
    fails(double, flux, r"does not name the file it wrote .*the same version")


@pytest.mark.parametrize(
    ("content", "said", "error"),
    [
        (answer(), r"cannot use the file flux_00001_.safetensors that the server sent: ", StatisticsError),
        (answer(b"\x02\0\0\0\0\0\0\0{}"), r"that the server sent: not a statistics file", StatisticsError),
        (answer(b"<html>" * 100), "that the server sent: ", StatisticsError),
        (answer(status=404), r"HTTP error 404 for /view .*; statistics of 2 runs .*kept/", CalibrationError),
        (None, r"kept/flux_0000\d_.safetensors is larger than 1,000 bytes", CalibrationError),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_statistics_is_refused(
    double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch, content: Any, said: str, error: type[Exception]
) -> None:
    if content is None:
        monkeypatch.setattr(server, "MOST_FILE_BYTES", 1000)
    else:
        double.answer_with["/view"] = lambda _: content
    fails(double, flux, said, error)


def test_file_names_of_the_server_go_nowhere_but_back_to_it(
    double: Any, flux: Nodes, comfyui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"filename": "../../evil.safetensors", "subfolder": "/etc", "type": "output&type=x"}
    saving(double, monkeypatch, {**file, "recording": "../r", "samples": 1})
    asked = []

    def view(query: dict[str, str]) -> Any:
        asked.append(query)
        (path,) = (comfyui.root / "output").rglob("*.safetensors")
        return answer(path.read_bytes())

    double.answer_with["/view"] = view
    files = set(tmp_path.rglob("*"))
    assert observe(double, flux, seeds=1)[0]["flux"].samples == 1
    assert asked == [file]
    assert {path.name for path in set(tmp_path.rglob("*")) - files} == {"kept", "flux_00001_.safetensors"}


@pytest.mark.parametrize("messages", [None, [1, [], ["execution_error", None]], [["execution_error", {"node_id": 3}]]])
def test_a_history_of_nonsense_is_an_error_and_no_crash(double: Any, flux: Nodes, messages: Any) -> None:
    entry = {"status": {"status_str": "error", "messages": messages}}
    double.answer_with |= {
        "/prompt": lambda _: answer({"prompt_id": "x", "node_errors": {}}),
        "/history/x": lambda _: answer({"x": entry}),
        "/queue": lambda _: answer({"queue_running": [3, []], "queue_pending": None}),
    }
    fails(double, flux, "the run failed")


def test_letters_that_are_none_are_answers_like_others(
    double: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux["11"]["class_type"] = "half a letter \ud800"
    assert observe(double, flux, seeds=1)[0]["flux"].samples == 1
    file = {"filename": "\ud800", "subfolder": "", "type": "output", "recording": "r", "samples": 1}
    saving(double, monkeypatch, file)
    fails(double, flux, "HTTP error 404 for /view")


def test_names_of_classes_are_sent_as_they_are(double: Any) -> None:
    double.classes["A/B%2F (?#"] = double.classes["VAELoader"]
    ours = {"A/B%2F (?#", "KSampler (Efficient)", workflow.RECORD, workflow.SAVE}
    with Server(double.address) as client:
        assert set(client.types([*ours, "unknown"])) == ours


def test_a_class_that_cannot_say_what_it_takes_matters_only_where_it_is_needed(double: Any, flux: Nodes) -> None:
    double.answer_with["/object_info/SaveImage"] = lambda _: answer(status=500)
    assert observe(double, flux)[0]["flux"].samples == 2


# Addresses and runs


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8188", "ftp://host", "file:///etc/passwd", "http://", "http://host:99999", "http://host/?a=1",
     "http://host/a b", "http://ho\nst", "http://a..b:8188", "http://host/\u00fc"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(OptionError, match=r"is not a server address \(such as http://127.0.0.1:8188\)"):
        check_address(address)


def test_a_password_in_an_address_is_refused_and_not_said_again() -> None:
    with pytest.raises(
        OptionError, match=r"^user names in addresses are not supported \(such as http://127.0.0.1:8188\)$"
    ):
        check_address("http://user:secret@host")


@pytest.mark.parametrize("address", ["https://gpu.example:443/comfy/", "http://[::1]:8188", "http://r\u00fcbe.example"])
def test_addresses_are_taken_as_they_are(address: str) -> None:
    assert check_address(address) == address.rstrip("/")


def test_runs_need_something_to_vary(flux: Nodes, types: Any) -> None:
    fixed = copy.deepcopy(flux)
    fixed["9"]["inputs"].pop("seed")
    fixed["6"]["inputs"]["conditioning"] = ["30", 0]
    fixed["30"] = {"class_type": "ConditioningZeroOut", "inputs": {}}
    plan = workflow.plan(fixed, types)

    assert remote.plan_runs(plan, None, None, 42) == remote.plan_runs(plan, None, 1, 42) == [remote.Run(None, None)]
    with pytest.raises(OptionError, match=r"have no seed input .*--seeds 1"):
        remote.plan_runs(plan, None, 2, 42)
    with pytest.raises(OptionError, match="no text input before its sampler"):
        remote.plan_runs(plan, ["a"], None, 42)
    full = workflow.plan(flux, types)
    assert [run.seed for run in remote.plan_runs(full, ["a", "b"], 2, 7)] == [7, 8, 9, 10]
    assert len(remote.plan_runs(full, None, None, 7)) == remote.SEEDS
