"""What a profile's check on long texts found, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from steering_vectors.profiles.metadata import LongTextCheck, LongTextPoint, faults_beyond, range_text


def check_sentences(check: LongTextCheck, safe_range: tuple[float, float]) -> Iterator[str]:
    """The result of a check: whether it made the safe range smaller and why, and what it could not tell."""
    short, length = check["short_range"], f"texts of up to {check['tokens']} tokens"
    low, high = safe_range
    if min(-low, high) < short:
        yield (
            f"the safe range is {range_text(safe_range)} and not ±{short:g}, which short texts allow, because of "
            f"{length} ({check['texts']} at each strength): {'; '.join(_reasons(check, safe_range))}"
        )
    else:
        yield f"the safe range holds for {length} ({check['texts']} at each strength)"
    if not check["tells_endings"]:
        ended = unsteered_point(check)["ended"]
        yield (
            f"the unsteered model ends {f'only {ended:.0%}' if ended else 'none'} of these texts by itself, so they do "
            "not tell whether steered texts end; a chat model's may with a larger --text-tokens"
        )


def unsteered_point(check: LongTextCheck) -> LongTextPoint:
    return next(point for point in check["points"] if point["strength"] == 0)


def _reasons(check: LongTextCheck, safe_range: tuple[float, float]) -> Iterator[str]:
    unsteered = unsteered_point(check)
    for point in faults_beyond(check, safe_range):
        described = {
            "perplexity": f"perplexity is {point['perplexity']:.3g} ({unsteered['perplexity']:.3g} unsteered)",
            "endings": f"{point['ended']:.0%} end by themselves ({unsteered['ended']:.0%} unsteered)",
            "repetition": f"{point['repeating']:.0%} repeat or run into an endless word "
            f"({unsteered['repeating']:.0%} unsteered)",
        }
        yield f"at {point['strength']:+g}, " + " and ".join(described[fault] for fault in point["faults"])
