"""A client of an OpenAI-compatible server: chat completions, with patience for a server that is busy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from steering_vectors.data.chat import Message
from steering_vectors.errors import TrimtabError

CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0
ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds; the wait doubles from attempt to attempt
BUSY = (408, 429, 502, 503, 504)
SCHEMES = ("http", "https")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class EndpointError(TrimtabError):
    """An endpoint cannot be reached, or does not answer as it should. `status` is that of its answer, or None."""

    code = "endpoint_failed"

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def is_endpoint(text: str) -> bool:
    """Whether a text is the address of an endpoint."""
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


class Endpoint:
    """One model of an OpenAI-compatible server, such as `http://127.0.0.1:8000/v1#MODEL`.

    Without `#MODEL` it is the first model that the server lists. `close` it after use.
    """

    def __init__(self, address: str, api_key: str = "") -> None:
        url, _, model = address.partition("#")
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        try:
            host = httpx.URL(self.url).host
            self._client = httpx.Client(
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
                trust_env=host not in LOOPBACK,  # a proxy does not know this machine's servers
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise EndpointError(f"{url!r} is no address such as http://127.0.0.1:8000/v1") from error
        try:
            self.model = model or self._first_model()
        except EndpointError:
            self.close()
            raise

    @property
    def name(self) -> str:
        return f"{self.url}#{self.model}"

    def close(self) -> None:
        self._client.close()

    def chat(self, messages: Sequence[Message], **fields: Any) -> dict[str, Any]:
        """The answer of POST /chat/completions to messages, with `fields` in its body. Raises EndpointError.

        A server that is busy, or a connection that breaks, is tried again, up to five times.
        """
        body = {
            "model": self.model,
            "messages": [{"role": one.role, "content": one.content} for one in messages],
            **fields,
        }
        return self._send("POST", "/chat/completions", body)

    def _first_model(self) -> str:
        try:
            return str(self._send("GET", "/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{self.url} lists no model: name one, as in {self.url}#MODEL") from error

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        problem, wait = "", FIRST_WAIT
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            try:
                response = self._client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__})"
                continue
            if response.status_code not in BUSY:
                return self._read(response)
            problem = f"is busy (status {response.status_code})"
            wait = min(max(wait, _seconds(response.headers.get("retry-after"))), LONGEST_WAIT)
        raise EndpointError(f"{self.url} {problem}: check that it runs, and run the command again, which goes on here")

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        try:
            found = response.json()
        except (ValueError, RecursionError):
            found = None
        if response.is_success and isinstance(found, dict):
            return found
        message = found.get("error", found) if isinstance(found, dict) else None
        if isinstance(message, dict):
            message = message.get("message", message)
        reason = f": {message}" if message else ""
        status = response.status_code
        raise EndpointError(f"{self.url} answers with status {status}{reason}", status=status)


def first_choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first choice of an answer. Raises EndpointError if there is none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EndpointError("the endpoint answers without choices: is it an OpenAI-compatible server?")
    return choices[0]


def text_of(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
