"""From what a body asks for to generations of the engine, the same way for every route.

Counts and capabilities are checked before any work is done. Errors name the fields of the request. Long texts are
tokenised in a thread, where they hold up no stream.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from server.access.callers import Caller
from server.engines.errors import reject
from server.engines.pool import DaemonPool
from server.engines.protocol import (
    Capability,
    Constraint,
    ConstraintKind,
    Engine,
    EngineInfo,
    GenerationRequest,
    SteeringPlan,
    capabilities_needed,
)
from server.generation.answer_sizes import AnswerBudget, reported_values
from server.generation.choices import Generations, Keeping
from server.generation.client_errors import client_errors
from server.generation.load import Load
from server.generation.request_limits import Deadline, RequestLimits
from server.generation.steering_grammar import pinned
from server.observability import request_record
from server.profiles.references import Draw
from steering_vectors.data.chat import Message, check_known, continuation, encode_prompt
from steering_vectors.data.literal_text import holds_control_token
from steering_vectors.errors import RequestError

if TYPE_CHECKING:
    from server.profiles.registry import ProfileRegistry

Ids = tuple[int, ...]
Prompt = str | list[int] | tuple[Message, ...]
LONG_TEXT = 8192  # characters; below it a thread costs more than tokenising does
ONE_TEXT = 64  # the characters that take as long as what each text and message costs besides


@dataclass(frozen=True, slots=True)
class Ask:
    """What a body asks for: `n` choices of each prompt under each plan.

    `encoding` has keyword arguments of `encode_prompt`, `common` what all generations share. `plans` are by the
    request's field that holds each, and so are `constraints`, of which there may be one. If there are `completions`,
    they are scored and nothing is generated. `projections` asks for those of all plans, so that variants can be
    compared. `counted` is the field that errors name if there are too many generations, `max_tokens_field` the one
    that gives the number of tokens, None if it is left out. `timeout` None means the server's default. Requests of
    one `user` get the same version of a profile of which aliases have shares, and it is theirs if they are kept.
    """

    prompts: Sequence[Prompt]
    encoding: Mapping[str, Any]
    plans: Mapping[str, SteeringPlan]
    common: GenerationRequest
    n: int = 1
    constraints: Mapping[str, tuple[ConstraintKind, str]] = field(default_factory=dict)
    projections: bool = False
    completions: Sequence[str | list[int]] | None = None
    counted: str = "prompt"
    timeout: float | None = None
    max_tokens_field: str | None = None
    user: str | None = None

    @property
    def count(self) -> int:
        """The number of generations."""
        return len(self.prompts) * len(self.plans) * self.n * (1 if self.completions is None else len(self.completions))

    def field_names(self) -> dict[str, str]:
        """This request's names of protocol fields, where they differ from the common ones."""
        prompt = {"prompt_ids": "messages", "prompt": "messages"} if isinstance(self.prompts[0], tuple) else {}
        scored = "echo" if self.completions is None else "completions"
        constraint = next(iter(self.constraints), "constraint")
        return {**prompt, "constraint": constraint, "prompt_logprobs": scored, "scored_suffix": scored}


class Asking(Protocol):
    """The body of a generating route."""

    def ask(self, served: str, header: str | None) -> Ask:
        """`served` is the name of the served model, `header` a steering string. Raises RequestError."""
        ...


