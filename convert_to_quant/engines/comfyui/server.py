"""A running ComfyUI over HTTP: queue a workflow, follow it, fetch what it saved, take it back.

    GET  /system_stats           is it ComfyUI
    GET  /object_info/CLASS      what a class of nodes takes and gives
    POST /prompt                 queue a run
    WS   /ws?clientId=...        what it is doing
    GET  /history/ID, /queue     whether it is done, running or waiting
    GET  /view?filename=...      a file of its output folder
    POST /queue, /interrupt      take a run back

Progress comes through the websocket; that a run is done is asked of /history, when the websocket says so and every few
seconds besides. So nothing hangs on the socket: where it drops it is opened anew, where a proxy lets none through the
run is followed all the same. A run may take hours. What is not waited for is silence: a server from which nothing came
for `patience_seconds`, or that refuses connections, is given up.

Only the address that the user gave is contacted: no proxies of the environment, no redirects, neither over HTTP nor for
the websocket (which gets a socket that is connected already: it can neither look for a proxy nor go elsewhere).
What the server says is not trusted: names of files go back to it and nowhere else, texts are shown in one line.
"""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ...errors import CalibrationError, OptionError, OutputError
from .workflow import RECORD, SAVE, Nodes, NodeType, shown, title

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

PATIENCE_SECONDS = 120.0
"""Loading a model can keep ComfyUI's Python busy for so long that it answers nobody."""

REFUSED_SECONDS = 10.0
"""A port that refuses connections belongs to a server that ended."""

ASK_SECONDS = 3.0
"""How often a run is asked for while the websocket is silent."""

SOON_SECONDS = 0.05
"""And after the websocket said that it ended: ComfyUI enters it into the history a moment later."""

RECONNECT_SECONDS = 5.0
MOST_MESSAGE_BYTES = 1 << 26
MOST_JSON_BYTES = 1 << 28
MOST_FILE_BYTES = 1 << 31
_CHUNK_BYTES = 1 << 20
_MOST_ERRORS = 5
_CANCEL_SECONDS = 2.0

_ENDS = ("execution_success", "execution_error", "execution_interrupted")

Watch = Callable[[Mapping[str, float]], None]
"""Called with how far each node that works is, 0 to 1."""


class NoAnswerError(CalibrationError):
    """The server did not answer at all.

    Attributes:
        refused: it refused the connection: nothing listens there.
    """

    refused = False


