"""What the commands that administer a running server share: their flags, the connection, and how they print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.chat.remote import Remote

Url = Annotated[str, typer.Option(help="The server's address.", envvar="TRIMTAB_URL")]
ApiKey = Annotated[
    str,
    typer.Option(help="A key with the scope admin, if the server requires keys.", envvar="TRIMTAB_API_KEY"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
LOCAL = "http://127.0.0.1:8000"


@contextmanager
def connected(url: str, api_key: str) -> Iterator[Remote]:
    from server.chat.remote import Remote

    server = Remote(url, api_key)
    try:
        yield server
    finally:
        server.close()


def print_answer(answer: Mapping[str, Any], as_json: bool, *lines: str) -> None:
    """Print the answer as JSON, or the lines that say it."""
    for line in [json.dumps(answer)] if as_json else lines:
        print(line)
