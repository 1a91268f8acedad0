"""Made-up requests to a live server for as long as one likes: `make fuzz MINUTES=60`.

Every round has a seed of its own, and three parts: schemathesis, which makes requests from the OpenAPI document and
holds the answers to it, bodies that work with something in them changed (`tests.support.answer_mutations`), and inputs
of what reads foreign bytes and texts (`tests.support.reader_properties`). The first round in which an answer was a 5xx,
late or against the document, or a reader failed, is the last, and shows the request as a curl command, or the input.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from steering_vectors.models.loading import load_model
from tests.clients import schemathesis_cli
from tests.clients.process import serving
from tests.support.answer_mutations import as_curl, check, examples, requests
from tests.support.reader_properties import PROPERTIES, check_in_time
from tests.support.serving import save_profiles

PART_SECONDS = 120  # of a round that schemathesis has
MUTATED = 500  # requests of a round
READ = 1000  # inputs of each reader in a round
PATIENCE = 60.0  # seconds; later than that is never
WHOLE = ("--output-sanitize", "false", "--output-truncate", "false")  # so that the curl commands repeat what was sent
JSON = {"content-type": "application/json"}

Part = Callable[[int, float], int]  # from a seed and the seconds left to the number of requests


class Found(Exception):
    """An answer that should not have been; the text tells the request."""


def main(
    minutes: Annotated[float, typer.Option(help="How long to go on.")] = 60.0,
    first_seed: Annotated[int, typer.Option("--seed", help="The first round's; the next have the next.")] = 1,
) -> None:
    start, cases, number = time.monotonic(), 0, first_seed
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as url:
        parts: list[Part] = [_by_document(url, Path(folder)), _by_mutation(url), *_by_reading()]
        while (left := 60 * minutes - (time.monotonic() - start)) > 0:
            try:
                cases += sum(part(number, left) for part in parts)
            except Found as found:
                sys.exit(f"round with seed {number}, after {cases} cases:\n{found}")
            print(f"seed {number}: {cases} cases in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
            number += 1
    print(
        f"{number - first_seed} rounds, {cases} cases: no 5xx, nothing late or against the document, no reader failed"
    )


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    profiles = folder / "profiles"
    profiles.mkdir()
    save_profiles(profiles, load_model("demo").identity, "warm", "concise", unit=20.0, calibration={"kl_at_1": 0.1})
    with serving(profiles, folder / "log", *schemathesis_cli.SMALL) as url:
        yield url


def _by_document(url: str, folder: Path) -> Part:
    report = folder / "report.json"

    def part(number: int, left: float) -> int:
        seconds = str(max(1, round(min(PART_SECONDS, left))))
        length = ("--seed", str(number), "--max-time", seconds, "--generation-database", "none")
        done = schemathesis_cli.run(url, folder, *length, *WHOLE, "--report-json-path", str(report))
        if done.returncode != 0:
            raise Found(done.stdout + done.stderr)
        return int(json.loads(report.read_text(encoding="utf-8"))["test_cases"]["generated"])

    return part


def _by_mutation(url: str) -> Part:
    one_each = httpx.Limits(max_keepalive_connections=0)  # the server closes a connection after a 500
    client = httpx.Client(base_url=url, timeout=PATIENCE, limits=one_each)
    known = examples(client.get("/openapi.json").json())
    kept = _examples(MUTATED)

    def part(number: int, _left: float) -> int:
        sent = 0

        @seed(number)
        @kept
        @given(request=requests(known))
        def send(request: tuple[str, bytes]) -> None:
            nonlocal sent
            sent += 1
            path, body = request
            try:
                check(client.post(path, content=body, headers=JSON))
            except (AssertionError, ValueError, httpx.TransportError) as error:
                raise Found(f"{error!r}\n{as_curl(url, path, body)}") from error

        send()
        return sent

    return part


def _by_reading() -> Iterator[Part]:
    for name, (source, checked) in PROPERTIES.items():
        yield partial(_read, name, source, checked)


def _read(name: str, source: SearchStrategy[Any], checked: Callable[[Any], None], number: int, _left: float) -> int:
    @seed(number)
    @_examples(READ)
    @given(found=source)
    def holds(found: Any) -> None:
        try:
            check_in_time(checked, found)
        except Exception as error:
            raise Found(f"{name}: {error!r}\n{found!r}") from error

    holds()
    return READ


def _examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


if __name__ == "__main__":
    typer.run(main)
