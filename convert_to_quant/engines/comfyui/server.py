"""A running ComfyUI over HTTP: queue a workflow, follow it, fetch what it saved, take it back.

    GET  /system_stats           is it ComfyUI
    GET  /object_info/CLASS      what a class of nodes takes and gives
    POST /prompt                 queue a run
    GET  /history/ID, /queue     whether it is done, running or waiting
    GET  /view?filename=...      a file of its output folder
    POST /queue, /interrupt      take a run back

A run is done when it is in /history, which is asked again and again. How far a run is, ComfyUI says over a websocket
only, so progress counts whole runs. A run may take hours. What is not waited for is silence: a server from which
nothing came for `patience_seconds`, or that refuses connections, is given up.

What the server says is not trusted: names of files go back to it and nowhere else, texts are shown in one line.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from uuid import uuid4

from ...errors import CalibrationError, OptionError, OutputError
from ...untrusted import JSONError, parse_json
from .workflow import RECORD, SAVE, Nodes, NodeType, shown, title

PATIENCE_SECONDS = 120.0
"""Loading a model can keep ComfyUI's Python busy for so long that it answers nobody."""

REFUSED_SECONDS = 10.0
"""A port that refuses connections belongs to a server that ended."""

SOON_SECONDS, LATER_SECONDS = 0.05, 3.0
"""Pauses between two questions whether a run is done: a tenth of what it has taken so far, within these."""

ARRIVAL_SECONDS = 2.0
"""How long a run whose answer was not waited for is looked for, to take it back."""

CANCEL_SECONDS = 10.0
"""How long a server may be silent that a run is taken back from."""

GATEWAY_ERRORS = frozenset({502, 503, 504})
"""What a proxy in front of a server says for it while it is silent."""

REFUSED = 400
"""With this HTTP error come the reasons why a workflow is not run."""

MOST_JSON_BYTES = 1 << 25
MOST_FILE_BYTES = 1 << 31
_CHUNK_BYTES = 1 << 20
_MOST_ERRORS = 5

LEAST_BYTES_PER_SECOND = 1 << 10
"""A server that sends less, for longer than it may be silent, is given up."""


class NoAnswerError(CalibrationError):
    """The server did not answer at all.

    Attributes:
        refused: it refused the connection: nothing listens there.
    """

    refused = False


class StatusError(CalibrationError):
    """An HTTP error."""


