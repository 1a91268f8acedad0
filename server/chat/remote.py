"""The client of a running server: its connection, event streams and errors."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from steering_vectors.errors import TrimtabError

Json = dict[str, Any]

CONNECT_SECONDS = 10.0
UNIX = "unix:"  # an address that is the path of a unix socket
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CHAT = "/v1/chat/completions"


class RemoteError(TrimtabError):
    """The server cannot be reached, or it answered with an error."""

    code = "remote"


class Remote:
    """One server. Connecting has a timeout; replies do not."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        with self._remote_errors():
            local = self.url.startswith(UNIX)
            self._client = httpx.Client(
                base_url="http://localhost" if local else self.url,
                transport=httpx.HTTPTransport(uds=self.url.removeprefix(UNIX)) if local else None,
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(CONNECT_SECONDS, read=None),
                trust_env=httpx.URL(self.url).host not in LOOPBACK,  # a proxy does not know this machine's servers
            )

    def close(self) -> None:
        self._client.close()

    def fetch(self, path: str, body: Json | None = None) -> Json:
        """The JSON that a route answers, to a body if it takes one. Raises RemoteError."""
        return self.send("GET" if body is None else "POST", path, json=body)

    def send(self, method: str, path: str, **options: Any) -> Json:
        """The JSON that a route answers; `options` are httpx's. Raises RemoteError."""
        with self._remote_errors():
            return self._read(self._client.request(method, path, **options))

    def download(self, path: str) -> bytes:
        """The file that a route answers. Raises RemoteError."""
        with self._remote_errors():
            response = self._client.get(path)
            if not response.is_success:
                self._read(response)
            return response.content

    def events(self, path: str) -> Iterator[Json]:
        """The events of a stream that a route answers, to its end. Raises RemoteError."""
        with self._remote_errors(), self._client.stream("GET", path) as response:
            if response.status_code != 200:
                self._read(response)
            for data in event_data(response.iter_bytes()):
                yield self._checked(json.loads(data))

    def stream(self, body: Json) -> Generator[Json, None, None]:
        """The chunks of a chat completion as they come; closing the iterator ends the reply. Raises RemoteError."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with self._remote_errors(), self._client.stream("POST", CHAT, json={**body, **options}) as response:
            if response.status_code != 200:
                self._read(response)
            for data in event_data(response.iter_bytes()):
                if data == "[DONE]":
                    return
                chunk = self._checked(json.loads(data))
                if not _is_chunk(chunk):
                    raise self._not_trimtab("events of another form")
                yield chunk
            raise RemoteError(f"{self.url} ended its reply without an end: send it again with /retry")

    def _read(self, response: httpx.Response) -> Json:
        response.read()
        found = self._checked(response.json())
        if not response.is_success:
            raise self._not_trimtab(f"status {response.status_code}")
        return found

    def _checked(self, found: Any) -> Json:
        """The answer, unless it is an error."""
        if not isinstance(found, dict):
            raise self._not_trimtab("JSON of another form")
        error = found.get("error")
        if error is not None:
            raise RemoteError(str(error["message"]) if isinstance(error, dict) and "message" in error else str(error))
        return found

    def _not_trimtab(self, what: str) -> RemoteError:
        return RemoteError(f"{self.url} answers ({what}), but not as a trimtab server does: check --url")

    @contextmanager
    def _remote_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            remedy = "start one with `trimtab serve`, or name another by --url"
            raise RemoteError(f"no server answers at {self.url}: {remedy}") from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise RemoteError(f"--url {self.url!r} is no address such as http://127.0.0.1:8000") from error
        except httpx.TransportError as error:
            raise RemoteError(f"the connection to {self.url} broke ({type(error).__name__}): try again") from error
        except (ValueError, RecursionError) as error:  # too many digits, or too deep, are no JSONDecodeError
            raise self._not_trimtab("no JSON") from error


def event_data(received: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of an SSE stream, however its bytes are parted. Lines end in a newline only: httpx also
    splits at characters that JSON may hold. Data after the last newline is left out."""
    rest = b""
    for part in received:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode(errors="replace")


def _is_chunk(found: Json) -> bool:
    """Whether a conversation can read it: an object of `chat.completion.chunk`."""
    choices, usage, steering = (found.get(name) for name in ("choices", "usage", "steering"))
    return (
        isinstance(choices, list)
        and all(map(_is_choice, choices))
        and (usage is None or (isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int)))
        and (steering is None or (isinstance(steering, list) and all(map(_is_receipt, steering))))
    )


def _is_choice(choice: Any) -> bool:
    return (
        isinstance(choice, dict)
        and isinstance(choice.get("delta"), dict)
        and isinstance(choice["delta"].get("content"), str | None)
        and isinstance(choice.get("finish_reason"), str | None)
    )


def _is_receipt(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("strength"), int | float)
        and isinstance(entry.get("steered_tokens"), int)
    )
