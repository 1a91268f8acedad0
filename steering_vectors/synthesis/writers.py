"""Who writes texts: the loaded model, under instructions and profiles, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch

from steering_vectors.data.chat import Message, Prompt, decoded_after, encode_prompt
from steering_vectors.errors import DataError, FitError, ProfileError
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import context_limit, eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from steering_vectors.synthesis.endpoint import Endpoint, EndpointError, first_choice, text_of
from steering_vectors.synthesis.folder import Folder, Row, by_key, is_storable, key_of
from steering_vectors.tuning.instructions import instructed

CHUNK = 64  # texts that are written together, and stored before the next ones are begun
CONNECTIONS = 8
SEEDS = 2**31
REFUSED = (400, 422)  # statuses of a server that does not know a field
TERM = re.compile(r"\s*([a-z0-9][a-z0-9._-]*)\s*(?:@\s*(-?[0-9.]+(?:e-?\d+)?))?\s*", re.IGNORECASE)


def parse_steering(text: str) -> tuple[tuple[str, float], ...]:
    """The profiles and strengths of `cheerful@0.8+polite@-0.3`; a name without a number is at strength 1.

    Raises FitError for anything else.
    """
    found = []
    for part in text.split("+") if text.strip() else ():
        match = TERM.fullmatch(part)
        try:
            assert match is not None
            found.append((match[1], float(match[2] or 1)))
        except (AssertionError, ValueError) as error:
            raise FitError(f"{text!r} is no steering such as cheerful@0.8+polite@-0.3") from error
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Voice:
    """How a writer writes: under an instruction, under a steering such as `cheerful@0.8+polite@-0.3`, both or none."""

    instruction: str = ""
    steering: str = ""

    def __post_init__(self) -> None:
        parse_steering(self.steering)
        if not is_storable(self.instruction):
            raise FitError("an instruction contains half of a surrogate pair: write valid Unicode")


@dataclass(frozen=True, slots=True)
class Ask:
    """A text to write: the next message after these. `seed` fixes its random numbers, whatever else is written. An
    endpoint is asked to follow the JSON `schema`, if it can."""

    messages: tuple[Message, ...]
    voice: Voice = Voice()
    seed: int = 0
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A text, and whether it ended by itself before the limit of tokens."""

    text: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Length:
    """How texts are drawn: at most `tokens` tokens at a temperature. Raises FitError for values that cannot be used."""

    tokens: int = 96
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise FitError(f"tokens must be at least 1, not {self.tokens}")
        if not 0 < self.temperature <= 2:
            raise FitError(f"temperature must be above 0 and at most 2, not {self.temperature:g}")


class Writer(Protocol):
    """Anything that writes texts."""

    name: str

    def source(self, voice: Voice) -> str:
        """What a text of this voice comes from, which is stored with it: the model, and versions of profiles."""
        ...

    def write(self, asks: Sequence[Ask], length: Length) -> Iterator[Written]:
        """Yield the texts in the order of `asks`, as soon as they are there."""
        ...


class LocalWriter:
    """The loaded model writes, through the runner that serving uses. `profiles` are those that voices name."""

    def __init__(
        self, lm: LanguageModel, profiles: Mapping[str, Profile] | None = None, *, allow_beyond_safe: bool = False
    ) -> None:
        self._lm, self._profiles, self._beyond = lm, dict(profiles or {}), allow_beyond_safe
        self.name = f"{lm.identity.id} ({lm.identity.fingerprint[:8]})"
        self._eos = eos_ids(lm)

    def source(self, voice: Voice) -> str:
        steering = self._mixture(voice.steering).terms
        versions = [
            f"{one.profile.name} {(one.profile.version or one.profile.content_digest())[:8]}" for one in steering
        ]
        return ", ".join([self.name, *versions])

    def write(self, asks: Sequence[Ask], length: Length) -> Iterator[Written]:
        """Raises ProfileError for a profile that is not loaded, DataError for a prompt that leaves no room."""
        lm, prompts = self._lm, [self._encoded(ask, length.tokens) for ask in asks]
        mixtures = {ask.voice.steering: self._mixture(ask.voice.steering) for ask in asks}
        if not asks:
            return
        with steerable(lm) as steered:
            for steering, places in groupby(range(len(asks)), key=lambda place: asks[place].voice.steering):
                steered.steer(mixtures[steering])
                group = list(places)
                for start in range(0, len(group), CHUNK):
                    chunk = group[start : start + CHUNK]
                    uniforms = torch.stack([_uniforms(asks[place].seed, length.tokens) for place in chunk])
                    texts = steered.draw_texts(
                        [prompts[place] for place in chunk], uniforms, temperature=length.temperature
                    )
                    for place, ids in zip(chunk, texts, strict=True):
                        text = decoded_after(lm.tokenizer, prompts[place], ids).strip()
                        yield Written(text, bool(ids) and ids[-1] in self._eos)

    def _encoded(self, ask: Ask, tokens: int) -> list[int]:
        prompt: Prompt = ask.messages
        if ask.voice.instruction:
            prompt = instructed(self._lm.tokenizer, prompt, ask.voice.instruction)
        ids = encode_prompt(self._lm.tokenizer, prompt or "")
        limit = context_limit(self._lm)
        if limit is not None and len(ids) + tokens > limit:
            shown = ask.messages[-1].content[:60]
            raise DataError(
                f"the prompt {shown!r} with its instruction has {len(ids)} tokens, and {tokens} are to be written, but "
                f"the model's context holds {limit}: shorten it, or write fewer tokens"
            )
        return ids

    def _mixture(self, steering: str) -> Mixture:
        terms = []
        for name, strength in parse_steering(steering):
            if name not in self._profiles:
                raise ProfileError(f"the steering {steering!r} names {name!r}, which is not loaded")
            profile = self._profiles[name]
            profile.check_model(self._lm.identity, allow_mismatch=False)
            terms.append(Term(profile, strength))
        return Mixture(tuple(terms), allow_beyond_safe=self._beyond)