class Server:
    """One ComfyUI.

    Args:
        address: its URL, as the user gave it.
        patience_seconds: how long it may be silent.

    Raises:
        OptionError: the address is none.
    """

    def __init__(self, address: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.address = check_address(address)
        self.client = uuid4().hex
        self._patience = patience_seconds
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
        self._socket: ClientConnection | None = None
        self._open = ExitStack()
        self._connect_at = 0.0
        self._sent = self._accepted = False  # whether a run of ours may be on the server, and whether it said so

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.cancel()
        finally:
            self._open.close()

    def types(self, classes: Iterable[str]) -> dict[str, NodeType]:
        """What classes of nodes take and give; those that the server does not have are left out.

        Raises:
            CalibrationError: nobody answers, somebody else does, or it does not have our nodes.
        """
        try:
            stats = self._ask("/system_stats")
        except _StatusError as error:
            if error.moved:
                raise
            stats = None
        if not (isinstance(stats, dict) and isinstance(stats.get("system"), dict)):
            raise self._error("something answers there, but it is not ComfyUI")
        found = {}
        for name in classes:
            info = self._ask(f"/object_info/{urllib.parse.quote(name, safe='')}")
            if isinstance(info, dict) and name in info:
                try:
                    found[name] = NodeType.read(info[name])
                except (AttributeError, KeyError, TypeError):
                    raise self._error(f"it describes nodes of type {shown(name)} in a way not known here") from None
        if RECORD not in found or SAVE not in found:
            raise self._error(
                "this ComfyUI does not have our nodes",
                hint="with its Python: pip install convert_to_quant; convert_to_quant comfyui install COMFYUI_DIR; "
                "then restart it",
            )
        return found

    def run(self, nodes: Nodes, watch: Watch) -> dict[str, Any]:
        """Queue a workflow, and wait until it is done.

        Args:
            nodes: in API format; all of its outputs must be valid.
            watch: sees progress.

        Returns:
            Node id -> what that node showed.

        Raises:
            CalibrationError: the workflow was refused or failed, or the server went away.
        """
        self._receive(0)  # opens the websocket before the run begins, so that nothing of it is missed
        self._sent, self._accepted = True, False
        answer = _object(self._ask("/prompt", body={"prompt": nodes, "client_id": self.client}, refusals=True))
        run = answer.get("prompt_id")
        self._sent = self._accepted = isinstance(run, str)
        if not isinstance(run, str) or answer.get("node_errors"):
            raise self._error(f"the workflow was refused: {_refusal(answer, nodes)}")
        entry = self._wait(run, watch)
        self._sent = False
        status = _object(entry.get("status"))
        if status.get("status_str", "success") != "success":
            raise self._error(_failure(_list(status.get("messages")), nodes))
        return _object(entry.get("outputs"))

    def cancel(self) -> None:
        """Take the run that was queued last off the server, if it is still there, and nobody else's."""
        if not self._sent:
            return
        self._sent = False
        deadline = time.monotonic() + (0 if self._accepted else _CANCEL_SECONDS)
        try:
            while not any(self._ours()) and time.monotonic() < deadline:  # its answer was not waited for
                time.sleep(SOON_SECONDS)
            if waiting := self._ours()[1]:
                self._ask("/queue", body={"delete": waiting})
            for run in self._ours()[0]:  # it may have begun in the meantime
                self._ask("/interrupt", body={"prompt_id": run})
        except CalibrationError:
            return  # the server is gone, and the run with it

    def fetch(self, file: Mapping[str, str], path: Path) -> None:
        """Copy a file out of the server's folders.

        Args:
            file: what `/view` takes: filename, subfolder, type.
            path: where to.

        Raises:
            CalibrationError: the server does not give it.
            OutputError: it cannot be written here.
        """
        name = shown("/".join(part for part in (file["subfolder"], file["filename"]) if part))
        count = 0
        with self._request("/view", file) as answer:
            try:
                with path.open("wb") as output:
                    while chunk := self._read(answer, _CHUNK_BYTES):
                        count += len(chunk)
                        if count > MOST_FILE_BYTES:
                            raise self._error(f"{name} is larger than statistics are")
                        output.write(chunk)
            except OSError as error:
                raise OutputError(f"cannot be written: {error.strerror}", path=path) from None

    def _wait(self, run: str, watch: Watch) -> dict[str, Any]:
        """Until a run is in the history; its entry."""
        progress: dict[str, float] = {}
        heard = time.monotonic()
        ask_at, pause = heard + ASK_SECONDS, ASK_SECONDS
        while True:
            message = self._receive(max(0.0, ask_at - time.monotonic()))
            if message is not None:
                heard = time.monotonic()
                kind, data = message
                if data.get("prompt_id") == run:
                    if kind in _ENDS or (kind == "executing" and data.get("node") is None):
                        ask_at, pause = heard, SOON_SECONDS
                    elif _note(progress, kind, data):
                        watch(progress)
            if time.monotonic() < ask_at:
                continue
            try:
                known = any(run in runs for runs in self._ours())
                entry = self._history(run)  # asked for last: a run is in the queue until it is in the history
                if entry:
                    return entry
                if not known:
                    raise self._error(
                        "the run is no longer in the server's queue", hint="was it restarted, or the queue cleared?"
                    )
                heard = time.monotonic()
            except NoAnswerError as error:
                silent = time.monotonic() - heard
                if silent > (min(REFUSED_SECONDS, self._patience) if error.refused else self._patience):
                    raise self._error(
                        f"the server stopped answering in the middle of a run, {silent:.0f} s ago ({error.problem})"
                    ) from None
            ask_at = time.monotonic() + pause

    def _history(self, run: str) -> dict[str, Any]:
        """A run's entry, once it is done; empty before."""
        return _object(_object(self._ask(f"/history/{urllib.parse.quote(run, safe='')}")).get(run))

    def _ours(self) -> tuple[list[str], list[str]]:
        """Runs of this client: those that run, and those that wait."""
        queue = _object(self._ask("/queue"))
        running, waiting = (
            [
                item[1]
                for item in map(_list, _list(queue.get(part)))  # number, id, workflow, further data, outputs
                if len(item) > 3 and _object(item[3]).get("client_id") == self.client
            ]
            for part in ("queue_running", "queue_pending")
        )
        return running, waiting

    def _receive(self, seconds: float) -> tuple[str, dict[str, Any]] | None:
        """The next message of the websocket, or None where none came in time. Bytes are previews: ("", {})."""
        from websockets.exceptions import WebSocketException

        if self._socket is None and time.monotonic() >= self._connect_at:
            self._connect()
        if self._socket is None:
            time.sleep(min(seconds, 0.5))
            return None
        try:
            message = self._socket.recv(timeout=seconds)
        except TimeoutError:
            return None
        except (OSError, WebSocketException):
            self._open.close()
            self._socket, self._connect_at = None, 0.0
            return None
        found = _object(_parsed(message) if isinstance(message, str) else None)
        return str(found.get("type", "")), _object(found.get("data"))

    def _connect(self) -> None:
        """Open the websocket, if it can be opened now."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        self._connect_at = time.monotonic() + RECONNECT_SECONDS
        parts = urllib.parse.urlsplit(self.address)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        url = f"{'wss' if secure else 'ws'}{self.address[len(parts.scheme) :]}/ws?clientId={self.client}"
        try:
            connected = socket.create_connection((parts.hostname or "", port), RECONNECT_SECONDS)
            connected.settimeout(None)
            opening = connect(
                url, sock=connected, open_timeout=RECONNECT_SECONDS, close_timeout=1, max_size=MOST_MESSAGE_BYTES
            )
            self._socket = self._open.enter_context(opening)
        except (OSError, WebSocketException, ValueError):  # ValueError: a redirect
            return

    def _ask(self, path: str, *, body: Any = None, refusals: bool = False) -> Any:
        """GET, or POST JSON.

        Args:
            path: with a leading slash.
            body: of a POST.
            refusals: whether JSON that comes with an HTTP error is an answer, too.

        Returns:
            The answer's JSON; None where it is empty or something else.

        Raises:
            NoAnswerError: none came.
            CalibrationError: an HTTP error.
        """
        try:
            with self._request(path, body=body) as answer:
                return _parsed(self._read(answer, MOST_JSON_BYTES))
        except _StatusError as error:
            told = _parsed(error.body) if refusals else None
            if told is None:
                raise
            return told

    def _request(self, path: str, query: Mapping[str, str] | None = None, body: Any = None) -> HTTPResponse:
        """An open answer."""
        url = self.address + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        head = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, head)  # noqa: S310  http or https: see check_address
        try:
            answer: HTTPResponse = self._opener.open(request, timeout=self._patience)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status(
                    error.code, path, error.headers.get("Location"), self._read(error, 1 << 20)
                ) from None
        except urllib.error.URLError as error:
            raise self._no_answer(error.reason) from None
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from None
        return answer

    def _read(self, answer: Any, most_bytes: int) -> bytes:
        """The next bytes of an answer."""
        try:
            content: bytes = answer.read(most_bytes)
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from None
        return content

    def _status(self, code: int, path: str, location: str | None, body: bytes) -> _StatusError:
        if location is not None:
            problem = f"answers with a redirect to {shown(location)}, which is not followed"
            error = _StatusError(problem, path=self.address, hint="give the address that ComfyUI itself has")
        else:
            error = _StatusError(
                f"HTTP error {code} for {path}", path=self.address, hint="is it the address of ComfyUI?"
            )
        error.body, error.moved = body, location is not None
        return error

    def _no_answer(self, reason: object) -> NoAnswerError:
        said = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason) or repr(reason)
        error = NoAnswerError(f"no answer: {shown(said)}", path=self.address, hint="is ComfyUI running there?")
        error.refused = isinstance(reason, ConnectionRefusedError)
        return error

    def _error(self, problem: str, hint: str | None = None) -> CalibrationError:
        return CalibrationError(problem, path=self.address, hint=hint)


class _StatusError(CalibrationError):
    """An HTTP error.

    Attributes:
        body: what came with it.
        moved: it is a redirect.
    """

    body = b""
    moved = False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to be errors."""

    def redirect_request(self, *_args: Any) -> None:
        """None of them."""


def check_address(address: str) -> str:
    """A server's URL, without a slash at its end.

    Raises:
        OptionError: it is something else.

    >>> check_address("http://127.0.0.1:8188/")
    'http://127.0.0.1:8188'
    """
    hint = "such as http://127.0.0.1:8188"
    if "@" in address:  # what is secret is not said again
        raise OptionError("an address with a user's name is not supported", hint=hint)
    try:
        parts = urllib.parse.urlsplit(address)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment or not address.isprintable() or " " in address:
        raise OptionError(f"{shown(address)} is no address of a server", hint=hint)
    return address.rstrip("/")


def _parsed(text: str | bytes) -> Any:
    """JSON, or None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one where it is something else."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    """A JSON array; an empty one where it is something else."""
    return value if isinstance(value, list) else []


def _note(progress: dict[str, float], kind: str, data: Mapping[str, Any]) -> bool:
    """Note how far nodes are, as new (`progress_state`) and old servers (`progress`) say it."""
    if kind == "progress_state":
        states = _object(data.get("nodes"))
    elif kind == "progress":
        states = {str(data.get("node")): data}
    else:
        return False
    for name, state in states.items():
        value, most = (_object(state).get(key) for key in ("value", "max"))
        if isinstance(value, (int, float)) and isinstance(most, (int, float)) and most > 0:
            progress[name] = min(1.0, max(0.0, value / most))
    return True


def _refusal(answer: Mapping[str, Any], nodes: Nodes) -> str:
    """What a server says of a workflow that it does not run: node, input and reason."""
    told = []
    for name, found in _object(answer.get("node_errors")).items():
        for error in map(_object, _list(_object(found).get("errors"))):
            what = [shown(error[key]) for key in ("message", "details") if error.get(key)]
            told.append(": ".join([_title(nodes, name), *what]))
    general = _object(answer.get("error"))
    if not told:
        told = [": ".join(shown(general[key]) for key in ("message", "details") if general.get(key))]
    more = f"; and {len(told) - _MOST_ERRORS} more" if len(told) > _MOST_ERRORS else ""
    return ("; ".join(told[:_MOST_ERRORS]) or "it does not say why") + more


def _failure(messages: list[Any], nodes: Nodes) -> str:
    """Why a run failed."""
    for kind, said in (message for message in messages if len(_list(message)) == 2):
        data = _object(said)
        where = f"{_title(nodes, str(data.get('node_id')))} of type {shown(data.get('node_type'))}"
        if kind == "execution_error":
            what = shown(data.get("exception_message")) or "no message"
            return f"the run failed in {where}: {shown(data.get('exception_type'))}: {what}"
        if kind == "execution_interrupted":
            return f"the run was cancelled on the server, in {where}"
    return "the run failed; the server does not say why"


def _title(nodes: Nodes, name: str) -> str:
    return title(nodes, name) if name in nodes else shown(f"node {name}")


def saved_file(outputs: Mapping[str, Any], save: str) -> dict[str, Any] | None:
    """What a Save node says that it wrote: filename, subfolder, type, recording, samples; None where it does not.

    Args:
        outputs: of a run.
        save: the node's id.
    """
    entries = _list(_object(outputs.get(save)).get("statistics"))
    entry = _object(entries[0] if entries else None)
    kinds = {"filename": str, "subfolder": str, "type": str, "recording": str, "samples": int}
    return entry if all(isinstance(entry.get(key), kind) for key, kind in kinds.items()) else None
