"""The client and its sessions against a double of ComfyUI's server: what is recorded, told, and left behind."""

from __future__ import annotations

import asyncio
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
from aiohttp import web

from convert_to_quant.comfyui_nodes.recording import Recorder
from convert_to_quant.engines.comfyui import remote, server, workflow
from convert_to_quant.engines.comfyui.server import Server, check_address
from convert_to_quant.errors import CalibrationError, OptionError, StatisticsError
from convert_to_quant.stats import COLUMNS, Statistics

Nodes = dict[str, Any]
PATIENT, HASTY = 20.0, 0.4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask as often as tests need."""
    monkeypatch.setattr(server, "LATER_SECONDS", 0.05)
    monkeypatch.setattr(server, "ARRIVAL_SECONDS", 0.5)


def observe(
    double: Any, nodes: Nodes, prompts: list[str] | None = None, seeds: int = 2, *,
    progress: Callable[[int, int], None] = lambda *_: None, patience: float = PATIENT,
) -> tuple[dict[str, Statistics], int]:  # fmt: skip
    """As the command does."""
    with Server(double.address, patience) as client:
        plan = workflow.plan(nodes, client.types(workflow.classes(nodes)))
        return remote.observe(client, plan, remote.plan_runs(plan, prompts, seeds, 42), "kept", progress)


def directly(comfyui: Any, seeds: list[int], steps: int = 3) -> Statistics:
    """What the double's model receives, without any server."""
    recorder = Recorder()
    model = recorder.attach(comfyui.model())
    for seed in seeds:
        noise = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
        comfyui.guider(model).sample(noise, tuple(1 - step / steps for step in range(steps)))
    return recorder.statistics()


def assert_same(one: Statistics, other: Statistics) -> None:
    assert (one.layers, one.samples) == (other.layers, other.samples)
    for column in COLUMNS:
        assert (getattr(one, column) == getattr(other, column)).all(), column