class Server:
    """One ComfyUI.

    Args:
        address: its URL, as the user gave it; see `check_address`.
        patience_seconds: how long an answer may take to begin or to go on.

    Raises:
        OptionError: the address is none.
    """

    def __init__(self, address: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.address, self.patience_seconds = check_address(address), patience_seconds
        self.client = uuid4().hex
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
        self._sent = self._accepted = False  # whether a run of ours may be on the server, and whether it said so

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def types(self, classes: Iterable[str]) -> dict[str, NodeType]:
        """What classes of nodes take and give; those that the server does not have are left out.

        Raises:
            CalibrationError: nobody answers, somebody else does, or it does not have our nodes.
        """
        problem = "something answers there, but it is not ComfyUI"
        try:
            stats = self._ask("/system_stats")
        except StatusError as error:
            raise self._error(f"{problem}: {error.problem}") from None
        if "system" not in as_object(stats):
            raise self._error(problem)
        found = {name: kind for name in classes if (kind := self._type(name)) is not None}
        if RECORD not in found or SAVE not in found:
            hint = "install this package for its Python, run `convert_to_quant comfyui install COMFYUI_DIR`, and "
            raise self._error("this ComfyUI does not have our nodes", f"{hint}restart it")
        return found

    def _type(self, name: str) -> NodeType | None:
        """One class of nodes."""
        try:
            info = as_object(self._ask(f"/object_info/{quoted(name)}")).get(name)
        except StatusError:  # a class that cannot say what it takes
            return None
        try:
            return None if info is None else NodeType.read(info)
        except (AttributeError, KeyError, TypeError):
            raise self._error(f"it describes nodes of type {shown(name)} in a way not known here") from None

    def run(self, nodes: Nodes) -> dict[str, Any]:
        """Queue a workflow, and wait until it is done.

        Args:
            nodes: in API format; all of its outputs must be valid.

        Returns:
            Node id -> what that node showed.

        Raises:
            CalibrationError: the workflow was refused or failed, or the server went away.
        """
        self._sent, self._accepted = True, False
        answer = as_object(self._ask("/prompt", {"prompt": nodes, "client_id": self.client}))
        run = answer.get("prompt_id")
        self._sent = self._accepted = isinstance(run, str)
        if not isinstance(run, str) or answer.get("node_errors"):
            raise self._error(f"the workflow was refused: {_refusal(answer, nodes)}")
        entry = self._wait(run)
        self._sent = False
        status = as_object(entry.get("status"))
        if status.get("status_str", "success") != "success":
            raise self._error(_failure(as_list(status.get("messages")), nodes))
        return as_object(entry.get("outputs"))

    def cancel(self) -> None:
        """Take the run that was queued last off the server, if it is still there, and nobody else's."""
        if not self._sent:
            return
        self._sent = False
        self.patience_seconds = min(CANCEL_SECONDS, self.patience_seconds)
        deadline = time.monotonic() + (0 if self._accepted else ARRIVAL_SECONDS)
        try:
            while not any(self._ours()) and time.monotonic() < deadline:  # its answer was not waited for
                time.sleep(SOON_SECONDS)
            if waiting := self._ours()[1]:
                self._ask("/queue", {"delete": waiting})
            for run in self._ours()[0]:  # it may have begun in the meantime
                self._ask("/interrupt", {"prompt_id": run})
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
        with self._open("/view", file) as answer:
            try:
                with path.open("wb") as output:
                    output.writelines(self._chunks(answer, name, MOST_FILE_BYTES))
            except OSError as error:
                raise OutputError(f"cannot be written: {error.strerror}", path=path) from None

    def _wait(self, run: str) -> dict[str, Any]:
        """Until a run is in the history; its entry."""
        start = heard = time.monotonic()
        while True:
            try:
                known = any(run in runs for runs in self._ours())
                entry = as_object(self._ask(f"/history/{quoted(run)}")).get(run)  # last: till then it is in the queue
                if entry:
                    return as_object(entry)
                if not known:
                    hint = "was it restarted, or the queue cleared?"
                    raise self._error("the run is no longer in the server's queue", hint)
                heard = time.monotonic()
            except NoAnswerError as error:
                silent, patience = time.monotonic() - heard, self.patience_seconds
                if silent > (min(REFUSED_SECONDS, patience) if error.refused else patience):
                    raise self._error(
                        f"the server stopped answering in the middle of a run, {silent:.0f} s ago ({error.problem})"
                    ) from None
            time.sleep(min(max((time.monotonic() - start) / 10, SOON_SECONDS), LATER_SECONDS))

    def _ours(self) -> tuple[list[str], list[str]]:
        """Runs of this client: those that run, and those that wait."""
        queue = as_object(self._ask("/queue"))
        running, waiting = (
            [
                item[1]
                for item in map(as_list, as_list(queue.get(part)))  # number, id, workflow, further data, outputs
                if len(item) > 3 and as_object(item[3]).get("client_id") == self.client
            ]
            for part in ("queue_running", "queue_pending")
        )
        return running, waiting

    def _error(self, problem: str, hint: str | None = None) -> CalibrationError:
        return CalibrationError(problem, path=self.address, hint=hint)

    def _ask(self, path: str, body: Any = None) -> Any:
        """GET, or POST JSON: the answer's JSON, also of a refusal; None where it is empty or something else.

        Raises:
            NoAnswerError: none came.
            StatusError: an HTTP error.
        """
        with self._open(path, body=body) as answer:
            content = b"".join(self._chunks(answer, f"its answer to {path}", MOST_JSON_BYTES))
        try:
            return parse_json(content, most_bytes=MOST_JSON_BYTES, lenient=True)
        except JSONError:
            return None

    def _open(self, path: str, query: Mapping[str, str] | None = None, body: Any = None) -> Any:
        """An answer whose content is still to be read, with `_chunks`.

        Raises:
            NoAnswerError: none came.
            StatusError: an HTTP error.
            CalibrationError: a redirect.
        """
        url = self.address + path + (f"?{urllib.parse.urlencode(query, errors='replace')}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  http or https
        try:
            return self._opener.open(request, timeout=self.patience_seconds)
        except urllib.error.HTTPError as error:
            if error.code == REFUSED and body is not None:
                return error
            with error:
                raise self._http_error(error, path) from None
        except (OSError, HTTPException) as error:
            raise self._no_answer(getattr(error, "reason", error)) from None

    def _chunks(self, answer: Any, name: str, most_bytes: int) -> Iterator[bytes]:
        """The content of an answer.

        Raises:
            NoAnswerError: it broke off, or comes too slowly.
            CalibrationError: it is too large.
        """
        start, received = time.monotonic(), 0
        while True:
            try:
                chunk: bytes = answer.read1(_CHUNK_BYTES)
            except (OSError, HTTPException) as error:
                raise self._no_answer(error) from None
            if not chunk:
                return
            received += len(chunk)
            if received > most_bytes:
                raise self._error(f"{name} is larger than {most_bytes:,} bytes")
            yield chunk
            if time.monotonic() - start > self.patience_seconds + received / LEAST_BYTES_PER_SECOND:
                raise self._no_answer(f"{received:,} bytes in {time.monotonic() - start:.0f} s")

    def _http_error(self, error: urllib.error.HTTPError, path: str) -> CalibrationError:
        problem = f"HTTP error {error.code} for {path}"
        if error.code in GATEWAY_ERRORS:
            return self._no_answer(problem)
        if (location := error.headers.get("Location")) is not None:
            problem = f"answers with a redirect to {shown(location)}, which is not followed"
            return self._error(problem, "give the address that ComfyUI itself has")
        return StatusError(problem, path=self.address, hint="is it the address of ComfyUI?")

    def _no_answer(self, reason: object) -> NoAnswerError:
        said = getattr(reason, "strerror", None) or str(reason) or repr(reason)
        error = NoAnswerError(f"no answer: {shown(said)}", path=self.address, hint="is ComfyUI running there?")
        error.refused = isinstance(reason, ConnectionRefusedError)
        return error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to be errors."""

    def redirect_request(self, *_args: Any) -> None:
        """None of them."""


def _refusal(answer: Mapping[str, Any], nodes: Nodes) -> str:
    """What a server says of a workflow that it does not run: node, input and reason."""
    told = []
    for name, found in as_object(answer.get("node_errors")).items():
        for error in map(as_object, as_list(as_object(found).get("errors"))):
            what = [shown(error[key]) for key in ("message", "details") if error.get(key)]
            told.append(": ".join([title(nodes, name), *what]))
    general = as_object(answer.get("error"))
    if not told:
        told = [": ".join(shown(general[key]) for key in ("message", "details") if general.get(key))]
    more = f"; and {len(told) - _MOST_ERRORS} more" if len(told) > _MOST_ERRORS else ""
    return ("; ".join(told[:_MOST_ERRORS]) or "it does not say why") + more


def _failure(messages: list[Any], nodes: Nodes) -> str:
    """Why a run failed."""
    for kind, said in (message for message in messages if len(as_list(message)) == 2):
        data = as_object(said)
        where = f"{title(nodes, str(data.get('node_id')))} of type {shown(data.get('node_type'))}"
        if kind == "execution_error":
            what = shown(data.get("exception_message")) or "no message"
            return f"the run failed in {where}: {shown(data.get('exception_type'))}: {what}"
        if kind == "execution_interrupted":
            return f"the run was cancelled on the server, in {where}"
    return "the run failed; the server does not say why"


def check_address(address: str) -> str:
    """A server's URL, without a slash at its end.

    Raises:
        OptionError: it is something else.

    >>> check_address("http://127.0.0.1:8188/")
    'http://127.0.0.1:8188'
    """
    hint = "such as http://127.0.0.1:8188"
    if "@" in address:  # what is secret is not said again
        raise OptionError("user names in addresses are not supported", hint=hint)
    try:
        parts = urllib.parse.urlsplit(address)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.path.isascii()
        (parts.hostname or "").encode("idna")  # as it is looked up; a ValueError where it cannot be
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment or not address.isprintable() or " " in address:
        raise OptionError(f"{shown(address)} is not a server address", hint=hint)
    return address.rstrip("/")


def quoted(text: str) -> str:
    """A text as one part of a path; what is no letter (half of one, which JSON may hold) as a question mark."""
    return urllib.parse.quote(text, safe="", errors="replace")


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one where it is something else."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A JSON array; an empty one where it is something else."""
    return value if isinstance(value, list) else []
