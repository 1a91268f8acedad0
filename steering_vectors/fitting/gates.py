"""Fitting a gate: from labelled prompts to the block, threshold and side that separate them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import PurePath

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.cells import read_label
from steering_vectors.data.chat import Prompt, encode_prompt
from steering_vectors.data.records import PROMPT, SYSTEM, read_prompt
from steering_vectors.data.tables import BadRow, TableRow, read_table
from steering_vectors.errors import DataError, FitError, RequestError
from steering_vectors.fitting.layers import candidate_layers
from steering_vectors.measures.activations import pooled
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.gate import SIDES, Gate, similarities
from steering_vectors.profiles.metadata import GateMetrics
from steering_vectors.progress import Progress

MIN_PROMPTS = 8  # of either label
HELDOUT = 0.25
TIE = 0.02  # of F1
LABEL = "label"


@dataclass(frozen=True, slots=True)
class GatePrompts:
    """Prompts that open a gate, and others that do not. Raises DataError for fewer than 8 of either.

    `lines` holds the line of each in `source`, first of those that open it.
    """

    opening: tuple[Prompt, ...]
    others: tuple[Prompt, ...]
    source: str = ""
    sha256: str = ""
    lines: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, side in (("true", self.opening), ("false", self.others)):
            if len(side) < MIN_PROMPTS:
                raise DataError(
                    f"there are {len(side)} prompts with label {name}; a gate needs at least {MIN_PROMPTS} of each",
                    path=self.source or None,
                )


def load_gate_prompts(path: str) -> GatePrompts:
    """Read rows of {prompt, label} from a file in any format of preference data.

    The prompt is a text or a list of messages; the label is true where the profile should steer. Raises DataError with
    path, line and field.
    """
    table = read_table(path)
    rows = sorted(((*_read(row, table.source), row.line) for row in table.rows), key=lambda row: not row[1])
    opening, others = (tuple(prompt for prompt, label, _ in rows if label is wanted) for wanted in (True, False))
    return GatePrompts(opening, others, table.source, table.sha256, tuple(line for _, _, line in rows))


def fit_gate(lm: LanguageModel, prompts: GatePrompts, *, seed: int = 0, progress: Progress | None = None) -> Gate:
    """Fit the gate with the highest F1 on three quarters of the prompts; the rest measure it (`metrics`).

    The direction is the difference of the two labels' mean block outputs h̄. Candidate thresholds lie midway between
    neighbouring similarities. Among thresholds whose F1 is within 0.02 of the best, the one nearest to the middle
    between both labels is taken, because it generalises better. Among equally good blocks, the one that separates the
    labels by most standard deviations is taken. Paper: conditional activation steering (CAST, arXiv:2409.05907).

    Raises DataError for a prompt of fewer than two tokens, FitError if no block separates the labels.
    """
    layers = candidate_layers(lm.num_layers)
    examples = [_encode(lm, prompts, number) for number in range(len(prompts.opening) + len(prompts.others))]
    labels = torch.tensor([True] * len(prompts.opening) + [False] * len(prompts.others))
    means = torch.zeros(len(examples), len(layers), lm.hidden_size)
    for batch in pooled(lm, examples, layers, progress=progress, stage="gate"):
        means[list(batch.indices)] = batch.vectors.cpu()
    held = _heldout(labels, seed)
    tried = [_best(means[:, place], labels, held, layer) for place, layer in enumerate(layers)]
    _, _, gate = max(tried, key=lambda one: one[:2])
    if gate is None:
        raise FitError("no block separates the labelled prompts; check the labels")
    fired = _fired(similarities(means[:, layers.index(gate.layer)], gate.direction), gate.threshold, gate.side)
    metrics: GateMetrics = {
        "f1_train": f1_score(fired[~held], labels[~held]),
        "f1_heldout": f1_score(fired[held], labels[held]),
        "prompts": [len(prompts.opening), len(prompts.others)],
        "heldout": int(held.sum()),
        "source": PurePath(prompts.source).name,
        "sha256": prompts.sha256,
    }
    return replace(gate, metrics=metrics)


def f1_score(fired: torch.Tensor, wanted: torch.Tensor) -> float:
    """2·TP / (2·TP + FP + FN) of bool `[prompts]`."""
    hits = int((fired & wanted).sum())
    return 2 * hits / max(2 * hits + int((fired ^ wanted).sum()), 1)


def _read(row: TableRow, source: str) -> tuple[Prompt, bool]:
    try:
        if isinstance(row.cells, BadRow):
            raise row.cells
        if unknown := sorted(set(row.cells) - {PROMPT, LABEL}):
            remedy = "; write the system prompt as the first message of prompt" if unknown[0] == SYSTEM else ""
            raise BadRow(f"the rows of a gate have only the columns {PROMPT} and {LABEL}{remedy}", str(unknown[0]))
        if (prompt := read_prompt(row.cells)) is None:
            raise BadRow("it is empty" if PROMPT in row.cells else "it is missing", PROMPT)
        return prompt, read_label(row.cells)
    except BadRow as bad:
        raise DataError(bad.message, path=source, line=row.line, field=bad.field) from bad


def _encode(lm: LanguageModel, prompts: GatePrompts, number: int) -> Encoded:
    """All tokens of a prompt except the last, as a response to be pooled."""
    prompt = (*prompts.opening, *prompts.others)[number]
    try:
        ids = encode_prompt(lm.tokenizer, prompt or "")
        if len(ids) >= 2:
            return ids[:-1], 0
        problem = f"the prompt {prompt!r} has one token; a gate reads all tokens but the last"
    except RequestError as error:
        problem = f"a prompt of the gate cannot be encoded: {error.message}"
    if number < len(prompts.lines):
        raise DataError(problem, path=prompts.source, line=prompts.lines[number], field=PROMPT)
    raise DataError(problem)


def _heldout(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A quarter of either label, at least one: bool `[prompts]`."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for wanted in (True, False):
        places = (labels == wanted).nonzero().flatten().tolist()
        random.Random(f"{seed}-{wanted}").shuffle(places)
        held[places[: max(1, round(HELDOUT * len(places)))]] = True
    return held


def _best(
    means: torch.Tensor, labels: torch.Tensor, held: torch.Tensor, layer: int
) -> tuple[float, float, Gate | None]:
    """(F1, distance of the labels, gate) of one block on the prompts that are not held out."""
    train, wanted = means[~held], labels[~held]
    direction = train[wanted].mean(0) - train[~wanted].mean(0)
    if not bool(direction.any()) or not bool(direction.isfinite().all()):
        return 0.0, 0.0, None
    values = similarities(train, direction)
    ordered = values.sort().values
    tried = [
        (f1_score(_fired(values, threshold, side), wanted), threshold, side)
        for threshold in ((ordered[1:] + ordered[:-1]) / 2).tolist()
        for side in SIDES
    ]
    middle, apart = _middle(values[wanted], values[~wanted])
    best = max(f1 for f1, _, _ in tried)
    near = [one for one in tried if one[0] >= best - TIE]
    f1, threshold, side = min(near, key=lambda one: abs(one[1] - middle))
    return f1, apart, Gate(layer, direction, threshold, "above" if side == "above" else "below")


def _middle(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The point at equal distance from two samples, in standard deviations of each, and that distance."""
    first, second = one.std().clamp_min(1e-9), other.std().clamp_min(1e-9)
    middle = (one.mean() * second + other.mean() * first) / (first + second)
    return float(middle), float((one.mean() - other.mean()).abs() / (first + second))


def _fired(values: torch.Tensor, threshold: float, side: str) -> torch.Tensor:
    return values >= threshold if side == "above" else values <= threshold
