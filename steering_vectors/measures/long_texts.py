"""Texts of deployment length at several strengths, beside the unsteered model's: cost, endings and repetition.

The unit and the curve are measured on short texts. What a shift does to a text adds up, so texts that begin well may
never end, repeat themselves or run into an endless word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from steering_vectors.measures.curve import PERPLEXITY_BOUND
from steering_vectors.measures.sampling import Sampled
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.models.limits import eos_ids
from steering_vectors.profiles.metadata import LongTextPoint, PositionCost
from steering_vectors.profiles.profile import Profile

DEFAULT_TEXT_TOKENS = 160
LONG_TEXTS = 16  # at each strength
COMPARED_TEXTS = 4  # of these, which the unsteered model reads too
BOUNDARIES = (0, 48, 256, 1024)  # of the bins of positions
TAIL = 64  # tokens at the end of a text in which repetition is looked for
NGRAM = 4
REPEATED = 0.5  # share of n-grams in the tail that occurred before
ENDLESS = 60  # characters of a word
SMALL_GAP = 0.2  # between strengths, in the search for the safe range
ALLOWANCE = 0.1  # of the shares of texts that end and that repeat

# The scripts of Chinese, Japanese, Thai, Lao, Burmese and Khmer, which put no space between words, are left out.
_WORD = re.compile(r"[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]+")


def measure_long_texts(
    steered: SteeredModel,
    profile: Profile,
    strengths: Sequence[float],
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    seed: int,
    compared: int | None = None,
) -> list[LongTextPoint]:
    """Sample texts of up to `tokens` tokens after the prompts at each strength, with the same random numbers, and
    measure them. The unsteered model reads the first `compared` of each strength, or all."""
    ends, decode, points = eos_ids(steered.lm), steered.lm.tokenizer.decode, []
    sampled = steered.sample_and_compare(
        profile, strengths, prompts, tokens=tokens, seed=seed, compared=compared, read=profile.layers
    )
    for strength, found in zip(strengths, sampled, strict=True):
        whole, *positions = (_cost(found, *span) for span in ((0, tokens), *_spans(tokens)))
        points.append(
            LongTextPoint(
                strength=strength,
                kl=whole["kl"],
                perplexity=whole["perplexity"],
                ended=_share(bool(text) and text[-1] in ends for text in found.texts),
                repeating=_share(is_repeating(text) or is_endless(text, decode) for text in found.texts),
                shift_ratio=_shift_ratio(profile, strength, found),
                positions=[one for one in positions if one["tokens"]],
            )
        )
    return points


def _spans(tokens: int) -> Iterable[tuple[int, int]]:
    return pairwise([*(one for one in BOUNDARIES if one < tokens), tokens])


def _shift_ratio(profile: Profile, strength: float, found: Sampled) -> float:
    assert found.norms is not None
    pairs = zip(profile.shift_norms().values(), found.norms, strict=True)
    return abs(strength) * max(shift / max(float(norm), 1e-12) for shift, norm in pairs)


def _cost(found: Sampled, start: int, end: int) -> PositionCost:
    """KL and perplexity of the tokens from `start` up to `end` of each text that was compared."""
    count = sum(len(text[start:end]) for text in found.texts[: len(found.token_likelihoods)])
    kl = float(found.token_divergences[:, start:end].sum()) / max(count, 1)
    loss = -float(found.token_likelihoods[:, start:end].sum()) / max(count, 1)
    return {"start": start, "end": end, "tokens": count, "kl": kl, "perplexity": math.exp(min(loss, 700.0))}


def _share(marks: Iterable[bool]) -> float:
    counted = list(marks)
    return sum(counted) / max(len(counted), 1)


def repeated_share(ids: Sequence[int]) -> float:
    """The share of 4-grams that occurred before: seq-rep-4 of Welleck et al. (arXiv:1908.04319). 0 for fewer tokens."""
    grams = [tuple(ids[place : place + NGRAM]) for place in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_repeating(text: Sequence[int]) -> bool:
    """Whether more than half of the 4-grams in a text's last 64 tokens occurred before among these tokens."""
    return repeated_share(text[-TAIL:]) > REPEATED