@dataclass(frozen=True, slots=True)
class Intake:
    """Takes in requests of one caller for one engine, its name and the profiles that are served."""

    engine: Engine
    served: str
    registry: ProfileRegistry
    pool: DaemonPool
    budget: AnswerBudget
    load: Load
    max_characters: int  # of a prompt: more cannot fit the context
    limits: RequestLimits = RequestLimits()
    caller: Caller = Caller()
    keep: Callable[[Ask, Caller], Keeping] | None = None  # None: generations are not kept

    async def submit(self, body: Asking, header: str | None = None) -> Generations:
        """Have the engine run all generations of a request, or none. Raises RequestError, UnknownProfile, UnknownModel,
        Overloaded, DeadlineExceeded, Unavailable."""
        fields: dict[str, str] = {}
        record = request_record.current()
        with client_errors(fields), ExitStack() as held:  # what is taken is given back if the request is refused
            ask = self._limited(body.ask(self.served, header))
            fields |= ask.field_names()
            deadline = Deadline(self.limits.timeout(ask.timeout))
            self._check_count(ask)
            named = {term.profile for plan in ask.plans.values() for term in plan.terms}
            async with self.registry.holding(named):
                draw = Draw(ask.user, self.caller.tenant)
                for draft in self._requests(ask, [((), 0 if ask.completions is None else 1)], draw, deadline):
                    check_capabilities(self.engine.info, capabilities_needed(draft))
                place = self.load.take(self.caller.tenant, ask.count)
                held.callback(place.close)
                async with deadline.bounds("its prompt was still being tokenized"):
                    prompts = await self._encoded(ask)
                requests = self._requests(ask, prompts, draw, deadline)  # anew: a profile may have been replaced
                if record is not None:
                    record.ask(requests, ask.prompts)
                values = reported_values(requests, self.engine.info.context)
                self.budget.take(values, ask.counted)
                held.callback(self.budget.give_back, values)
                async with deadline.bounds("it was still being admitted"):
                    stream = await self.engine.submit(requests)
                for request in requests:
                    self.registry.use(request.ids, request.versions)
            held.callback(self.registry.release, [name for request in requests for name in request.ids])
            if record is not None:
                record.accept(requests)
            return Generations(
                requests,
                stream,
                fields,
                self.caller.charge,
                values=values,
                ended=held.pop_all().close,
                finished=place.finished,
                timeout=deadline.seconds,
                keeping=None if self.keep is None else self.keep(ask, self.caller),
            )

    def _limited(self, ask: Ask) -> Ask:
        """Refuse what is beyond the server's limits, and put its defaults in."""
        self.limits.check_n(ask.n, "n")
        sampling = ask.common.sampling
        if ask.completions is None:
            sampling = self.limits.sampling(sampling, ask.max_tokens_field)
        return replace(ask, common=replace(ask.common, sampling=sampling))

    def _check_count(self, ask: Ask) -> None:
        most = self.load.most
        if ask.count > most:
            raise RequestError(
                f"{ask.counted}: {ask.count} generations exceed the {most} that one request may have here: "
                "request fewer",
                param=ask.counted,
            )

    def _requests(
        self, ask: Ask, prompts: Sequence[tuple[Ids, int]], draw: Draw, deadline: Deadline
    ) -> list[GenerationRequest]:
        """The requests for prompts, each with the number of tokens at its end that are scored."""
        if len(ask.constraints) > 1:
            first, second, *_ = ask.constraints
            raise RequestError(f"{first} and {second} are both given: use only one of them", param=second)
        constraint = next((Constraint(kind, text) for kind, text in ask.constraints.values()), None)
        plans = [pinned(plan, partial(self.registry.find, param=field, draw=draw)) for field, plan in ask.plans.items()]
        projected = dict.fromkeys(version for plan in plans for version in plan.versions) if ask.projections else ()
        return [
            replace(
                ask.common,
                ids=tuple(self.caller.new_id("gen" if ask.completions is None else "score") for _ in range(ask.n)),
                prompt_ids=ids,
                plan=plan,
                constraint=constraint,
                scored_suffix=scored,
                projections=tuple(projected),
                tenant=self.caller.tenant,
                timeout=deadline.left,
            )
            for ids, scored in prompts
            for plan in plans
        ]

    async def _encoded(self, ask: Ask) -> list[tuple[Ids, int]]:
        """The ids of each prompt, with the number of them at the end that are scored."""
        info = self.engine.info
        sizes = [self._check_size(prompt, "prompt", "the prompt") for prompt in ask.prompts]
        texts = sum(len(prompt) if isinstance(prompt, tuple) else 1 for prompt in ask.prompts)
        pool = self.pool if sum(sizes) + ONE_TEXT * texts > LONG_TEXT else None
        found = [await _encode(info, prompt, ask.encoding, pool, self.pool) for prompt in ask.prompts]
        if ask.completions is None:
            return [(ids, 0) for ids in found]
        (prompt,) = found
        for place, completion in enumerate(ask.completions):
            self._check_size(completion, f"completions[{place}]", f"completions[{place}]")
        completions = await _encode_continuations(info, prompt, ask.completions, self.pool)
        return [((*prompt, *completion), len(completion)) for completion in completions]

    def _check_size(self, prompt: Prompt, param: str, what: str) -> int:
        """The number of characters. Raises RequestError for a prompt that cannot fit the context, before it is
        tokenised."""
        context = self.engine.info.context
        if isinstance(prompt, list):
            size, limit, problem = 0, context, f"{what} has {len(prompt)} tokens; the context holds {context}"
            fits = len(prompt) <= limit
        else:
            size = len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
            fits = size <= self.max_characters
            problem = f"{what} has {size} characters; a context of {context} tokens holds {self.max_characters} at most"
        if not fits:
            raise RequestError(f"{problem}: shorten {what}", param=param, code="context_length_exceeded")
        return size


