"""`trimtab keys`: add, list and revoke the API keys of a file. A running server notices the change within seconds."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.access.keys import Key

keys = typer.Typer(no_args_is_help=True, help="Add, list and revoke the API keys of a server's key file.")

KeyFile = Annotated[
    Path, typer.Option("--api-key-file", help="The key file; `add` creates it.", envvar="TRIMTAB_API_KEY_FILE")
]
KeyName = Annotated[str, typer.Argument(help="The key's name, in lists and logs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class ScopeName(StrEnum):
    generate = "generate"
    feedback = "feedback"
    admin = "admin"


@keys.command()
def add(
    name: KeyName,
    api_key_file: KeyFile,
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            help="What the key is for, may be repeated: generate (the default) is every route of today, "
            "feedback is to give feedback, admin changes profiles and settings, reads feedback, "
            "and includes the others."
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Its requests per minute, instead of the server's setting.", min=1)
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Its generated tokens per minute, instead of the server's setting.", min=1)
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(help="Its requests at once, instead of the server's setting.", min=1)
    ] = None,
    speaks_for: Annotated[
        list[str] | None,
        typer.Option(
            help="With the scope feedback: the name of a key whose generations its feedback may name; may be repeated."
        ),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Generate a key, print it once, and store its SHA-256."""
    from server.access.keys import add_key

    secret, key = add_key(
        api_key_file,
        name,
        [one.value for one in scope or ()],
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        speaks_for=speaks_for or (),
    )
    if json_:
        print(json.dumps({"name": key.name, "key": secret, **_described(key)}))
        return
    print(f"the key {name} was added to {api_key_file}; it is shown only this once:", file=sys.stderr)
    print(secret)


@keys.command("list")
def list_(api_key_file: KeyFile, json_: AsJson = False) -> None:
    """List the keys of a file, without their texts. One that is stored in plain text is named after its line."""
    from server.access.keys import read_keys

    found = read_keys(api_key_file)
    if json_:
        print(json.dumps([{"name": key.name, **_described(key)} for key in found]))
        return
    for key in found:
        described = _described(key)
        shown = {name: ",".join(value) if isinstance(value, list) else value for name, value in described.items()}
        further = [f"{name.replace('_', '-')} {value}" for name, value in shown.items() if name not in _OF_ALL]
        print("  ".join([key.name, shown["scopes"], key.created or "in plain text", *further]))


@keys.command()
def revoke(name: KeyName, api_key_file: KeyFile, json_: AsJson = False) -> None:
    """Take a key out of a file. Requests that run are finished."""
    from server.access.keys import revoke_key

    revoke_key(api_key_file, name)
    if json_:
        print(json.dumps({"name": name, "revoked": True}))
    else:
        print(f"the key {name} was revoked", file=sys.stderr)


_OF_ALL = ("scopes", "created")


def _described(key: Key) -> dict[str, Any]:
    return key.model_dump(exclude={"name", "sha256"}, exclude_none=True)
