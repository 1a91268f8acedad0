"""Instructions and questions from a sentence, without a model."""

from __future__ import annotations

import pytest

from steering_vectors.errors import FitError
from steering_vectors.synthesis.templates import Trait


def test_more_and_less_are_each_others_opposite() -> None:
    more, less = (Trait(f"{word} cautious about medical advice.").instructions(5) for word in ("more", "Less"))
    assert len(more) == 5
    for one, other in zip(more, less, strict=True):
        assert (one.positive, one.negative) == (other.negative, other.positive)
    assert more[0].positive == "You are an assistant that is far more cautious about medical advice than others."


def test_a_sentence_of_another_form_and_its_opposite() -> None:
    (plain,) = Trait("speaks in rhymes").instructions(1)
    assert plain.positive == "You are an assistant with this manner: speaks in rhymes."
    assert plain.negative == "You are an assistant with this manner: the opposite of this: speaks in rhymes."
    (given,) = Trait("more cheerful", "gloomy and tired").instructions(1)
    assert given.positive == "You are an assistant with this manner: more cheerful."
    assert given.negative == "You are an assistant with this manner: gloomy and tired."


def test_questions_are_different_and_half_are_about_the_topic() -> None:
    questions = Trait("more cautious about medical advice").questions(40)
    assert len(set(questions)) == 40
    assert sum("medical advice" in one for one in questions) == 20
    everyday = Trait("kinder").questions(1000)
    assert len(set(everyday)) == len(everyday) >= 48
    assert Trait("kinder").questions(5) == everyday[:5]


def test_what_a_judge_is_asked() -> None:
    assert Trait("more  cheerful.").question == "Which answer is more cheerful?"
    assert Trait("speaks in rhymes").question == "Which answer fits this description better: speaks in rhymes?"


@pytest.mark.parametrize("sentence", ["", " ", "?!", "x" * 301])
def test_sentences_that_say_nothing(sentence: str) -> None:
    with pytest.raises(FitError, match=r"the sentence (is empty|has 301 characters)"):
        Trait(sentence)
