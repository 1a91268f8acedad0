"""Exports: TRL's formats are what `trimtab fit` reads, and a raw export comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.feedback import queries
from server.feedback.database import Database
from server.feedback.items import Filter, Item, Subject
from steering_vectors import FitSettings, fit, load_pairs
from steering_vectors.errors import TrimtabError
from steering_vectors.models.loading import LanguageModel
from tests.server.feedback.conftest import address
from tests.support import feedback_rows

pytestmark = pytest.mark.slow

TOPICS = ("bread", "tea", "rain", "trains", "books", "cats", "music", "maps", "soup", "snow", "bikes", "lamps")


def votes(messages: bool) -> list[Item]:
    """Pairs in which the warm answer is better, and edits that make a cold one warm."""
    items = []
    for place, topic in enumerate(TOPICS * 2):
        asked = f"Tell me about {topic}, number {place}."
        prompt: Any = [{"role": "user", "content": asked}] if messages else asked
        warm, cold = Subject("a", text=f"Gladly, dear friend: {topic}!"), Subject("b", text=f"No. {topic}.")
        if place % 3 == 2:
            items.append(Item("edit", {"corrected": warm.text}, (cold,), prompt, "u"))
        else:
            pair = (warm, cold) if place % 2 else (cold, warm)
            items.append(Item("pair", {"better": "a" if place % 2 else "b"}, pair, prompt, "u", f"k{place}"))
    return items


def add(database: Database, items: list[Item]) -> None:
    feedback_rows.add(database, *items, now=100.0)


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["feedback", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("messages", [False, True])
def test_an_export_can_be_fitted(database: Database, tmp_path: Path, demo: LanguageModel, messages: bool) -> None:
    add(database, votes(messages))
    add(database, [Item("pair", {"better": "tie"}, (Subject("a", text="x"), Subject("b", text="y")), "p")])
    add(database, [Item("comment", {"comment": "c"}, (Subject("answer", text="x"),), "p")])
    out = tmp_path / "pairs.jsonl"
    found = run("export", "--feedback-database", address(database), "--out", str(out))
    assert (found["rows"], found["left_out"]) == (24, {"a tie": 1, "comment: no preference row": 1})
    first = lines(out)[0]
    assert list(first) == ["prompt", "chosen", "rejected"]
    chosen = first["chosen"][0]["content"] if messages else first["chosen"]
    assert chosen == "Gladly, dear friend: bread!"
    pairs = load_pairs(out)
    assert pairs.kind == "preference"
    profile = fit(demo, pairs, FitSettings(name="warm", layers="5", calibrate=False, text_tokens=0))
    assert profile.data["rows"] == 24


def test_thumbs_and_ratings_are_unpaired_rows(database: Database, tmp_path: Path) -> None:
    answer = (Subject("answer", text="x"),)
    add(database, [Item("thumb", {"thumb": "up" if n % 2 else "down"}, answer, f"p{n}") for n in range(12)])
    add(database, [Item("rating", {"rating": n, "min": 1, "max": 7}, answer, f"q{n}") for n in range(1, 8)])
    out = tmp_path / "rows.jsonl"
    found = run("export", "--feedback-database", address(database), "--rows", "unpaired", "--out", str(out))
    assert (found["rows"], found["left_out"]) == (18, {"the middle of the scale": 1})
    assert lines(out)[0] == {"prompt": "p0", "completion": "x", "label": False}
    assert [row["label"] for row in lines(out)[12:]] == [False, False, False, True, True, True]
    assert load_pairs(out).kind == "unpaired"


def test_a_raw_export_comes_back_as_it_was(database: Database, tmp_path: Path) -> None:
    add(database, votes(messages=True))
    out, copy = tmp_path / "all.jsonl", str(tmp_path / "copy.db")
    assert run("export", "--feedback-database", address(database), "--format", "raw", "--out", str(out))["rows"] == 24
    assert run("import", str(out), "--feedback-database", copy) == {"added": 24, "known": 0, "deleted_user": 0}
    assert run("import", str(out), "--feedback-database", copy) == {"added": 0, "known": 24, "deleted_user": 0}
    again = tmp_path / "again.jsonl"
    run("export", "--feedback-database", copy, "--format", "raw", "--out", str(again))
    assert again.read_bytes() == out.read_bytes()
    assert run("delete", "--feedback-database", copy, "--user", "u") == {
        "feedback": 24,
        "about_user": 0,
        "generations": 0,
    }
    assert run("import", str(out), "--feedback-database", copy) == {"added": 0, "known": 0, "deleted_user": 24}


def test_rows_of_trl_are_imported_once(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "trl.jsonl"
    chat = [{"role": "user", "content": "Tea?"}]
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": chat, "completion": [{"role": "assistant", "content": "Yes."}], "label": False},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert run("import", str(file), "--feedback-database", address(database))["added"] == 2
    assert run("import", str(file), "--feedback-database", address(database))["known"] == 2
    with database.reading() as connection:
        pair, thumb = queries.everything(connection, Filter())
    assert (pair.kind, pair.value, [answer["text"] for answer in pair.answers]) == ("pair", {"better": "a"}, ["a", "b"])
    assert (thumb.kind, thumb.value, thumb.answers) == ("thumb", {"thumb": "down"}, [{"prompt": chat, "text": "Yes."}])


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}\n')
    arguments = ["feedback", "import", str(file), "--feedback-database", str(tmp_path / "f.db")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, TrimtabError)
    assert str(done.exception).startswith(f"{file}, line 2: it is not a row of `trimtab feedback export`")
