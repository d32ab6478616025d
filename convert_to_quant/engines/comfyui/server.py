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

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from ...errors import CalibrationError, OutputError
from .connection import Connection, NoAnswerError, StatusError, as_list, as_object, quoted
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

MOST_FILE_BYTES = 1 << 31
_CHUNK_BYTES = 1 << 20
_MOST_ERRORS = 5


class Server:
    """One ComfyUI.

    Args:
        address: its URL, as the user gave it.
        patience_seconds: how long it may be silent.

    Raises:
        OptionError: the address is none.
    """

    def __init__(self, address: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.client = uuid4().hex
        self._connection = Connection(address, patience_seconds)
        self._sent = self._accepted = False  # whether a run of ours may be on the server, and whether it said so

    @property
    def address(self) -> str:
        """Its URL."""
        return self._connection.address

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def types(self, classes: Iterable[str]) -> dict[str, NodeType]:
        """What classes of nodes take and give; those that the server does not have are left out.

        Raises:
            CalibrationError: nobody answers, somebody else does, or it does not have our nodes.
        """
        problem = "something answers there, but it is not ComfyUI"
        try:
            stats = self._connection.ask("/system_stats")
        except StatusError as error:
            if error.moved:
                raise
            raise self._connection.error(f"{problem}: {error.problem}") from None
        if "system" not in as_object(stats):
            raise self._connection.error(problem)
        found = {name: kind for name in classes if (kind := self._type(name)) is not None}
        if RECORD not in found or SAVE not in found:
            raise self._connection.error(
                "this ComfyUI does not have our nodes",
                hint="install this package for its Python, run `convert_to_quant comfyui install COMFYUI_DIR`, and "
                "restart it",
            )
        return found

    def _type(self, name: str) -> NodeType | None:
        """One class of nodes."""
        try:
            info = as_object(self._connection.ask(f"/object_info/{quoted(name)}")).get(name)
        except StatusError:  # a class that cannot say what it takes
            return None
        try:
            return None if info is None else NodeType.read(info)
        except (AttributeError, KeyError, TypeError):
            raise self._connection.error(f"it describes nodes of type {shown(name)} in a way not known here") from None

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
        answer = as_object(
            self._connection.ask("/prompt", body={"prompt": nodes, "client_id": self.client}, refusals=True)
        )
        run = answer.get("prompt_id")
        self._sent = self._accepted = isinstance(run, str)
        if not isinstance(run, str) or answer.get("node_errors"):
            raise self._connection.error(f"the workflow was refused: {_refusal(answer, nodes)}")
        entry = self._wait(run)
        self._sent = False
        status = as_object(entry.get("status"))
        if status.get("status_str", "success") != "success":
            raise self._connection.error(_failure(as_list(status.get("messages")), nodes))
        return as_object(entry.get("outputs"))

    def cancel(self) -> None:
        """Take the run that was queued last off the server, if it is still there, and nobody else's."""
        if not self._sent:
            return
        self._sent = False
        self._connection.patience_seconds = min(CANCEL_SECONDS, self._connection.patience_seconds)
        deadline = time.monotonic() + (0 if self._accepted else ARRIVAL_SECONDS)
        try:
            while not any(self._ours()) and time.monotonic() < deadline:  # its answer was not waited for
                time.sleep(SOON_SECONDS)
            if waiting := self._ours()[1]:
                self._connection.ask("/queue", body={"delete": waiting})
            for run in self._ours()[0]:  # it may have begun in the meantime
                self._connection.ask("/interrupt", body={"prompt_id": run})
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
        with self._connection.open("/view", file) as answer:
            try:
                with path.open("wb") as output:
                    while chunk := self._connection.read(answer, _CHUNK_BYTES):
                        count += len(chunk)
                        if count > MOST_FILE_BYTES:
                            raise self._connection.error(f"{name} is larger than statistics are")
                        output.write(chunk)
            except OSError as error:
                raise OutputError(f"cannot be written: {error.strerror}", path=path) from None

    def _wait(self, run: str) -> dict[str, Any]:
        """Until a run is in the history; its entry."""
        start = heard = time.monotonic()
        while True:
            try:
                known = any(run in runs for runs in self._ours())
                entry = self._history(run)  # asked for last: a run is in the queue until it is in the history
                if entry:
                    return entry
                if not known:
                    raise self._connection.error(
                        "the run is no longer in the server's queue", hint="was it restarted, or the queue cleared?"
                    )
                heard = time.monotonic()
            except NoAnswerError as error:
                silent = time.monotonic() - heard
                patience = self._connection.patience_seconds
                if silent > (min(REFUSED_SECONDS, patience) if error.refused else patience):
                    raise self._connection.error(
                        f"the server stopped answering in the middle of a run, {silent:.0f} s ago ({error.problem})"
                    ) from None
            time.sleep(min(max((time.monotonic() - start) / 10, SOON_SECONDS), LATER_SECONDS))

    def _history(self, run: str) -> dict[str, Any]:
        """A run's entry, once it is done; empty before."""
        return as_object(as_object(self._connection.ask(f"/history/{quoted(run)}")).get(run))

    def _ours(self) -> tuple[list[str], list[str]]:
        """Runs of this client: those that run, and those that wait."""
        queue = as_object(self._connection.ask("/queue"))
        running, waiting = (
            [
                item[1]
                for item in map(as_list, as_list(queue.get(part)))  # number, id, workflow, further data, outputs
                if len(item) > 3 and as_object(item[3]).get("client_id") == self.client
            ]
            for part in ("queue_running", "queue_pending")
        )
        return running, waiting


def _refusal(answer: Mapping[str, Any], nodes: Nodes) -> str:
    """What a server says of a workflow that it does not run: node, input and reason."""
    told = []
    for name, found in as_object(answer.get("node_errors")).items():
        for error in map(as_object, as_list(as_object(found).get("errors"))):
            what = [shown(error[key]) for key in ("message", "details") if error.get(key)]
            told.append(": ".join([_title(nodes, name), *what]))
    general = as_object(answer.get("error"))
    if not told:
        told = [": ".join(shown(general[key]) for key in ("message", "details") if general.get(key))]
    more = f"; and {len(told) - _MOST_ERRORS} more" if len(told) > _MOST_ERRORS else ""
    return ("; ".join(told[:_MOST_ERRORS]) or "it does not say why") + more


def _failure(messages: list[Any], nodes: Nodes) -> str:
    """Why a run failed."""
    for kind, said in (message for message in messages if len(as_list(message)) == 2):
        data = as_object(said)
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
    entries = as_list(as_object(outputs.get(save)).get("statistics"))
    entry = as_object(entries[0] if entries else None)
    kinds = {"filename": str, "subfolder": str, "type": str, "recording": str, "samples": int}
    return entry if all(isinstance(entry.get(key), kind) for key, kind in kinds.items()) else None
