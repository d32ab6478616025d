"""HTTP requests to one address: the one that the user gave, past the environment's proxies and without redirects."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any

from ...errors import CalibrationError, OptionError
from ...untrusted import JSONError, parse_json
from .workflow import shown

MOST_JSON_BYTES = 1 << 28
MOST_REFUSAL_BYTES = 1 << 20

GATEWAY_ERRORS = frozenset({502, 503, 504})
"""What a proxy in front of a server says for it while it is silent."""


class NoAnswerError(CalibrationError):
    """The server did not answer at all.

    Attributes:
        refused: it refused the connection: nothing listens there.
    """

    refused = False


class StatusError(CalibrationError):
    """An HTTP error.

    Attributes:
        body: what came with it.
        moved: it is a redirect.
    """

    body = b""
    moved = False


class Connection:
    """To a server.

    Args:
        address: its URL; see `check_address`.
        patience_seconds: how long an answer may take to begin or to go on.

    Raises:
        OptionError: the address is none.
    """

    def __init__(self, address: str, patience_seconds: float) -> None:
        self.address = check_address(address)
        self.patience_seconds = patience_seconds
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())

    def error(self, problem: str, hint: str | None = None) -> CalibrationError:
        """One that names the address."""
        return CalibrationError(problem, path=self.address, hint=hint)

    def ask(self, path: str, *, body: Any = None, refusals: bool = False) -> Any:
        """GET, or POST JSON.

        Args:
            path: with a leading slash.
            body: of a POST.
            refusals: whether JSON that comes with an HTTP error is an answer, too.

        Returns:
            The answer's JSON; None where it is empty or something else.

        Raises:
            NoAnswerError: none came.
            StatusError: an HTTP error.
        """
        try:
            with self.open(path, body=body) as answer:
                return parsed(self.read(answer, MOST_JSON_BYTES))
        except StatusError as error:
            told = parsed(error.body) if refusals else None
            if told is None:
                raise
            return told

    def open(self, path: str, query: Mapping[str, str] | None = None, body: Any = None) -> HTTPResponse:
        """An answer whose content is still to be read, with `read`.

        Raises:
            NoAnswerError: none came.
            StatusError: an HTTP error.
        """
        url = self.address + path + (f"?{urllib.parse.urlencode(query, errors='replace')}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        head = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, head)  # noqa: S310  http or https: see check_address
        try:
            answer: HTTPResponse = self._opener.open(request, timeout=self.patience_seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, path) from None
        except urllib.error.URLError as error:
            raise self._no_answer(error.reason) from None
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from None
        return answer

    def read(self, answer: Any, most_bytes: int) -> bytes:
        """The next bytes of an answer; none at its end.

        Raises:
            NoAnswerError: it broke off.
        """
        try:
            content: bytes = answer.read(most_bytes)
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from None
        return content

    def _refused(self, answer: urllib.error.HTTPError, path: str) -> CalibrationError:
        """What an HTTP error becomes."""
        if answer.code in GATEWAY_ERRORS:
            return self._no_answer(f"HTTP error {answer.code} for {path}")
        error = StatusError(
            f"HTTP error {answer.code} for {path}", path=self.address, hint="is it the address of ComfyUI?"
        )
        location = answer.headers.get("Location")
        if location is not None:
            problem = f"answers with a redirect to {shown(location)}, which is not followed"
            error = StatusError(problem, path=self.address, hint="give the address that ComfyUI itself has")
            error.moved = True
        error.body = self.read(answer, MOST_REFUSAL_BYTES)
        return error

    def _no_answer(self, reason: object) -> NoAnswerError:
        said = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason) or repr(reason)
        error = NoAnswerError(f"no answer: {shown(said)}", path=self.address, hint="is ComfyUI running there?")
        error.refused = isinstance(reason, ConnectionRefusedError)
        return error


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
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.path.isascii()
        (parts.hostname or "").encode("idna")  # as it is looked up; a ValueError where it cannot be
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment or not address.isprintable() or " " in address:
        raise OptionError(f"{shown(address)} is no address of a server", hint=hint)
    return address.rstrip("/")


def quoted(text: str) -> str:
    """A text as one part of a path; what is no letter (half of one, which JSON may hold) as a question mark."""
    return urllib.parse.quote(text, safe="", errors="replace")


def parsed(text: str | bytes) -> Any:
    """JSON, or None where it is none."""
    try:
        return parse_json(text, most_bytes=MOST_JSON_BYTES, lenient=True)
    except JSONError:
        return None


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one where it is something else."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A JSON array; an empty one where it is something else."""
    return value if isinstance(value, list) else []