def queue(double: Any, nodes: Nodes, client: str = "somebody else") -> str:
    """Queue a run as another client."""
    body = json.dumps({"prompt": nodes, "client_id": client}).encode()
    request = urllib.request.Request(f"{double.address}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["prompt_id"])


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


# What is recorded


def test_every_prompt_is_run_with_seeds_of_its_own_and_totals_add_up(serve: Any, flux: Nodes, comfyui: Any) -> None:
    double = serve()
    found, idle = observe(double, flux, ["a dog", "a cat"], 2)

    assert_same(found["flux"], directly(comfyui, [42, 43, 44, 45]))
    assert idle == 0
    asked = [(prompt["5"]["inputs"]["text"], prompt["9"]["inputs"]["seed"]) for prompt in double.prompts]
    assert asked == [("a dog", 42), ("a dog", 43), ("a cat", 44), ("a cat", 45)]
    facts = found["flux"].provenance
    assert (facts["engine"], facts["runs"], facts["prompts"], facts["seed"]) == (("comfyui",), ("4",), ("2",), ("42",))
    files = [
        path.relative_to(comfyui.root / "output") for path in (comfyui.root / "output").rglob("*") if path.is_file()
    ]
    assert files == [Path("kept/flux_00001_.safetensors")]
    assert double.requests.count("GET /view") == 1


def test_a_session_does_not_go_on_from_another_one(serve: Any, flux: Nodes, comfyui: Any) -> None:
    double = serve()
    observe(double, flux)
    found, idle = observe(double, flux)
    assert_same(found["flux"], directly(comfyui, [42, 43]))
    assert idle == 0


@pytest.mark.parametrize("cache", ["ram", "classic", "none"])
def test_totals_are_whole_whatever_the_server_forgets(serve: Any, flux: Nodes, comfyui: Any, cache: str) -> None:
    double = serve(cache=cache)
    other = {"1": flux["1"], "2": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
             "3": {"class_type": "VAEDecode", "inputs": {"samples": ["8", 0], "vae": ["4", 0]}},
             "4": flux["3"], "8": flux["8"]}  # fmt: skip
    done: set[int] = set()

    def between(now: int, total: int) -> None:
        number = now * 3 // total
        if number not in done:
            done.add(number)
            queue(double, other)

    found, _ = observe(double, flux, seeds=3, progress=between)
    assert len(double.prompts) == 6 + (3 in done)
    assert_same(found["flux"], directly(comfyui, [42, 43, 44]))


def test_two_models_are_recorded_apart(serve: Any, wan: Nodes, comfyui: Any) -> None:
    double = serve()
    found, _ = observe(double, wan)
    assert list(found) == ["wan_high", "wan_low"]
    for statistics in found.values():
        assert_same(statistics, directly(comfyui, [42, 43], steps=4))
    seen = [("folder/wan_high.safetensors", 42), ("wan_low.safetensors", 42)]
    assert double.nodes.sampled == [*seen, *((name, 43) for name, _ in seen)]


def test_one_model_on_two_ways_is_one_file(serve: Any, flux: Nodes, comfyui: Any) -> None:
    again = copy.deepcopy(flux["9"])
    again["inputs"] |= {"model": ["1", 0], "latent_image": ["9", 0]}
    found, _ = observe(serve(), {**flux, "12": again})
    assert_same(found["flux"], directly(comfyui, [42, 42, 43, 43]))


def test_two_independent_samplers_count_once_each(serve: Any, flux: Nodes, comfyui: Any) -> None:
    again = copy.deepcopy(flux["9"])
    again["inputs"]["steps"] = 3
    again["inputs"]["cfg"] = 2.0
    found, _ = observe(serve(), {**flux, "12": again})
    assert_same(found["flux"], directly(comfyui, [42, 42, 43, 43]))


def test_runs_that_the_server_answers_from_memory_are_counted(serve: Any, flux: Nodes, comfyui: Any) -> None:
    double = serve()
    with Server(double.address) as client:
        plan = workflow.plan(flux, client.types(workflow.classes(flux)))
        runs = [remote.Run("a", 1), remote.Run("a", 1)]
        found, idle = remote.observe(client, plan, runs, "kept", lambda *_: None)
    assert idle == 1
    assert_same(found["flux"], directly(comfyui, [1]))


def test_an_address_may_have_a_path(serve: Any, flux: Nodes) -> None:
    double = serve(prefix="/proxy/comfy")
    assert observe(double, flux)[0]["flux"].samples == 2
    assert all(not asked.partition(" ")[2].startswith("/proxy") for asked in double.requests)


# Progress


def test_progress_counts_the_runs(serve: Any, flux: Nodes) -> None:
    seen: list[tuple[int, int]] = []
    observe(serve(), flux, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_run_is_asked_for_less_and_less_often(serve: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LATER_SECONDS", 3.0)
    double = serve()
    double.nodes.happen = lambda _: time.sleep(0.5)  # three steps of it
    start = time.monotonic()
    observe(double, flux, seeds=1)
    assert time.monotonic() - start < 2.5, "a tenth of the run is waited too long at most"
    assert double.requests.count("GET /queue") < 25


# What goes wrong


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_nobody_there() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with (
        Server(address) as client,
        pytest.raises(CalibrationError, match=f"^{address}: no answer: .*is ComfyUI running"),
    ):
        client.types([])


@pytest.mark.parametrize(
    "answer",
    [lambda _: web.Response(status=404), lambda _: web.json_response([1]), lambda _: web.Response(text="hello")],
)
def test_something_else_there(serve: Any, answer: Any) -> None:
    double = serve()
    double.answer_with["/system_stats"] = answer
    with (
        Server(double.address) as client,
        pytest.raises(CalibrationError, match="answers there, but it is not ComfyUI"),
    ):
        client.types([])


def test_something_that_speaks_no_http() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\x1b[2J\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Server(address) as client, pytest.raises(CalibrationError, match=r"no answer: .*SSH-2.0-x\\x1b"):
            client.types([])
        thread.join()


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        start = time.monotonic()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Server(address, HASTY) as client, pytest.raises(CalibrationError, match="no answer: timed out"):
            client.types([])
        assert HASTY <= time.monotonic() - start < HASTY + 2


def test_a_server_without_our_nodes_is_told_how_to_get_them(serve: Any, flux: Nodes) -> None:
    double = serve()
    del double.nodes.classes[workflow.SAVE]
    with pytest.raises(CalibrationError, match=r"does not have our nodes .*comfyui install COMFYUI_DIR`, and restart"):
        observe(double, flux)


def test_redirects_are_not_followed(serve: Any) -> None:
    double, elsewhere = serve(), serve()
    double.answer_with["/system_stats"] = lambda _: web.Response(
        status=302, headers={"Location": f"{elsewhere.address}/system_stats"}
    )
    said = f"redirect to {elsewhere.address}/system_stats, which is not followed"
    with Server(double.address) as client, pytest.raises(CalibrationError, match=said):
        client.types([])
    assert elsewhere.requests == []


def test_proxies_of_the_environment_are_not_asked(serve: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    double = serve()
    assert observe(double, flux)[0]["flux"].samples == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"1": {"unet_name": "gone.safetensors"}},
         r"the workflow was refused: node 1 \(Load Diffusion Model\): Value not in list: unet_name: 'gone"),
        ({"9": {"seed": 2**70, "steps": 10**9}},
         r"refused: node 9 \(Paint\): Value 1000000000 bigger than max of 10000: steps"),
        ({"6": {"conditioning": ["1", 0]}},
         r"refused: node 6 \(FluxGuidance\): Return type mismatch between linked nodes: conditioning, received_type"),
    ],
)  # fmt: skip
def test_a_refused_workflow_is_told_by_node_and_input(serve: Any, flux: Nodes, change: Any, said: str) -> None:
    double = serve()
    for name, inputs in change.items():
        flux[name]["inputs"] |= inputs
    with pytest.raises(CalibrationError, match=said):
        observe(double, flux)
    assert double.queue == double.running == []


def test_a_refusal_without_nodes_is_told(serve: Any, flux: Nodes) -> None:
    double = serve()
    error = {"type": "x", "message": "no\n\x1b[31mway", "details": "", "extra_info": {}}
    double.answer_with["/prompt"] = lambda _: web.json_response({"error": error, "node_errors": []}, status=400)
    with pytest.raises(CalibrationError, match=r"the workflow was refused: no \\x1b\[31mway$"):
        observe(double, flux)
    double.answer_with["/prompt"] = lambda _: web.Response(text="<html>", status=502)
    with pytest.raises(CalibrationError, match="HTTP error 502 for /prompt"):
        observe(double, flux)


def test_a_failed_run_is_told_by_node_and_exception(serve: Any, flux: Nodes) -> None:
    double = serve()
    double.nodes.failure = MemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
    said = r"failed in node 9 \(Paint\) of type KSampler: MemoryError: CUDA out of memory. Tried to allocate 3 GiB$"
    with pytest.raises(CalibrationError, match=said):
        observe(double, flux)


def test_what_was_recorded_before_a_failure_is_told(serve: Any, flux: Nodes, comfyui: Any) -> None:
    double = serve()

    def happen(step: int) -> None:
        if len(double.nodes.sampled) == 3:
            raise RuntimeError("enough")

    double.nodes.happen = happen
    with pytest.raises(
        CalibrationError, match=r"enough \(2 runs before it are recorded .*: kept/flux_00001_.safetensors\)"
    ):
        observe(double, flux, seeds=4)
    assert Statistics.load(comfyui.root / "output" / "kept" / "flux_00001_.safetensors").samples == 2


def test_a_run_that_somebody_cancels_is_told(serve: Any, flux: Nodes) -> None:
    double = serve()

    def happen(step: int) -> None:
        double.interrupted = True

    double.nodes.happen = happen
    with pytest.raises(CalibrationError, match=r"the run was cancelled on the server, in node 9 \(Paint\)"):
        observe(double, flux)


def test_a_server_that_dies_midway_is_told(serve: Any, flux: Nodes) -> None:
    double = serve()
    died: list[threading.Thread] = []

    def happen(step: int) -> None:
        if step == 1:
            died.append(threading.Thread(target=double.close))
            died[0].start()
            wait_for(lambda: double.interrupted)

    double.nodes.happen = happen
    with pytest.raises(CalibrationError, match=r"the server stopped answering in the middle of a run, .* s ago"):
        observe(double, flux, patience=HASTY)
    died[0].join()


def test_a_server_that_hangs_midway_is_given_up(serve: Any, flux: Nodes) -> None:
    double = serve()
    release = threading.Event()

    async def hang(_: web.Request) -> Any:
        await asyncio.sleep(3)
        return web.Response(status=503)

    def happen(step: int) -> None:
        double.answer_with |= dict.fromkeys(("/queue", f"/history/{double.running[0][1]}"), hang)
        release.wait(10)

    double.nodes.happen = happen
    try:
        with pytest.raises(CalibrationError, match=r"stopped answering in the middle of a run, .*timed out"):
            observe(double, flux, patience=HASTY)
    finally:
        release.set()


def test_a_run_that_takes_long_is_waited_for(serve: Any, flux: Nodes) -> None:
    double = serve()
    double.nodes.happen = lambda _: time.sleep(HASTY)
    assert observe(double, flux, seeds=1, patience=HASTY)[0]["flux"].samples == 1


def test_silence_is_counted_from_the_last_answer(serve: Any, flux: Nodes) -> None:
    double, patience, start = serve(), 1.0, time.monotonic()

    async def gateway(_: web.Request) -> Any:
        if 1.2 <= time.monotonic() - start < 1.4:
            return web.Response(status=502)
        item = double.running[0][:4]
        return web.json_response({"queue_running": [item], "queue_pending": []})

    def happen(step: int) -> None:
        if step == 0:
            double.answer_with["/queue"] = gateway
        time.sleep(0.1)
        if step == 15:
            del double.answer_with["/queue"]

    double.nodes.happen = happen
    flux["9"]["inputs"]["steps"] = 16
    assert observe(double, flux, seeds=1, patience=patience)[0]["flux"].samples == 1


def test_a_restarted_server_has_forgotten_the_run(serve: Any, flux: Nodes) -> None:
    double = serve()
    release = threading.Event()

    def happen(step: int) -> None:
        double.answer_with["/queue"] = lambda _: web.json_response({"queue_running": [], "queue_pending": []})
        release.wait(10)

    double.nodes.happen = happen
    try:
        with pytest.raises(CalibrationError, match=r"no longer in the server's queue \(was it restarted"):
            observe(double, flux)
    finally:
        release.set()


# Taking a run back


def stop(_run: str) -> Any:
    raise KeyboardInterrupt


def test_ctrl_c_cancels_our_run_while_it_runs(serve: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    double, sleep = serve(), time.sleep
    others: list[str] = []

    def pause(_seconds: float) -> None:
        if double.running and not others:
            others.append(queue(double, flux))
            raise KeyboardInterrupt

    double.nodes.happen = lambda _: sleep(0.1 if double.client != "somebody else" else 0)
    with monkeypatch.context() as patch:
        patch.setattr(server.time, "sleep", pause)
        with pytest.raises(KeyboardInterrupt):
            observe(double, flux)

    wait_for(lambda: others[0] in double.history)
    (ours,) = (entry for name, entry in double.history.items() if name != others[0])
    assert [kind for kind, _ in ours["status"]["messages"]][-1] == "execution_interrupted"
    assert double.history[others[0]]["status"]["status_str"] == "success"


def test_ctrl_c_takes_our_run_out_of_the_queue_and_leaves_the_one_that_runs(serve: Any, flux: Nodes) -> None:
    double = serve()
    release, waiting = threading.Event(), threading.Event()
    double.nodes.happen = lambda _: (waiting.set(), release.wait(10))
    other = queue(double, flux)
    assert waiting.wait(10)

    with Server(double.address) as client:
        plan = workflow.plan(flux, client.types(workflow.classes(flux)))
        client._wait = stop  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            client.run(plan.queued("s", "f"))
        assert len(double.queue) == 1
        client.cancel()
        assert double.queue == []
    release.set()
    wait_for(lambda: other in double.history)
    assert double.history[other]["status"]["status_str"] == "success"
    assert len(double.history) == 1
    assert "POST /interrupt" not in double.requests


def test_ctrl_c_before_the_answer_still_finds_the_run(serve: Any, flux: Nodes) -> None:
    double = serve()
    release = threading.Event()
    double.nodes.happen = lambda _: release.wait(0.2) and None

    with Server(double.address) as client:
        plan = workflow.plan(flux, client.types(workflow.classes(flux)))
        ask = client._ask

        def interrupted(path: str, body: Any = None) -> Any:
            if path == "/prompt":
                threading.Timer(0.2, lambda: ask(path, body)).start()
                raise KeyboardInterrupt
            return ask(path, body)

        client._ask = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            client.run(plan.queued("s", "f"))
        client.cancel()
    wait_for(lambda: double.history)
    (entry,) = double.history.values()
    assert entry["status"]["status_str"] == "error"


def test_nothing_is_cancelled_where_nothing_is_ours(serve: Any, flux: Nodes) -> None:
    double = serve()
    observe(double, flux)
    assert not {"POST /queue", "POST /interrupt"} & set(double.requests)


def test_cancelling_on_a_dead_server_is_no_error(serve: Any, flux: Nodes) -> None:
    double = serve()
    with Server(double.address, HASTY) as client:
        client._sent = True
        double.close()


# What the server sends


def test_a_pack_of_another_version_is_told(serve: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    double = serve()
    save = double.nodes.classes[workflow.SAVE]
    before = save.save
    monkeypatch.setattr(save, "save", lambda self, **given: {**before(self, **given), "ui": {"text": ["saved"]}})
    with pytest.raises(CalibrationError, match=r"does not say which file it wrote .*another version"):
        observe(double, flux)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"what the server sent as flux_00001_.safetensors cannot be used: "),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", r"cannot be used: not a statistics file"),
        (b"<html>" * 100, "cannot be used: "),
    ],
)
def test_a_file_that_holds_no_statistics_is_refused(serve: Any, flux: Nodes, content: bytes, said: str) -> None:
    double = serve()
    double.answer_with["/view"] = lambda _: web.Response(body=content)
    with pytest.raises(StatisticsError, match=said):
        observe(double, flux)


