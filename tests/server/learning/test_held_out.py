"""The split by hashes: what is held out stays so, whatever comes later."""

from __future__ import annotations

from server.learning.held_out import is_held_out, pair_key, prompt_key
from steering_vectors.data.chat import Example, Message

KEYS = [prompt_key(f"question {number}") for number in range(4000)]


def test_a_fraction_of_prompts_is_held_out_and_a_larger_one_keeps_them() -> None:
    small, large = ({key for key in KEYS if is_held_out(key, fraction)} for fraction in (0.2, 0.3))
    assert abs(len(small) - 800) < 130  # five standard deviations
    assert abs(len(large) - 1200) < 150
    assert small < large


def test_known_prompts_have_known_sides() -> None:
    """Values of the first version: a change would let fits see what was held out before."""
    sides = [
        is_held_out(prompt_key(text), 0.3) for text in ("How do I bake bread?", "Bread is", "Tea", "Rain", "é\ud800")
    ]
    assert sides == KNOWN


def test_the_same_question_is_one_prompt_as_text_and_as_a_message() -> None:
    asked = (Message("user", "Tea?"),)
    assert prompt_key("Tea?") == prompt_key(asked)
    assert len({prompt_key("Tea?"), prompt_key((Message("system", "Tea?"),)), prompt_key((*asked, *asked))}) == 3


def test_rows_without_a_prompt_are_split_by_their_texts() -> None:
    one, other = Example(None, "a"), Example(None, "b")
    assert pair_key(one, other) == pair_key(other, one) != pair_key(one, Example(None, "c"))
    assert pair_key(Example("p", "a"), Example("p", "b")) == prompt_key("p")


KNOWN = [True, True, True, False, True]
