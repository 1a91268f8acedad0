"""What the shipped profiles do to a real chat model's replies, by judges that fitting never saw.

    python -m benchmarks.quality.shipped [NAME ...] [--texts 4] [--tokens 60] [--controls 10] [--data DIR] [--json FILE]

SmolLM2-135M-Instruct answers the prompts of a profile's judge (see benchmarks.quality.judges) several times each, at
strengths from −2 to 2. Controls at −1 and 1 are random directions with the norms of the profile's shift, and the same
directions at the strength at which they cost the profile's KL; the model under a system prompt is compared too.
KL(steered‖base) per token, the perplexity of the replies under the unsteered model, distinct pairs of words and length
are the costs; the KL of the system prompt is that of its replies from the plain model. Intervals (95 %) resample
prompts. A profile with a gate steers only prompts that open it, and so do its controls. `careful` needs the file of
XSTest in DIR.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.quality.conditions import Instructed
from benchmarks.quality.judges import JUDGES, Judge
from steering_vectors import Profile, load_model, load_profile
from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.measures.activations import pooled
from steering_vectors.measures.controls import bootstrap, random_controls
from steering_vectors.measures.sampling import Sampled
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.profiles.shipped import shipped_profiles

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
EQUAL_KL_STEPS = 2  # of bringing a random direction to the profile's KL
Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Figures:
    """One condition: the judge's mean figure with its interval, and the costs."""

    profile: str
    condition: str
    prompts: str
    figure: float
    interval: tuple[float, float]
    kl: float
    perplexity: float
    distinct: float
    words: float
    example: str


@dataclass(frozen=True, slots=True)
class Asked:
    """How replies are sampled: the prompts, replies to each, tokens of a reply, seed."""

    prompts: Sequence[Tokens]
    texts: int
    tokens: int
    seed: int

    @property
    def rows(self) -> list[Tokens]:
        return [prompt for prompt in self.prompts for _ in range(self.texts)]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Profiles; all that have a judge if none.")] = None,
    texts: Annotated[int, typer.Option(help="Replies to each prompt.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a reply, at most.")] = 60,
    controls: Annotated[int, typer.Option(help="Random directions.")] = 10,
    seed: Annotated[int, typer.Option(help="Of sampling and of the random directions.")] = 0,
    data: Annotated[Path, typer.Option(help="Folder with the public files.")] = Path(),
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    lm = load_model("smollm2")
    files = shipped_profiles(lm.identity)
    found: list[Figures] = []
    with steerable(lm) as steered:
        for name in names or [name for name in files if name in JUDGES]:
            profile, judge = load_profile(files[name]), JUDGES[name]
            here = []
            with Progress() as progress:
                task = progress.add_task(name, total=len(STRENGTHS) + 4 * controls + 1 + 2 * bool(judge.also))
                for one in conditions(steered, profile, judge, data, texts, tokens, controls, seed):
                    here.append(one)
                    progress.advance(task)
            show(judge, here)
            found += here
            if out is not None:
                out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")


def conditions(
    steered: SteeredModel,
    profile: Profile,
    judge: Judge,
    data: Path,
    texts: int,
    tokens: int,
    controls: int,
    seed: int,
) -> Iterator[Figures]:
    tokenizer = steered.lm.tokenizer

    def asked(prompts: Sequence[str], *system: Message) -> Asked:
        encoded = [encode_prompt(tokenizer, [*system, Message("user", prompt)]) for prompt in prompts]
        return Asked(encoded, texts, tokens, seed)

    main_prompts = judge.prompts(data)
    plain = asked(main_prompts)
    costs = {}
    for strength in STRENGTHS:
        one = measured(steered, profile, judge, profile, strength, plain)
        costs[strength] = one.kl
        yield one
    for control in random_controls(profile, controls, seed=seed):
        for strength in (-1.0, 1.0):
            equal_norm = measured(steered, profile, judge, control, strength, plain)
            yield equal_norm
            factor, kl = 1.0, equal_norm.kl
            for _ in range(EQUAL_KL_STEPS):  # KL grows as the square of the strength
                factor *= math.sqrt(costs[strength] / max(kl, 1e-6))
                scaled = replace(control, name=f"{control.name}-equal-kl", unit=control.unit * factor)
                equal_kl = measured(steered, profile, judge, scaled, strength, plain)
                kl = equal_kl.kl
            yield equal_kl
    instruction = Message("system", judge.instruction)
    yield instructed(steered, profile, judge, plain, asked(main_prompts, instruction))
    if judge.also is not None:
        label, others = judge.also
        for strength in (0.0, 1.0):
            yield measured(steered, profile, judge, profile, strength, asked(others(data)), label)


