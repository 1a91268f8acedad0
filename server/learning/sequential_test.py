"""A sequential test of a difference between two success rates, which may be looked at after every outcome.

The outcomes of either version are Bernoulli with rates p (candidate) and q (baseline). With s successes and f failures
of each, and B the beta function,

    M(p, q) = Π over versions of B(½ + s, ½ + f) / (B(½, ½) · rate^s · (1 − rate)^f)

is a test martingale under the true rates: the mixture of likelihood ratios over Jeffreys' prior (Robbins, "Statistical
methods related to the law of the iterated logarithm", Annals of Mathematical Statistics 41, 1970). By Ville's
inequality, it ever reaches 1/α with probability at most α. So the differences d for which min over p − q = d of M(p, q)
is below 1/α are a confidence sequence for p − q: the chance that it ever leaves out the truth is at most α, whenever
one looks, stops or goes on (Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic
confidence sequences", Annals of Statistics 49, 2021, arXiv:1810.08240). Nothing is approximate, for any numbers of
outcomes and any share of the candidate, also one that changes, as long as it does not depend on outcomes to come.

Pairs of an answer of either version are a third stream, with a factor of the same form: a version that wins w of the
pairs is ahead by 2w − 1. Evidence of independent streams multiplies, so both kinds of feedback count in one test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq, minimize_scalar
from scipy.special import betaln, xlog1py, xlogy

PRIOR = 0.5  # both parameters of the beta distribution
CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What was counted of one version."""

    successes: int = 0
    failures: int = 0

    @property
    def count(self) -> int:
        return self.successes + self.failures

    @property
    def rate(self) -> float:
        """The share of successes; ½ without outcomes."""
        return self.successes / self.count if self.count else 0.5


def log_evidence(candidate: Outcomes, baseline: Outcomes, difference: float = 0.0) -> float:
    """log of the evidence against the candidate's rate being the baseline's plus `difference`, which lies in [−1, 1].

    It is the smallest log M(p, q) over p − q = difference. Its exponential has an expectation of at most 1 at every
    stopping time if the difference is true.
    """
    mixture = sum(betaln(PRIOR + one.successes, PRIOR + one.failures) for one in (candidate, baseline))
    return float(mixture - 2 * betaln(PRIOR, PRIOR)) - _largest_log_likelihood(candidate, baseline, difference)


@dataclass(frozen=True, slots=True)
class Seen:
    """The outcomes of both versions, and of pairs of their answers: the candidate's wins and losses."""

    candidate: Outcomes = Outcomes()
    baseline: Outcomes = Outcomes()
    pairs: Outcomes = Outcomes()

    @property
    def count(self) -> int:
        return self.candidate.count + self.baseline.count + self.pairs.count


def log_evidence_against_at_least(seen: Seen, difference: float) -> float:
    """log of the evidence against "the candidate is ahead by at least `difference`, in rates and in pairs"."""
    rates = max(difference, seen.candidate.rate - seen.baseline.rate)
    pairs = max(difference, 2 * seen.pairs.rate - 1)
    return log_evidence(seen.candidate, seen.baseline, rates) + log_evidence_of_pairs(seen.pairs, pairs)


def log_evidence_against_at_most(seen: Seen, difference: float) -> float:
    """log of the evidence against "the candidate is ahead by at most `difference`, in rates and in pairs"."""
    mirrored = Seen(seen.baseline, seen.candidate, Outcomes(seen.pairs.failures, seen.pairs.successes))
    return log_evidence_against_at_least(mirrored, -difference)


def log_evidence_of_pairs(pairs: Outcomes, difference: float = 0.0) -> float:
    """log of the evidence against the candidate winning (1 + difference) ÷ 2 of the pairs."""
    rate = (1 + difference) / 2
    mixture = betaln(PRIOR + pairs.successes, PRIOR + pairs.failures) - betaln(PRIOR, PRIOR)
    return float(mixture - xlogy(pairs.successes, rate) - xlog1py(pairs.failures, -rate))


def always_valid_p(candidate: Outcomes, baseline: Outcomes, difference: float = 0.0) -> float:
    """A p-value of "the rates differ by `difference`" that holds at every stopping time."""
    return math.exp(min(0.0, -log_evidence(candidate, baseline, difference)))


def difference_interval(candidate: Outcomes, baseline: Outcomes, alpha: float = 0.05) -> tuple[float, float]:
    """The differences of the rates that the outcomes do not speak against: a 1 − alpha confidence sequence."""
    threshold, middle = math.log(1 / alpha), candidate.rate - baseline.rate

    def excess(difference: float) -> float:
        return log_evidence(candidate, baseline, difference) - threshold

    ends = [end if excess(end) <= 0 else float(brentq(excess, *sorted((end, middle)))) for end in (-1.0, 1.0)]
    return ends[0], ends[1]


def _largest_log_likelihood(candidate: Outcomes, baseline: Outcomes, difference: float) -> float:
    """The largest log-likelihood of the outcomes over baseline rates q, where the candidate's is q + difference."""

    def log_likelihood(rate: float) -> float:
        other = min(max(rate + difference, 0.0), 1.0)
        terms = (
            xlogy(candidate.successes, other) + xlog1py(candidate.failures, -other),
            xlogy(baseline.successes, rate) + xlog1py(baseline.failures, -rate),
        )
        return float(sum(terms))

    if difference == 0:
        both = Outcomes(candidate.successes + baseline.successes, candidate.failures + baseline.failures)
        return log_likelihood(both.rate)
    low, high = max(0.0, -difference), min(1.0, 1.0 - difference)
    ends = max(log_likelihood(low), log_likelihood(high))
    if high - low < CLOSE:
        return ends
    found = minimize_scalar(
        lambda rate: -log_likelihood(rate), bounds=(low, high), method="bounded", options={"xatol": CLOSE}
    )
    return max(ends, -float(found.fun))