def is_endless(text: Sequence[int], decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether a text's last 64 tokens have a run of more than 60 characters without white space, outside of scripts
    that put no space between words."""
    return max(map(len, _WORD.findall(decode(text[-TAIL:]))), default=0) > ENDLESS


def faults(point: LongTextPoint, unsteered: LongTextPoint, *, texts: int, bound: float = PERPLEXITY_BOUND) -> list[str]:
    """What makes a strength unsafe for long texts, of `perplexity`, `endings` and `repetition`.

    - `perplexity`: it exceeds `bound` times the unsteered one.
    - `endings`: the share of texts that end by themselves is more than 10 points below the unsteered one. As shares of
      few texts are uncertain, their difference must exceed this by a standard error.
    - `repetition`: the share of texts that repeat, or run into an endless word, is more than twice the unsteered one
      and more than 10 points above it.

    If few of the unsteered texts end, a lack of endings is no fault (see `tells_endings`).
    """
    repeats = max(2 * unsteered["repeating"], unsteered["repeating"] + ALLOWANCE)
    found = {
        "perplexity": point["perplexity"] > bound * unsteered["perplexity"],
        "endings": _fewer(point["ended"], unsteered["ended"], texts),
        "repetition": point["repeating"] > repeats,
    }
    return [name for name, present in found.items() if present]


def tells_endings(unsteered: LongTextPoint, *, texts: int) -> bool:
    """Whether a strength at which no text ends would have that fault. It would not if the unsteered model never ends
    its texts, or almost never, as base models do."""
    return _fewer(0.0, unsteered["ended"], texts)


def _fewer(share: float, before: float, texts: int) -> bool:
    error = math.sqrt((share * (1 - share) + before * (1 - before)) / max(texts, 1))
    return before - share > ALLOWANCE + error


def safe_range(
    measure: Callable[[Sequence[float]], list[LongTextPoint]],
    widest: float,
    *,
    texts: int,
    bound: float = PERPLEXITY_BOUND,
) -> tuple[tuple[float, float], list[LongTextPoint]]:
    """The least and the largest strength, of those tried within ±`widest`, that have no `faults`; and all points with
    their faults, ascending. An end is 0 if every magnitude of its sign has one.

    Both ends are tried first, and ±1 if it lies within them. While an end has faults, the middle between it and the
    largest magnitude below it without faults is tried, rounded down to a tenth, until the gap between the two is at
    most half of the latter, or 0.2.
    """
    points = measure([0.0, *(sign * size for size in sorted({widest, min(1.0, widest)}) for sign in (-1, 1))])
    unsteered, found = points[0], points[1:]

    def ends(sign: int) -> tuple[float, float | None]:
        """The largest magnitude below all that have faults, and the least one that has some."""
        tried = {sign * one["strength"]: one["faults"] for one in points if sign * one["strength"] > 0}
        bad = min((size for size, wrong in tried.items() if wrong), default=None)
        return max((size for size in tried if bad is None or size < bad), default=0.0), bad

    while found:
        for one in found:
            one["faults"] = faults(one, unsteered, texts=texts, bound=bound)
        trials = []
        for sign in (-1, 1):
            good, bad = ends(sign)
            if bad is not None and bad - good > max(good / 2, SMALL_GAP) + 1e-9:
                trials.append(sign * _tenth((good + bad) / 2))
        found = measure(trials) if trials else []
        points += found
    return (-ends(-1)[0], ends(1)[0]), sorted(points, key=lambda point: point["strength"])


def _tenth(magnitude: float) -> float:
    return math.floor(10 * magnitude + 1e-9) / 10
