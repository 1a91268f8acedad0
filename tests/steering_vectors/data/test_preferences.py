"""Preference data in memory: both sides, and splits that share no prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from steering_vectors.data.chat import Example, Message
from steering_vectors.data.preferences import Kind, Preferences
from steering_vectors.errors import DataError


def paired(prompts: list[str | None], kind: Kind = "preference") -> Preferences:
    return Preferences(
        kind=kind,
        positives=tuple(Example(prompt, f"good {row}") for row, prompt in enumerate(prompts)),
        negatives=tuple(Example(prompt, f"bad {row}") for row, prompt in enumerate(prompts)),
        source="pairs.jsonl",
    )


def unpaired(positives: list[Example], negatives: list[Example]) -> Preferences:
    return Preferences(kind="unpaired", positives=tuple(positives), negatives=tuple(negatives), source="rows.jsonl")


def examples(preferences: Preferences) -> set[Example]:
    return {example for side in preferences.sides() for example in side}


def prompts_of(preferences: Preferences) -> set[object]:
    return {example.prompt for example in examples(preferences)}


def test_sides_of_pairs_are_aligned() -> None:
    preferences = paired(["a", "b"])
    positives, negatives = preferences.sides()
    assert list(zip(positives, negatives, strict=True)) == preferences.pairs()
    assert preferences.paired
    assert preferences.rows == 2


def test_unpaired_data_has_no_pairs() -> None:
    preferences = unpaired([Example(None, "x")], [Example(None, "y"), Example(None, "z")])
    assert preferences.rows == 3
    with pytest.raises(DataError, match=r"rows.jsonl: the rows are not paired; use a method that takes unpaired data"):
        preferences.pairs()


def test_duplicates_are_rows_that_repeat_an_earlier_one() -> None:
    one, two = Example("p", "good"), Example("p", "bad")
    assert Preferences("preference", positives=(one, one, two), negatives=(two, two, one)).duplicates == 1
    assert unpaired([one, one], [one]).duplicates == 1


def test_a_split_loses_and_repeats_nothing() -> None:
    preferences = paired([f"prompt {row % 40}" for row in range(100)])
    train, heldout = preferences.split(0.2, seed=1)
    assert train.rows + heldout.rows == 100
    assert sorted(train.pairs() + heldout.pairs(), key=str) == sorted(preferences.pairs(), key=str)


def test_a_split_has_the_wanted_size() -> None:
    _, heldout = paired([f"prompt {row}" for row in range(100)]).split(0.2)
    assert heldout.rows == 20


def test_a_split_keeps_the_order_of_the_file() -> None:
    preferences = paired([f"prompt {row}" for row in range(30)])
    train, _ = preferences.split()
    assert train.pairs() == [pair for pair in preferences.pairs() if pair in train.pairs()]


def test_held_out_prompts_are_not_trained_on() -> None:
    train, heldout = paired([f"prompt {row % 12}" for row in range(60)]).split(0.3, seed=4)
    assert not prompts_of(train) & prompts_of(heldout)


def test_held_out_texts_without_prompt_are_not_trained_on() -> None:
    rows = [(f"good {row // 2}", f"bad {(row + 1) // 2 if row % 4 else row}") for row in range(60)]
    preferences = Preferences(
        kind="contrast",
        positives=tuple(Example(None, good) for good, _ in rows),
        negatives=tuple(Example(None, bad) for _, bad in rows),
    )
    train, heldout = preferences.split()
    assert not examples(train) & examples(heldout)


def test_contrasting_prompts_of_one_row_stay_together() -> None:
    kind, rude = (tuple((Message("user", f"{how} {row}"),) for row in range(20)) for how in ("kindly", "rudely"))
    preferences = Preferences(
        kind="contrast",
        positives=tuple(Example(prompt, "yes") for prompt in kind),
        negatives=tuple(Example(prompt, "no") for prompt in rude),
    )
    train, heldout = preferences.split()
    assert not prompts_of(train) & prompts_of(heldout)
    assert [pair[0].prompt[0].content[-1] for pair in heldout.pairs()] == [  # type: ignore[index, union-attr]
        pair[1].prompt[0].content[-1]  # type: ignore[index, union-attr]
        for pair in heldout.pairs()
    ]


def test_one_seed_gives_one_split() -> None:
    preferences = paired([f"prompt {row}" for row in range(50)])
    assert preferences.split(seed=3) == preferences.split(seed=3)
    assert preferences.split(seed=3) != preferences.split(seed=4)


def test_sixteen_rows_still_hold_out_four() -> None:
    train, heldout = paired([f"prompt {row}" for row in range(16)]).split(0.01)
    assert (train.rows, heldout.rows) == (12, 4)


def test_four_held_out_rows_can_be_split_again() -> None:
    _, heldout = paired([f"prompt {row}" for row in range(16)]).split()
    assert [part.rows for part in heldout.split(0.5, min_side=2)] == [2, 2]


def test_both_labels_are_on_both_sides() -> None:
    positives = [Example(None, f"good {row}") for row in range(8)]
    negatives = [Example(None, f"bad {row}") for row in range(200)]
    train, heldout = unpaired(positives, negatives).split(0.2)
    assert (len(heldout.positives), len(heldout.negatives)) == (4, 40)
    assert (len(train.positives), len(train.negatives)) == (4, 160)


def test_labels_that_share_a_prompt_stay_together() -> None:
    positives = [Example(f"prompt {row}", "good") for row in range(20)]
    negatives = [Example(f"prompt {row}", "bad") for row in range(20)]
    train, heldout = unpaired(positives, negatives).split()
    assert not prompts_of(train) & prompts_of(heldout)


def test_two_large_groups_are_one_for_each_side() -> None:
    train, heldout = paired(["a"] * 8 + ["b"] * 8).split()
    assert (train.rows, heldout.rows) == (8, 8)


@pytest.mark.parametrize("prompts", [["same"] * 30, ["same"] * 28 + ["other"] * 2])
def test_with_too_few_prompts_rows_are_parted_by_completion(prompts: list[str]) -> None:
    positives = [Example(prompt, f"good {row // 2}") for row, prompt in enumerate(prompts)]
    negatives = [Example(prompt, f"bad {row // 2}") for row, prompt in enumerate(prompts)]
    for part in (
        replace(paired([]), positives=tuple(positives), negatives=tuple(negatives)),
        unpaired(positives, negatives),
    ):
        train, heldout = part.split()
        assert train.shares_prompts(heldout)
        texts = [{one.completion for one in (*half.positives, *half.negatives)} for half in (train, heldout)]
        assert not texts[0] & texts[1]
        assert heldout.rows == 6 if part.paired else 12
    apart = paired([f"prompt {row}" for row in range(16)]).split()
    assert not apart[0].shares_prompts(apart[1])
    assert not unpaired([Example(None, "a")], []).shares_prompts(unpaired([Example(None, "b")], []))


def test_one_row_for_all_cannot_be_split() -> None:
    with pytest.raises(DataError) as caught:
        replace(paired([]), positives=(Example("same", "good"),) * 30, negatives=(Example("same", "bad"),) * 30).split()
    assert str(caught.value) == (
        "pairs.jsonl: there are too few different prompts or texts to hold out 4 rows and train on as many; "
        "add rows with other prompts"
    )


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_an_invalid_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="the held-out fraction must be between 0 and 1"):
        paired(["a"] * 20).split(fraction)


def test_parts_keep_the_provenance() -> None:
    preferences = Preferences(
        kind="preference",
        positives=tuple(Example(str(row), "good") for row in range(16)),
        negatives=tuple(Example(str(row), "bad") for row in range(16)),
        source="x.csv",
        sha256="0" * 64,
        ignored_columns=("id",),
    )
    assert {(p.source, p.sha256, p.ignored_columns) for p in preferences.split()} == {("x.csv", "0" * 64, ("id",))}