def measured(
    steered: SteeredModel,
    profile: Profile,
    judge: Judge,
    steering: Profile,
    strength: float,
    asked: Asked,
    label: str = "",
) -> Figures:
    opened = [one for one in opens(steered, profile, asked.prompts) for _ in range(asked.texts)]
    found = sampled(steered, steering, strength, asked.rows, opened, tokens=asked.tokens, seed=asked.seed)
    count = max(found.tokens, 1)
    kl, surprise = float(found.divergences.sum()) / count, -float(found.likelihoods.sum()) / count
    name = "unsteered" if strength == 0 else f"{steering.name} at {strength:+g}"
    return judged(steered, profile, judge, name, label, found.texts, asked, kl, math.exp(surprise))


def sampled(
    steered: SteeredModel,
    steering: Profile,
    strength: float,
    prompts: Sequence[Tokens],
    opened: Sequence[bool],
    *,
    tokens: int,
    seed: int,
) -> Sampled:
    """What is written after prompts, steered where the gate is opened, and what the unsteered model reads in it."""
    closed = [] if all(opened) else [0.0]
    found, *others = steered.sample_and_compare(steering, [strength, *closed], prompts, tokens=tokens, seed=seed)
    for plain in others:
        rows = [row for row, one in enumerate(opened) if not one]
        found.token_divergences[rows], found.token_likelihoods[rows] = 0, plain.token_likelihoods[rows]
        for row in rows:
            found.texts[row] = plain.texts[row]
    return found


def opens(steered: SteeredModel, profile: Profile, prompts: Sequence[Tokens]) -> list[bool]:
    """Whether each prompt opens the profile's gate, if it has one."""
    gate = profile.gate
    if gate is None:
        return [True] * len(prompts)
    found = {
        index: gate.opens(gate.similarity(vector[0]))
        for part in pooled(steered.lm, [(prompt[:-1], 0) for prompt in prompts], [gate.layer])
        for index, vector in zip(part.indices, part.vectors, strict=True)
    }
    return [found[index] for index in range(len(prompts))]


def instructed(steered: SteeredModel, profile: Profile, judge: Judge, plain: Asked, asked: Asked) -> Figures:
    """The unsteered model under the judge's system prompt."""
    condition, examples = sampled_under(steered, profile, plain.rows, asked.rows, tokens=asked.tokens, seed=asked.seed)
    sums, counts = steered.log_likelihoods(examples, steer=False)
    perplexity = math.exp(-float(sums.sum() / counts.sum()))
    kl, texts = condition.divergence(examples), [list(ids[start:]) for ids, start in examples]
    return judged(steered, profile, judge, f"system prompt: {judge.instruction}", "", texts, asked, kl, perplexity)


def sampled_under(
    steered: SteeredModel,
    profile: Profile,
    plain: Sequence[Tokens],
    prompts: Sequence[Tokens],
    *,
    tokens: int,
    seed: int,
) -> tuple[Instructed, list[Encoded]]:
    """What the unsteered model writes after prompts with an instruction, as examples after the plain prompts."""
    rewritten = {tuple(one): other for one, other in zip(plain, prompts, strict=True)}
    condition = Instructed(steered, lambda prompt: rewritten[tuple(prompt)])
    steered.write(profile, 0.0)
    texts = condition.write(plain, tokens=tokens, seed=seed)
    return condition, [([*prompt, *text], len(prompt)) for prompt, text in zip(plain, texts, strict=True)]


def judged(
    steered: SteeredModel,
    profile: Profile,
    judge: Judge,
    condition: str,
    label: str,
    texts: Sequence[Tokens],
    asked: Asked,
    kl: float,
    perplexity: float,
) -> Figures:
    replies = steered.lm.tokenizer.batch_decode(texts, skip_special_tokens=True)
    scores = np.array([judge.score(reply) for reply in replies]).reshape(len(asked.prompts), asked.texts)
    pairs = [pair for reply in replies for pair in zip(reply.split(), reply.split()[1:], strict=False)]
    return Figures(
        profile.name,
        condition,
        label,
        float(scores.mean()),
        bootstrap(lambda prompts: float(scores[prompts].mean()), len(scores)),
        kl,
        perplexity,
        len(set(pairs)) / max(len(pairs), 1),
        float(np.mean([len(reply.split()) for reply in replies])),
        " ".join(replies[0].split()),
    )


def show(judge: Judge, found: Sequence[Figures]) -> None:
    title = f"{found[0].profile}: {judge.figure} in replies of SmolLM2-135M"
    table = Table("condition", judge.figure, "KL", "perplexity", "distinct pairs", "words", title=title)
    for one in found:
        low, high = one.interval
        table.add_row(
            one.condition + (f", {one.prompts}" if one.prompts else ""),
            f"{one.figure:.2f} ({low:.2f} to {high:.2f})",
            f"{one.kl:.3f}",
            f"{one.perplexity:.1f}",
            f"{one.distinct:.2f}",
            f"{one.words:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