class EndpointWriter:
    """An endpoint writes. A steering is trimtab's field `steering`; an answer without its receipt is an error."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.name = endpoint, endpoint.name

    def source(self, voice: Voice) -> str:
        return self.name

    def write(self, asks: Sequence[Ask], length: Length) -> Iterator[Written]:
        """Raises EndpointError."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for start in range(0, len(asks), CHUNK):
                yield from pool.map(lambda ask: self._one(ask, length), asks[start : start + CHUNK])

    def _one(self, ask: Ask, length: Length) -> Written:
        voice = ask.voice
        fields: dict[str, Any] = {"steering": voice.steering} if voice.steering else {}
        fields |= {"max_tokens": length.tokens, "temperature": length.temperature, "seed": ask.seed}
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ask.schema, "strict": True}}
        messages = ask.messages
        if voice.instruction and messages[0].role == "system":
            messages = (Message("system", f"{voice.instruction}\n\n{messages[0].content}"), *messages[1:])
        elif voice.instruction:
            messages = (Message("system", voice.instruction), *messages)
        try:
            answer = self._endpoint.chat(messages, **fields, **({"response_format": schema} if ask.schema else {}))
        except EndpointError as error:
            if ask.schema is None or error.status not in REFUSED:
                raise
            answer = self._endpoint.chat(messages, **fields)
        if voice.steering and not answer.get("steering"):
            raise EndpointError(
                f"{self._endpoint.url} does not say that it steered by {voice.steering}: is it a trimtab server?"
            )
        choice = first_choice(answer)
        return Written(text_of(choice).strip(), choice.get("finish_reason") == "stop")


def seed_of(*parts: object) -> int:
    """A seed that values determine."""
    return int(key_of(*parts), 16) % SEEDS


def stored_texts(
    folder: Folder,
    file: str,
    wanted: Sequence[tuple[Row, Ask]],
    writer: Writer,
    length: Length,
    progress: Progress | None,
    stage: str,
) -> list[Row]:
    """Each row with its `text`, from the file where its key is there already; new ones are added to it as they come.

    Rows are described by all that their text depends on, so that a change makes only what depends on it again. Raises
    DataError for a row in the file that has no text.
    """
    rows = []
    sources = {ask.voice: writer.source(ask.voice) for _, ask in wanted}
    for row, ask in wanted:
        source = sources[ask.voice]
        key = key_of(row, ask.seed, source, length.tokens, length.temperature)
        rows.append({"key": key, **row, "writer": source})
    known = by_key(folder.rows(file, ("key",)))
    missing = {row["key"]: place for place, row in enumerate(rows) if row["key"] not in known}
    done = len({row["key"] for row in rows}) - len(missing)
    total = done + len(missing)
    texts = writer.write([wanted[place][1] for place in missing.values()], length)
    for number, (place, text) in enumerate(zip(missing.values(), texts, strict=True), start=done + 1):
        row = {**rows[place], "text": text.text, "ended": text.ended}
        known[row["key"]] = row
        folder.append(file, [row])
        if progress is not None:
            progress(stage, number, total)
    for row in rows:
        if not isinstance(known[row["key"]].get("text"), str):
            raise DataError(f"the row {row['key']} has no text: correct or delete it", path=str(folder.file(file)))
    return [known[row["key"]] for row in rows]


def _uniforms(seed: int, tokens: int) -> torch.Tensor:
    """Random numbers in [0, 1): float32 `[tokens]`."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
