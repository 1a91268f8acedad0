"""Whether a shipped profile's effect lasts over a conversation, compared with a system prompt and random directions.

    python -m benchmarks.quality.persistence [NAME ...] [--conversations 12] [--turns 10] [--tokens 60] [--json FILE]

SmolLM2-135M-Instruct holds conversations in which the user asks the questions of a profile's judge (see
benchmarks.quality.judges). Each condition holds its own: the unsteered model, the profile at both signs of a strength,
random directions with the norms of its shift, and the judge's system prompt, which replaces that of the chat template.
Conversation i draws from the same random numbers under every condition.

A conversation is held as with a stateless server. A reply is decoded and sent back as a message of the next prompt,
also if it was cut off after `--tokens` tokens. Steering begins at the last prompt token (`apply_to: generated`), so the
earlier replies were written steered but are read again unsteered. What lasts is therefore the effect of the shift on
the present reply and that of the earlier replies' words. A gate decides anew at each turn, from the whole prompt.

Questions are ordered in Latin squares: at every turn each one is asked equally often, so turns do not differ by their
questions. Reported by turn are the judge's figure, words, the share of replies that end by themselves, and perplexity
under the unsteered model without the system prompt. Effects are differences from the unsteered conversations, at the
first turn, at the last one, on average and as a least-squares slope over turns. Intervals (95 %) resample
conversations. `careful` needs the file of XSTest in DIR (`--data DIR`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.quality.judges import JUDGES, Judge
from benchmarks.quality.shipped import Tokens, opens, sampled, sampled_under
from steering_vectors import Profile, load_model, load_profile
from steering_vectors.data.chat import Message, decoded_after, encode_prompt
from steering_vectors.measures.controls import bootstrap, random_controls
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.limits import context_limit, eos_ids
from steering_vectors.profiles.shipped import shipped_profiles

SHOWN = (1, 2, 5, 10)  # turns of the table; the file has all
UNSTEERED = "unsteered"
Conversation = list[Message]
Estimate = tuple[float, float, float]  # with the ends of its interval


@dataclass(frozen=True, slots=True)
class Assistant:
    """The model that replies under one condition. `profile` is the one whose gate decides."""

    name: str
    steered: SteeredModel
    profile: Profile
    steering: Profile
    strength: float = 0.0
    instruction: str = ""

    def reply(
        self, conversations: Sequence[Conversation], *, tokens: int, seed: int
    ) -> tuple[list[Tokens], list[Tokens], float]:
        """The prompts, the reply to each, and the replies' log-likelihood after the prompts under the plain model."""
        prompts = self._encoded(conversations, tokens)
        if self.instruction:
            system = Message("system", self.instruction)
            others = self._encoded([[system, *conversation] for conversation in conversations], tokens)
            _, examples = sampled_under(self.steered, self.profile, prompts, others, tokens=tokens, seed=seed)
            sums, _ = self.steered.log_likelihoods(examples, steer=False)
            return prompts, [list(ids[start:]) for ids, start in examples], float(sums.sum())
        opened = opens(self.steered, self.profile, prompts) if self.strength else [True] * len(prompts)
        found = sampled(self.steered, self.steering, self.strength, prompts, opened, tokens=tokens, seed=seed)
        return prompts, found.texts, float(found.likelihoods.sum())

    def _encoded(self, conversations: Sequence[Conversation], tokens: int) -> list[Tokens]:
        lm = self.steered.lm
        prompts = [encode_prompt(lm.tokenizer, conversation) for conversation in conversations]
        longest, limit = max(map(len, prompts)) + tokens, context_limit(lm)
        if limit is not None and longest > limit:
            raise typer.BadParameter(
                f"a conversation has {longest} tokens with its reply and the model's context {limit}: use fewer "
                "--turns or --tokens"
            )
        return prompts


