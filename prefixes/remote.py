"""Remote: one of our HTTP services from the caller's side. Every client of ours speaks through it.

Owns the URL, the key, turning an unsuccessful answer into a named error, and finding an error's class by its code.
Knows no route. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx

from prefixes.errors import PrefixdError

TIMEOUT_S: Final = 120.0


class RemoteError(PrefixdError):
    """An error of the service whose code has no class here. ``code`` is the service's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # the code is known only when the answer arrives


class Remote:
    """Requests to one service. Raises ``unavailable`` if it cannot be reached or answers as no service of ours does."""

    def __init__(
        self,
        called: str,
        unavailable: type[PrefixdError],
        url: str,
        *,
        api_key: str | None = None,
        client: httpx.Client | None = None,
    ) -> None:
        """``called`` is the service's name in messages. Raises ``unavailable`` unless ``url`` is http or https and has
        a host.
        """
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            base = httpx.URL(url)
            if base.scheme not in ("http", "https") or not base.host:
                raise httpx.InvalidURL("no http:// or https:// URL")
            self._client = client or httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise unavailable(f"{called} URL: expected http://host[:port], got {url!r}: {error}") from None
        self._unavailable = unavailable
        self._called = called
        self._shown = str(base.copy_with(userinfo=b""))

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """A successful answer. Raises the error that the service names, or ``unavailable`` if it names none."""
        with self._reaching():
            response = self._client.request(method, path, **content)
        if not response.is_success:
            raise self._error(response)
        return response

    def json(self, method: str, path: str, **content: Any) -> Any:
        """The JSON of a successful answer. Raises as ``send`` does."""
        response = self.send(method, path, **content)
        try:
            return response.json()
        except ValueError:
            raise self.foreign("JSON") from None

    @contextmanager
    def stream(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        """A successful answer, whose body is read within the block. Raises as ``send`` does, within the block too."""
        with self._reaching(), self._client.stream(method, path, **content) as response:
            if not response.is_success:
                response.read()
                raise self._error(response)
            yield response

    def foreign(self, expected: str) -> PrefixdError:
        """The error to raise for an answer that is not ``expected``."""
        return self._unavailable(f"the {self._called} at {self._shown}: expected {expected}, got another answer")

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.RequestError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise self._unavailable(f"cannot reach the {self._called} at {self._shown}: {reason}") from None

    def _error(self, response: httpx.Response) -> PrefixdError:
        """The error that the service names, in its class here, or ``unavailable`` if it names none."""
        try:
            raw = response.json()["error"]
            code, message, detail = str(raw["code"]), str(raw["message"]), raw.get("detail")
        except (ValueError, KeyError, TypeError, AttributeError):
            status = response.status_code
            return self._unavailable(f"the {self._called} at {self._shown} answered {status}, without an error")
        error = error_of(code, message)
        error.detail = dict(detail) if isinstance(detail, dict) else {}
        return error


def error_of(code: str, message: str) -> PrefixdError:
    """An error of the imported class that has ``code``, or a RemoteError if none has it."""
    known = next((kind for kind in _kinds(PrefixdError) if kind.code == code), None)
    if known is None:
        return RemoteError(code, message)
    error = known.__new__(known)  # its own __init__ may take other arguments
    PrefixdError.__init__(error, message)
    return error


def _kinds(base: type[PrefixdError]) -> Iterator[type[PrefixdError]]:
    for kind in base.__subclasses__():
        if kind is not RemoteError:
            yield kind
            yield from _kinds(kind)