def longest_text(info: EngineInfo) -> int:
    """The most characters that fit the context: no token has more than the longest one."""
    return info.context * max((len(token) for token in info.tokenizer.get_vocab()), default=1)


def check_capabilities(info: EngineInfo, needed: Mapping[Capability, str]) -> None:
    """Raise RequestError for the first field that needs something the engine cannot do."""
    for capability, param in needed.items():
        if capability not in info.capabilities:
            message = f"{param} is not supported by the {info.name} engine: leave it out"
            raise RequestError(message, param=param, code="not_supported")


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


async def _encode(
    info: EngineInfo, prompt: Prompt, encoding: Mapping[str, Any], pool: DaemonPool | None, spare: DaemonPool
) -> Ids:
    """Token ids of a text or of messages; token ids pass as they are. Tokenised in `pool`; without one, in the event
    loop, but in `spare` if there are control tokens. Raises RequestError for ids that the model does not have, and what
    `encode_prompt` raises."""
    if isinstance(prompt, list):
        problem = f"the prompt has a token id outside of the vocabulary, 0 to {info.vocab_size - 1}"
        reject(not _in_vocabulary(prompt, info), problem, "prompt")
        return tuple(prompt)
    work = partial(encode_prompt, info.tokenizer, prompt, **encoding)
    texts = () if isinstance(prompt, str) else [message.content for message in prompt]
    if pool is None and any(holds_control_token(info.tokenizer, text) for text in texts):
        pool = spare
    ids = work() if pool is None else await pool.run(work)
    check_known(info.tokenizer, ids, info.vocab_size, param="prompt" if isinstance(prompt, str) else "messages")
    return tuple(ids)


async def _encode_continuations(
    info: EngineInfo, prompt: Ids, completions: Sequence[str | list[int]], pool: DaemonPool
) -> list[Ids]:
    """Token ids of each completion as the model would write it after the prompt. Raises RequestError that names a
    completion without a token, or with an id outside of the vocabulary."""

    def ids_of(place: int, completion: str | list[int]) -> Ids:
        if isinstance(completion, list):
            return tuple(completion)
        try:
            return tuple(continuation(info.tokenizer, prompt, completion))
        except RequestError as error:
            name = f"completions[{place}]"
            raise RequestError(f"{name}: {error.message}; or send token ids", param=name) from error

    try:
        found = await pool.run(lambda: [ids_of(*numbered) for numbered in enumerate(completions)])
    except UnicodeEncodeError as error:
        raise RequestError("completions has a lone surrogate, which is not a character", param="completions") from error
    for place, ids in enumerate(found):
        name = f"completions[{place}]"
        reject(not ids, f"{name} holds no token of this model", name)
        problem = f"{name} has a token id outside of the vocabulary, 0 to {info.vocab_size - 1}"
        reject(not _in_vocabulary(ids, info), problem, name)
    return found


def _in_vocabulary(ids: Sequence[int], info: EngineInfo) -> bool:
    return all(0 <= token < info.vocab_size for token in ids)
