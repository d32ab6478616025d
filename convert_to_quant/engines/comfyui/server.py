"""Client for a running ComfyUI over HTTP: queue a workflow, wait for it, fetch its files, cancel it.

    GET  /system_stats           is it ComfyUI
    GET  /object_info/CLASS      inputs and outputs of a node class
    POST /prompt                 queue a run
    GET  /history/ID, /queue     is it done, running or waiting
    GET  /view?filename=...      a file in its output folder
    POST /queue, /interrupt      cancel a run

A run is done when it appears in /history, which is polled. Progress counts whole runs: ComfyUI reports steps only over
a websocket. A run may take hours. A server that is silent for `patience_seconds` or refuses connections is given up.

Answers are not trusted: file names go nowhere but back to the server, and texts are printed on one line.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from uuid import uuid4

from ...errors import CalibrationError, OptionError, OutputError
from ...untrusted import JSONError, parse_json
from .workflow import RECORD, SAVE, Nodes, NodeType, shown, title

PATIENCE_SECONDS = 120.0
"""ComfyUI may not answer while it loads a model."""

SOON_SECONDS, LATER_SECONDS = 0.05, 3.0
"""Limits of the polling interval, which is a tenth of the time that a run has taken so far."""

ARRIVAL_SECONDS = 2.0
"""How long `cancel` waits for a run to appear that was interrupted while it was queued."""

CANCEL_SECONDS = 10.0
"""Patience while cancelling."""

GATEWAY_ERRORS = frozenset({502, 503, 504})
"""Status codes of a proxy whose server does not answer."""

LEAST_BYTES_PER_SECOND = 1 << 10
"""A server that sends less, for longer than it may be silent, is given up."""

REFUSED = 400
"""HTTP status of a rejected workflow; the body contains the reasons."""

MOST_JSON_BYTES = 1 << 25
MOST_FILE_BYTES = 1 << 31
_CHUNK_BYTES = 1 << 20
_MOST_ERRORS = 5


class NoAnswerError(CalibrationError):
    """The server did not answer.

    Attributes:
        refused: it refused the connection, so it is not running.
    """

    refused = False


class StatusError(CalibrationError):
    """An HTTP error."""


class Server:
    """A running ComfyUI.

    Args:
        address: its URL; see `check_address`.
        patience_seconds: timeout of each read.
    """

    def __init__(self, address: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.address, self.patience_seconds = check_address(address), patience_seconds
        self.client = str(uuid4())
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
        self._queued = False  # whether a run of ours may be on the server

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def types(self, classes: Iterable[str]) -> dict[str, NodeType]:
        """Inputs and outputs of node classes, without those that the server does not have."""
        if "system" not in as_object(self._ask("/system_stats")):
            raise self._error("the server is not ComfyUI")
        found = {name: kind for name in classes if (kind := self._type(name)) is not None}
        if RECORD not in found or SAVE not in found:
            hint = "install this package for its Python, run `convert_to_quant comfyui install COMFYUI_DIR`, and "
            raise self._error("this ComfyUI does not have the nodes of convert_to_quant", f"{hint}restart it")
        return found

    def _type(self, name: str) -> NodeType | None:
        """Inputs and outputs of one class."""
        try:
            info = as_object(self._ask(f"/object_info/{quoted(name)}")).get(name)
        except StatusError:  # the class fails to describe itself
            return None
        try:
            return None if info is None else NodeType.read(info)
        except (AttributeError, KeyError, TypeError):
            raise self._error(f"cannot read the server's description of node type {shown(name)}") from None

    def run(self, nodes: Nodes) -> dict[str, Any]:
        """Queue a workflow, and wait until it is done.

        Args:
            nodes: in API format; all of its outputs must be valid.

        Returns:
            Node id -> its UI output.

        Raises:
            CalibrationError: the workflow was rejected or failed, or the server stopped answering.
        """
        self._queued = True
        answer = as_object(self._ask("/prompt", {"prompt": nodes, "client_id": self.client}))
        run = answer.get("prompt_id")
        self._queued = isinstance(run, str)
        if not isinstance(run, str) or answer.get("node_errors"):
            raise self._error(f"the server rejected the workflow: {_refusal(answer, nodes)}")
        entry = self._wait(run)
        self._queued = False
        status = as_object(entry.get("status"))
        if status.get("status_str", "success") != "success":
            raise self._error(_failure(as_list(status.get("messages")), nodes))
        return as_object(entry.get("outputs"))

    def cancel(self) -> None:
        """Cancel the last run if it is still waiting or running. Runs of others stay."""
        if not self._queued:
            return
        self._queued = False
        self.patience_seconds = min(CANCEL_SECONDS, self.patience_seconds)
        deadline = time.monotonic() + ARRIVAL_SECONDS
        with suppress(CalibrationError):  # the server is gone, and the run with it
            while not any(self._ours()) and time.monotonic() < deadline:
                time.sleep(SOON_SECONDS)
            if waiting := self._ours()[1]:
                self._ask("/queue", {"delete": waiting})
            for run in self._ours()[0]:  # only these: older servers interrupt whatever runs
                self._ask("/interrupt", {"prompt_id": run})

    def fetch(self, file: Mapping[str, str], path: Path) -> None:
        """Download a file from the server's folders.

        Args:
            file: parameters of `/view`: filename, subfolder, type.
            path: the local file.
        """
        name = shown("/".join(part for part in (file["subfolder"], file["filename"]) if part))
        with self._open("/view", file) as answer:
            try:
                with path.open("wb") as output:
                    output.writelines(self._chunks(answer, name, MOST_FILE_BYTES))
            except OSError as error:
                raise OutputError(f"cannot be written: {error.strerror}", path=path) from None

    def _wait(self, run: str) -> dict[str, Any]:
        """Wait until a run is in the history; return its entry."""
        start = heard = time.monotonic()
        while True:
            try:
                queued = any(run in runs for runs in self._ours())
                entry = as_object(self._ask(f"/history/{quoted(run)}")).get(run)  # last: a run moves there
                if entry:
                    return as_object(entry)
                if not queued:
                    self._queued = False
                    hint = "was the server restarted, or its queue cleared?"
                    raise self._error("the run is no longer in the server's queue", hint)
                heard = time.monotonic()
            except NoAnswerError as error:
                silent = time.monotonic() - heard
                if error.refused or silent > self.patience_seconds:
                    raise self._error(
                        f"the server stopped answering during a run, {silent:.0f} s ago ({error.problem})"
                    ) from None
            time.sleep(min(max((time.monotonic() - start) / 10, SOON_SECONDS), LATER_SECONDS))

    def _ours(self) -> list[list[str]]:
        """Ids of the runs of this client: those that are running, and those that are waiting."""
        queue = as_object(self._ask("/queue"))
        return [
            [
                item[1]
                for item in map(as_list, as_list(queue.get(part)))  # number, id, workflow, further data, outputs
                if len(item) > 3 and as_object(item[3]).get("client_id") == self.client
            ]
            for part in ("queue_running", "queue_pending")
        ]

    def _error(self, problem: str, hint: str | None = None) -> CalibrationError:
        return CalibrationError(problem, path=self.address, hint=hint)

    def _ask(self, path: str, body: Any = None) -> Any:
        """GET, or POST JSON. Returns the answer's JSON, also of a rejected workflow; None if it is not JSON."""
        with self._open(path, body=body) as answer:
            content = b"".join(self._chunks(answer, f"its answer to {path}", MOST_JSON_BYTES))
        try:
            return parse_json(content, most_bytes=MOST_JSON_BYTES, lenient=True)
        except JSONError:
            return None

    def _open(self, path: str, query: Mapping[str, str] | None = None, body: Any = None) -> Any:
        """Send a request. The answer's content is read with `_chunks`."""
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
        """The content of an answer, which is refused if it is too large or too slow."""
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
            problem = f"the server redirects to {shown(location)}, which is not followed"
            return self._error(problem, "give ComfyUI's own address")
        return StatusError(problem, path=self.address, hint="is this the address of ComfyUI?")

    def _no_answer(self, reason: object) -> NoAnswerError:
        text = getattr(reason, "strerror", None) or str(reason) or repr(reason)
        error = NoAnswerError(f"no answer: {shown(text)}", path=self.address, hint="is ComfyUI running there?")
        error.refused = isinstance(reason, ConnectionRefusedError)
        return error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Turns redirects into errors."""

    def redirect_request(self, *_args: Any) -> None:
        """Do not follow."""


def _refusal(answer: Mapping[str, Any], nodes: Nodes) -> str:
    """Why the server rejected a workflow: node, input and reason."""
    reasons = []
    for name, found in as_object(answer.get("node_errors")).items():
        for error in map(as_object, as_list(as_object(found).get("errors"))):
            what = [shown(error[key]) for key in ("message", "details") if error.get(key)]
            reasons.append(": ".join([title(nodes, name), *what]))
    general = as_object(answer.get("error"))
    if not reasons:
        reasons = [": ".join(shown(general[key]) for key in ("message", "details") if general.get(key))]
    more = f"; and {len(reasons) - _MOST_ERRORS} more" if len(reasons) > _MOST_ERRORS else ""
    return ("; ".join(reasons[:_MOST_ERRORS]) or "no reason given") + more


def _failure(messages: list[Any], nodes: Nodes) -> str:
    """Why a run failed."""
    for kind, found in (message for message in messages if len(as_list(message)) == 2):
        data = as_object(found)
        where = f"{title(nodes, str(data.get('node_id')))} of type {shown(data.get('node_type'))}"
        if kind == "execution_error":
            what = shown(data.get("exception_message")) or "no message"
            return f"the run failed in {where}: {shown(data.get('exception_type'))}: {what}"
        if kind == "execution_interrupted":
            return f"the run was cancelled on the server, in {where}"
    return "the run failed, no reason given"


def check_address(address: str) -> str:
    """A server's URL, without a trailing slash.

    Raises:
        OptionError: it is not a URL of a server.

    >>> check_address("http://127.0.0.1:8188/")
    'http://127.0.0.1:8188'
    """
    hint = "such as http://127.0.0.1:8188"
    if "@" in address:  # do not print a password
        raise OptionError("user names in addresses are not supported", hint=hint)
    try:
        parts = urllib.parse.urlsplit(address)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.path.isascii()
        (parts.hostname or "").encode("idna")  # ValueError if it is not a host name
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment or not address.isprintable() or " " in address:
        raise OptionError(f"{shown(address)} is not a server address", hint=hint)
    return address.rstrip("/")


def quoted(text: str) -> str:
    """A text as one part of a URL path; lone surrogates, which JSON may contain, become question marks."""
    return urllib.parse.quote(text, safe="", errors="replace")


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A JSON array; an empty one for anything else."""
    return value if isinstance(value, list) else []
