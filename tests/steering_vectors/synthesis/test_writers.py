"""Texts that the loaded model writes do not depend on what else is written, and equal those of the steered model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.errors import DataError, FitError, ProfileError, SteeringError
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.writers import Ask, Length, LocalWriter, Voice, parse_steering, seed_of, stored_texts
from tests.support.serving import random_profile

SHORT = Length(tokens=8, temperature=0.7)
ASKS = [
    Ask((Message("user", "How do I make tea?"),), Voice("Be kind."), 1),
    Ask((Message("user", "Help me."),), Voice(steering="one@0.5+two@-0.25"), 2),
    Ask((Message("user", "How do I make tea?"),), seed=3),
    Ask((Message("user", "Help me."),), Voice(steering="one@0.5+two@-0.25"), 4),
]


@pytest.fixture(scope="module")
def writer(demo: LanguageModel) -> LocalWriter:
    profiles = [random_profile(demo.identity, name, seed=seed, unit=0.5) for seed, name in enumerate(("one", "two"))]
    return LocalWriter(demo, {one.name: one for one in profiles})


def test_texts_are_those_of_the_steered_model(demo: LanguageModel, writer: LocalWriter) -> None:
    together = list(writer.write(ASKS, SHORT))
    assert [next(writer.write([ask], SHORT)) for ask in ASKS] == together
    profiles = [random_profile(demo.identity, name, seed=seed, unit=0.5) for seed, name in enumerate(("one", "two"))]
    prompt = encode_prompt(demo.tokenizer, ASKS[1].messages)
    uniforms = torch.rand(SHORT.tokens, generator=torch.Generator().manual_seed(2)).unsqueeze(0)
    with steerable(demo) as steered:
        steered.steer(Mixture((Term(profiles[0], 0.5), Term(profiles[1], -0.25))))
        (ids,) = steered.draw_texts([prompt], uniforms, temperature=SHORT.temperature)
    expected = demo.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert together[1].text == expected
    unsteered = next(writer.write([Ask(ASKS[1].messages, seed=2)], SHORT))
    assert unsteered.text != together[1].text


def test_what_cannot_be_written(writer: LocalWriter) -> None:
    tea = (Message("user", "How do I make tea?"),)
    with pytest.raises(ProfileError, match="names 'three', which is not loaded"):
        list(writer.write([Ask(tea, Voice(steering="three"))], SHORT))
    with pytest.raises(SteeringError, match="one"):
        list(writer.write([Ask(tea, Voice(steering="one@1e6"))], SHORT))
    with pytest.raises(DataError, match="but the model's context holds 512"):
        list(writer.write([Ask((Message("user", "tea " * 600),))], SHORT))
    assert list(writer.write([], SHORT)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ()),
        ("warm", (("warm", 1.0),)),
        ("warm@0.8+polite@-0.3", (("warm", 0.8), ("polite", -0.3))),
        (" a-b.c @ 2 + d ", (("a-b.c", 2.0), ("d", 1.0))),
        ("warm@1e-1", (("warm", 0.1),)),
    ],
)
def test_steerings(text: str, found: tuple[tuple[str, float], ...]) -> None:
    assert parse_steering(text) == found


@pytest.mark.parametrize("text", ["warm@", "@1", "warm@x", "warm 0.8", "warm@1..2", "+"])
def test_steerings_that_are_none(text: str) -> None:
    with pytest.raises(FitError, match="is no steering such as"):
        Voice(steering=text)


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 1), (1, 0), (1, 2.1), (1, float("nan"))])
def test_lengths_that_cannot_be_used(tokens: int, temperature: float) -> None:
    with pytest.raises(FitError, match="must be"):
        Length(tokens, temperature)


def test_texts_are_stored_and_an_edited_one_stays(writer: LocalWriter, tmp_path: Path) -> None:
    folder, steps = Folder(tmp_path), list[tuple[int, int]]()
    wanted = [({"number": number}, ask) for number, ask in enumerate(ASKS)]

    def stored(length: Length = SHORT, count: int = 4) -> list[str]:
        rows = stored_texts(
            folder,
            "texts.jsonl",
            wanted[:count],
            writer,
            length,
            lambda _, done, total, detail="": steps.append((done, total)),
            "texts",
        )
        return [row["text"] for row in rows]

    first = stored(count=2)
    assert steps == [(1, 2), (2, 2)]
    assert stored()[:2] == first
    assert steps[2:] == [(3, 4), (4, 4)]
    rows = folder.rows("texts.jsonl")
    folder.write("texts.jsonl", [{**rows[0], "text": "Edited."}, *rows[1:]])
    assert stored()[0] == "Edited."
    assert stored(Length(4, 0.7))[0] != "Edited."
    assert len(folder.rows("texts.jsonl")) == 8
    folder.write("texts.jsonl", [{**rows[0], "text": None}, *rows[1:]])
    with pytest.raises(DataError, match="has no text: correct or delete it"):
        stored()


def test_seeds_depend_on_every_part() -> None:
    assert len({seed_of("a", 0), seed_of("a", 1), seed_of("b", 0)}) == 3
    assert 0 <= seed_of("a") < 2**31