@dataclass(frozen=True, slots=True)
class Turn:
    """One condition at one turn, counted from 1. `scores` are the judge's, by conversation."""

    profile: str
    condition: str
    turn: int
    figure: float
    interval: tuple[float, float]
    words: float
    ended: float
    perplexity: float
    scores: list[float]
    example: str


@dataclass(frozen=True, slots=True)
class Effect:
    """The difference of a condition from another: at the first turn, at the last one, on average, and its slope per
    turn."""

    profile: str
    condition: str
    first: Estimate
    last: Estimate
    mean: Estimate
    slope: Estimate


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Profiles; all that have a judge if none.")] = None,
    conversations: Annotated[int, typer.Option(min=2, help="Conversations of each condition.")] = 12,
    turns: Annotated[int, typer.Option(min=2, help="Turns of a conversation.")] = 10,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply, at most.")] = 60,
    controls: Annotated[int, typer.Option(min=0, help="Random directions.")] = 2,
    strength: Annotated[float, typer.Option(help="Of the profile, at both signs, and of the controls.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling, the questions' order and the random directions.")] = 0,
    data: Annotated[Path, typer.Option(help="Folder with the public files.")] = Path(),
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    lm = load_model("smollm2")
    files = shipped_profiles(lm.identity)
    found: list[Turn] = []
    compared: list[Effect] = []
    with steerable(lm) as steered:
        for name in names or [name for name in files if name in JUDGES]:
            profile, judge = load_profile(files[name]), JUDGES[name]
            plan = questions(judge.prompts(data), conversations, turns, seed)
            cast = assistants(steered, profile, judge, controls, strength, seed)
            here = []
            with Progress() as progress:
                task = progress.add_task(name, total=len(cast) * turns)
                for assistant in cast:
                    for one in converse(assistant, judge, plan, tokens, seed):
                        here.append(one)
                        progress.advance(task)
            effects = list(compare(here))
            show(judge, here, effects)
            found += here
            compared += effects
            if out is not None:
                figures = {"turns": list(map(asdict, found)), "effects": list(map(asdict, compared))}
                out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def questions(prompts: Sequence[str], conversations: int, turns: int, seed: int) -> list[list[str]]:
    """The user's messages by conversation and turn, in Latin squares of as many prompts as possible.

    At every turn each question is asked equally often, and no conversation repeats one. In a square of an even size, no
    question follows the same one twice (Williams, 1949).
    """
    sizes = [size for size in range(turns, len(prompts) + 1) if conversations % size == 0]
    if not sizes:
        raise typer.BadParameter(
            f"--conversations must be a multiple of a number from {turns} (the turns) to {len(prompts)} (the judge's "
            f"questions), so that each question is asked equally often at every turn; it is {conversations}"
        )
    size, generator = sizes[-1], np.random.default_rng(seed)
    offsets = [(turn + 1) // 2 * (-1) ** (turn + 1) for turn in range(turns)]  # 0, 1, −1, 2, −2, …
    plan = []
    for _ in range(conversations // size):
        square = [prompts[index] for index in generator.permutation(len(prompts))[:size]]
        plan += [[square[(row + offset) % size] for offset in offsets] for row in range(size)]
    return plan


def assistants(
    steered: SteeredModel, profile: Profile, judge: Judge, controls: int, strength: float, seed: int
) -> list[Assistant]:
    """One for each condition, the unsteered one first. A random direction's opposite is another random direction, so
    these have one sign."""
    steerings = [
        (UNSTEERED, profile, 0.0),
        *((f"{profile.name} at {one:+g}", profile, one) for one in (strength, -strength)),
        *((f"{one.name} at {strength:+g}", one, strength) for one in random_controls(profile, controls, seed=seed)),
    ]
    cast = [Assistant(name, steered, profile, steering, one) for name, steering, one in steerings]
    prompted = f"system prompt: {judge.instruction}"
    return [*cast, Assistant(prompted, steered, profile, profile, instruction=judge.instruction)]


def converse(
    assistant: Assistant, judge: Judge, plan: Sequence[Sequence[str]], tokens: int, seed: int
) -> Iterator[Turn]:
    """The turns of conversations in which the user asks the questions of `plan`, by conversation and turn."""
    lm = assistant.steered.lm
    ends = eos_ids(lm)
    conversations: list[Conversation] = [[] for _ in plan]
    for turn, asked in enumerate(zip(*plan, strict=True), 1):
        for conversation, question in zip(conversations, asked, strict=True):
            conversation.append(Message("user", question))
        prompts, replies, likelihood = assistant.reply(conversations, tokens=tokens, seed=1000 * seed + turn)
        texts = [decoded_after(lm.tokenizer, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        for conversation, text in zip(conversations, texts, strict=True):
            conversation.append(Message("assistant", text))
        scores = np.array([judge.score(text) for text in texts])
        figure, *bounds = estimate(scores)
        yield Turn(
            assistant.profile.name,
            assistant.name,
            turn,
            figure,
            (bounds[0], bounds[1]),
            float(np.mean([len(text.split()) for text in texts])),
            float(np.mean([reply[-1] in ends for reply in replies])),
            math.exp(-likelihood / sum(map(len, replies))),
            scores.tolist(),
            " ".join(texts[0].split()),
        )


def compare(turns: Sequence[Turn]) -> Iterator[Effect]:
    """The effect of each condition of a profile against the unsteered one, which comes first, and that of the
    profile's positive strength against its negative one."""
    scores = {
        condition: np.array([one.scores for one in turns if one.condition == condition]).T  # [conversations, turns]
        for condition in dict.fromkeys(one.condition for one in turns)
    }
    plain, positive, negative, *_ = scores
    pairs = [(name, name, plain) for name in scores if name != plain]
    pairs.insert(2, (f"{positive} against {negative.rpartition(' ')[2]}", positive, negative))
    for name, one, other in pairs:
        effect = scores[one] - scores[other]
        places = np.arange(effect.shape[1]) - (effect.shape[1] - 1) / 2
        slopes = effect @ places / (places @ places)  # by least squares
        yield Effect(turns[0].profile, name, *map(estimate, (effect[:, 0], effect[:, -1], effect.mean(1), slopes)))


def estimate(values: np.ndarray) -> Estimate:
    """The mean of one value from each conversation, and its interval."""
    return float(values.mean()), *bootstrap(lambda chosen: float(values[chosen].mean()), len(values))


def show(judge: Judge, turns: Sequence[Turn], effects: Sequence[Effect]) -> None:
    last, count = turns[-1].turn, len(turns[0].scores)
    title = f"{turns[0].profile}: {judge.figure} in {count} conversations of SmolLM2-135M"
    table = Table("condition", "turn", judge.figure, "words", "ended", "perplexity", title=title)
    for one in turns:
        if one.turn in {*SHOWN, last}:
            table.add_row(
                one.condition if one.turn == 1 else "",
                str(one.turn),
                shown((one.figure, *one.interval), 2),
                f"{one.words:.0f}",
                f"{one.ended:.0%}",
                f"{one.perplexity:.1f}",
                end_section=one.turn == last,
            )
    console = Console(width=140)
    console.print(table)
    title = f"{turns[0].profile}: difference from the unsteered conversations"
    table = Table("condition", "at turn 1", f"at turn {last}", "mean of all turns", "slope per turn", title=title)
    for effect in effects:
        columns = (effect.first, 2), (effect.last, 2), (effect.mean, 2), (effect.slope, 3)
        table.add_row(effect.condition, *(shown(value, digits) for value, digits in columns))
    console.print(table)


def shown(value: Estimate, digits: int) -> str:
    return "{:.{digits}f} ({:.{digits}f} to {:.{digits}f})".format(*value, digits=digits)


if __name__ == "__main__":
    typer.run(main)