def test_a_missing_file_and_an_endless_one_are_refused(
    serve: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = serve()
    double.answer_with["/view"] = lambda _: web.Response(status=404)
    with pytest.raises(
        CalibrationError, match=r"HTTP error 404 for /view .*; 2 runs before it are recorded in .*kept/"
    ):
        observe(double, flux)
    monkeypatch.setattr(server, "MOST_FILE_BYTES", 1000)
    del double.answer_with["/view"]
    with pytest.raises(CalibrationError, match=r"kept/flux_0000\d_.safetensors is larger than statistics are"):
        observe(double, flux)


def test_file_names_of_the_server_go_nowhere_but_back_to_it(
    serve: Any, flux: Nodes, comfyui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = serve()
    save = double.nodes.classes[workflow.SAVE]
    before = save.save
    evil = {
        "filename": "../../evil.safetensors",
        "subfolder": "/etc",
        "type": "output&type=x",
        "recording": "../r",
        "samples": 1,
    }
    monkeypatch.setattr(save, "save", lambda self, **given: {**before(self, **given), "ui": {"statistics": [evil]}})
    asked = []

    def view(request: web.Request) -> Any:
        asked.append(dict(request.rel_url.query))
        (path,) = (comfyui.root / "output").rglob("*.safetensors")
        return web.FileResponse(path)

    double.answer_with["/view"] = view
    files = set(tmp_path.rglob("*"))
    assert observe(double, flux, seeds=1)[0]["flux"].samples == 1
    assert asked == [{key: evil[key] for key in ("filename", "subfolder", "type")}]
    assert {path.name for path in set(tmp_path.rglob("*")) - files} == {"kept", "flux_00001_.safetensors"}


@pytest.mark.parametrize("answer", [None, [], {"x": 1}, {"prompt_id": 3}, {"prompt_id": "x", "node_errors": [1]}])
def test_nonsense_from_a_server_is_an_error_and_no_crash(serve: Any, flux: Nodes, answer: Any) -> None:
    double = serve()
    double.answer_with["/prompt"] = lambda _: web.json_response(answer)
    with pytest.raises(CalibrationError, match="the workflow was refused: it does not say why"):
        observe(double, flux)


@pytest.mark.parametrize("messages", [None, [1, [], ["execution_error", None]], [["execution_error", {"node_id": 3}]]])
def test_a_history_of_nonsense_is_an_error_and_no_crash(serve: Any, flux: Nodes, messages: Any) -> None:
    double = serve()
    double.answer_with["/prompt"] = lambda _: web.json_response({"prompt_id": "x", "node_errors": {}})
    double.answer_with["/history/x"] = lambda _: web.json_response(
        {"x": {"status": {"status_str": "error", "messages": messages}}}
    )
    double.answer_with["/queue"] = lambda _: web.json_response({"queue_running": [3, []], "queue_pending": None})
    with pytest.raises(CalibrationError, match="the run failed"):
        observe(double, flux)


def test_letters_that_are_none_are_answers_like_others(
    serve: Any, flux: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = serve()
    flux["11"]["class_type"] = "half a letter \ud800"
    assert observe(double, flux, seeds=1)[0]["flux"].samples == 1

    save = double.nodes.classes[workflow.SAVE]
    before = save.save
    entry = {"filename": "\ud800", "subfolder": "", "type": "output", "recording": "r", "samples": 1}
    monkeypatch.setattr(save, "save", lambda self, **given: {**before(self, **given), "ui": {"statistics": [entry]}})
    with pytest.raises(CalibrationError, match="HTTP error 404 for /view"):
        observe(double, flux)

    double.answer_with["/prompt"] = lambda _: web.json_response({"prompt_id": "\ud800", "node_errors": {}})
    with pytest.raises(CalibrationError, match="no longer in the server's queue"):
        observe(double, flux)


def test_names_of_classes_are_sent_as_they_are(serve: Any) -> None:
    double = serve()
    double.nodes.classes["A/B%2F (?#"] = double.nodes.classes["VAELoader"]
    with Server(double.address) as client:
        found = client.types(["A/B%2F (?#", "KSampler (Efficient)", "unknown", workflow.RECORD, workflow.SAVE])
    assert set(found) == {"A/B%2F (?#", "KSampler (Efficient)", workflow.RECORD, workflow.SAVE}


def test_a_class_that_cannot_say_what_it_takes_matters_only_where_it_is_needed(serve: Any, flux: Nodes) -> None:
    double = serve()
    double.answer_with["/object_info/SaveImage"] = lambda _: web.Response(status=500)
    assert observe(double, flux)[0]["flux"].samples == 2


def test_a_proxy_that_cannot_reach_the_server_for_a_moment_is_no_end(serve: Any, flux: Nodes) -> None:
    double = serve()
    asked = []

    def gateway(_: web.Request) -> Any:
        asked.append(1)
        if len(asked) == 3:
            del double.answer_with["/queue"]
        return web.Response(status=502)

    double.answer_with["/queue"] = gateway
    assert observe(double, flux)[0]["flux"].samples == 2
    assert len(asked) == 3


def test_a_server_that_describes_nodes_otherwise_is_told(serve: Any, flux: Nodes) -> None:
    double = serve()
    double.answer_with["/object_info/KSampler"] = lambda _: web.json_response({"KSampler": {"input": 3}})
    with pytest.raises(CalibrationError, match="describes nodes of type KSampler in a way not known here"):
        observe(double, flux)


# Addresses and runs


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8188", "is not a server address"),
        ("ftp://host", "is not a server address"),
        ("file:///etc/passwd", "is not a server address"),
        ("http://", "is not a server address"),
        ("http://host:99999", "is not a server address"),
        ("http://user:secret@host", "^user names in addresses are not supported"),
        ("http://host/?a=1", "is not a server address"),
        ("http://host/a b", "is not a server address"),
        ("http://ho\nst", "is not a server address"),
        ("http://a..b:8188", "is not a server address"),
        ("http://host/\u00fc", "is not a server address"),
    ],
)
def test_what_is_no_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(OptionError, match=rf"{said} \(such as http://127.0.0.1:8188\)"):
        check_address(address)


def test_addresses_are_taken_as_they_are() -> None:
    assert check_address("https://gpu.example:443/comfy/") == "https://gpu.example:443/comfy"
    assert check_address("http://[::1]:8188") == "http://[::1]:8188"
    assert check_address("http://r\u00fcbe.example") == "http://r\u00fcbe.example"


def test_of_each_recorder_the_file_with_the_most_samples_counts() -> None:
    files: remote.Files = {}
    for recording, filename, samples in (("r", "1", 2), ("r", "2", 3), ("r", "1", 2), ("s", "2", 1)):
        remote.note(files, {"recording": recording, "filename": filename, "samples": samples})
    assert [(file["filename"], file["samples"]) for file in files.values()] == [("2", 3), ("2", 1)]


def test_runs_need_something_to_vary(flux: Nodes, types: Any) -> None:
    fixed = copy.deepcopy(flux)
    fixed["9"]["inputs"].pop("seed")
    fixed["6"]["inputs"]["conditioning"] = ["30", 0]
    fixed["30"] = {"class_type": "ConditioningZeroOut", "inputs": {}}
    plan = workflow.plan(fixed, types)

    assert remote.plan_runs(plan, None, None, 42) == [remote.Run(None, None)]
    assert remote.plan_runs(plan, None, 1, 42) == [remote.Run(None, None)]
    with pytest.raises(OptionError, match=r"no seed that could be varied .*--seeds 1"):
        remote.plan_runs(plan, None, 2, 42)
    with pytest.raises(OptionError, match="no text input on the way to its sampler"):
        remote.plan_runs(plan, ["a"], None, 42)
    full = workflow.plan(flux, types)
    assert [run.seed for run in remote.plan_runs(full, ["a", "b"], 2, 7)] == [7, 8, 9, 10]
    assert len(remote.plan_runs(full, None, None, 7)) == remote.SEEDS
