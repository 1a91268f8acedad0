"""`trimtab profiles`: upload, list, roll back and delete the profiles of a running server, and set their aliases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from server.chat.administration import LOCAL, ApiKey, AsJson, Url, connected, print_answer
from steering_vectors.errors import TrimtabError

if TYPE_CHECKING:
    pass

SHOWN_DIGITS = 8  # of a version

profiles = typer.Typer(
    no_args_is_help=True,
    help="Upload, list, roll back and delete the profiles of a running server, and set their aliases.",
)

Name = Annotated[str, typer.Argument(help="The profile's name.")]
IfMatch = Annotated[
    str, typer.Option("--if-match", help="Change the profile only if this is its current version (8 digits or more).")
]


@profiles.command()
def push(
    file: Annotated[Path, typer.Argument(help="The profile file, NAME.safetensors.")],
    name: Annotated[str, typer.Option(help="The profile's name, if the file is named otherwise.")] = "",
    if_match: IfMatch = "",
    create: Annotated[bool, typer.Option("--create", help="Only if there is no profile of this name yet.")] = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """Upload a profile. The version that it replaces is kept."""
    headers = {**_matching(if_match), **({"if-none-match": "*"} if create else {})}
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TrimtabError(f"{file} cannot be read ({error.strerror}): check the path") from error
    with connected(url, api_key) as server:
        answer = server.send("PUT", _path(name or file.stem), content=data, headers=headers)
    print_answer(answer, json_, f"{answer.get('name')} is served in version {_short(answer.get('version'))}")


@profiles.command()
def pull(
    name: Name,
    out: Annotated[Path, typer.Option(help="The directory to write NAME.safetensors into.")] = Path("profiles"),
    version: Annotated[str, typer.Option(help="A version or an alias; by default the current version.")] = "",
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """Download a profile's file."""
    with connected(url, api_key) as server:
        data = server.download(f"{_path(name, 'file')}{f'?version={quote(version)}' if version else ''}")
    target = out / f"{Path(name).name}.safetensors"
    try:
        out.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    except OSError as error:
        raise TrimtabError(f"{target} cannot be written ({error.strerror}): choose another --out") from error
    print_answer({"name": name, "file": str(target), "size": len(data)}, json_, f"{target} has {len(data)} bytes")


@profiles.command("list")
def list_(url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """List the profiles of a server with their versions and aliases."""
    with connected(url, api_key) as server:
        answer = server.fetch("/profiles")
    lines = []
    for one in answer.get("profiles", ()):
        aliases = [_alias(alias, known) for alias, known in one.get("aliases", {}).items()]
        error = [one["error"]] if "error" in one else []
        lines.append("  ".join([one["name"], _short(one.get("version")), one["status"], *aliases, *error]))
    print_answer(answer, json_, *lines)


@profiles.command()
def versions(name: Name, url: Url = LOCAL, api_key: ApiKey = "", json_: AsJson = False) -> None:
    """List the versions of a profile that can be used, the latest first."""
    with connected(url, api_key) as server:
        answer = server.fetch(_path(name, "versions"))
    lines = []
    for one in answer.get("versions", ()):
        notes = [word for word in ("current", "shipped") if one[word]] + one["aliases"]
        used = [f"used by {one['in_use']}"] if one["in_use"] else []
        published = [one[field] for field in ("published_at", "published_by") if field in one]
        lines.append("  ".join([_short(one["version"]), *published, *notes, *used]))
    print_answer(answer, json_, *lines)


@profiles.command()
def rollback(
    name: Name,
    version: Annotated[str, typer.Argument(help="The version; by default the one before the current one.")] = "",
    if_match: IfMatch = "",
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """Make an earlier version of a profile current again, also after it was deleted."""
    body = {"version": version} if version else {}
    with connected(url, api_key) as server:
        answer = server.send("POST", _path(name, "rollback"), json=body, headers=_matching(if_match))
    print_answer(answer, json_, f"{name} is served in version {_short(answer.get('version'))}")


@profiles.command()
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias, such as stable (what the plain name means) or canary.")],
    version: Annotated[str, typer.Option(help="The version that it stands for; by default the current one.")] = "",
    share: Annotated[
        float | None,
        typer.Option(help="The part of the requests for the plain name that get this version.", min=0, max=1),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias.")] = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """Give a version of a profile another name, and a share of the requests. Requests name it NAME#ALIAS."""
    path = _path(name, "aliases", alias)
    body: dict[str, Any] = {"share": share, **({"version": version} if version else {})}
    with connected(url, api_key) as server:
        answer = server.send("DELETE", path) if delete else server.send("PUT", path, json=body)
    done = "was deleted" if delete else f"is {_alias('', answer).strip()}"
    print_answer(answer, json_, f"{name}#{alias} {done}")


@profiles.command()
def delete(
    name: Name,
    version: Annotated[str, typer.Option(help="Delete this version that is kept, not the profile.")] = "",
    if_match: IfMatch = "",
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """Delete a profile and its aliases, or one of its versions. A deleted profile can be rolled back."""
    path = _path(name, "versions", version) if version else _path(name)
    with connected(url, api_key) as server:
        answer = server.send("DELETE", path, headers=_matching(if_match))
    back = f"; the shipped version {_short(answer['served'])} is served" if answer.get("served") else ""
    print_answer(answer, json_, f"version {_short(answer.get('version'))} of {name} was deleted{back}")


@profiles.command()
def log(
    name: Annotated[str, typer.Argument(help="The profile; by default all.")] = "",
    limit: Annotated[int, typer.Option(help="The maximum number of changes.", min=1, max=1000)] = 100,
    url: Url = LOCAL,
    api_key: ApiKey = "",
    json_: AsJson = False,
) -> None:
    """Show who has changed profiles, the newest change first."""
    with connected(url, api_key) as server:
        answer = server.fetch(f"/audit?limit={limit}{f'&profile={quote(name)}' if name else ''}")
    lines = []
    for one in answer.get("changes", ()):
        change = f"{_short(one.get('from_version'))} -> {_short(one.get('to_version'))}"
        who = one.get("key") or one.get("address") or "the directory"
        lines.append("  ".join([one["at"], who, one["action"], one["profile"], one.get("alias", ""), change]))
    print_answer(answer, json_, *lines)


def _path(*parts: str) -> str:
    return "/".join(["/profiles", *(quote(part, safe="") for part in parts)])


def _matching(version: str) -> dict[str, str]:
    return {"if-match": f'"{version}"'} if version else {}


def _short(version: str | None) -> str:
    return version[:SHOWN_DIGITS] if version else "none"


def _alias(alias: str, known: Mapping[str, Any]) -> str:
    share = f" for a share of {known['share']:g}" if known["share"] else ""
    return f"{alias} {_short(known['version'])}{share}"
