"""Flags that say who writes and who judges: the loaded model, an OpenAI-compatible endpoint, or a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.errors import FitError

if TYPE_CHECKING:
    from steering_vectors.profiles.profile import Profile
    from steering_vectors.synthesis.endpoint import Endpoint
    from steering_vectors.synthesis.folder import Folder
    from steering_vectors.synthesis.judges import Judge, Rule
    from steering_vectors.synthesis.writers import Writer

AUTO, MODEL, PERSON, NONE = "auto", "model", "person", "none"
LARGE = 1_000_000_000  # parameters; smaller models write poor instructions and judge like a coin
ADDRESS = "an endpoint such as http://127.0.0.1:8000/v1#MODEL"

ApiKeys = Annotated[
    list[str] | None,
    flags.in_model(
        envvar="TRIMTAB_API_KEY",
        help="The key of the endpoint; with several hosts HOST=KEY for each, so that no key goes to another host.",
    ),
]


@dataclass(frozen=True, slots=True)
class Judging:
    judge: Annotated[
        str,
        flags.in_data(
            help=f"Who compares answers: model, person (by a file), {ADDRESS}, none, or auto (none for models below a "
            "billion parameters). A debate needs one, and auto is the model there."
        ),
    ] = AUTO
    judge_samples: Annotated[
        int,
        flags.in_data(
            min=0, help="An endpoint replies so many times in each order; 0 reads its log-probabilities instead."
        ),
    ] = 0
    wordings: Annotated[
        int, flags.in_data(min=1, max=3, help="The number of wordings of the judge's question, which must agree.")
    ] = 1
    confidence: Annotated[
        float, flags.in_data(help="The probability from which a verdict counts, from 0.5 to below 1.")
    ] = 0.6

    def rule(self) -> Rule:
        from steering_vectors.synthesis.judges import Rule

        return Rule(self.confidence)


class Roles:
    """The writers and judges of a command, by what its flags say."""

    def __init__(
        self, lm: steering_vectors.LanguageModel, keys: Sequence[str], addresses: Sequence[str], stack: ExitStack
    ) -> None:
        self._lm, self._keys, self._stack = lm, keys, stack
        self._hosts = {host for address in addresses if (host := urlsplit(address).netloc)}

    def writer(self, name: str, flag: str, profiles: Sequence[Profile] = ()) -> Writer:
        from steering_vectors.synthesis.writers import EndpointWriter, LocalWriter

        if name == MODEL:
            return LocalWriter(self._lm, {one.name: one for one in profiles})
        return EndpointWriter(self._endpoint(name, flag, (MODEL,)))

    def judge(self, asked: Judging, folder: Folder, *, may_be_none: bool) -> Judge | None:
        from steering_vectors.synthesis.judges import EndpointJudge, ModelJudge, PersonJudge

        if asked.judge == NONE and may_be_none:
            return None
        if asked.judge == PERSON:
            return PersonJudge(folder)
        if asked.judge in (MODEL, AUTO):
            return ModelJudge(self._lm, wordings=asked.wordings)
        endpoint = self._endpoint(asked.judge, "--judge", (MODEL, PERSON, *([NONE] if may_be_none else [])))
        return EndpointJudge(endpoint, wordings=asked.wordings, samples=asked.judge_samples)

    def _endpoint(self, address: str, flag: str, names: Sequence[str]) -> Endpoint:
        from steering_vectors.synthesis.endpoint import Endpoint, is_endpoint

        if not is_endpoint(address):
            raise FitError(
                f"{flag} {address!r} is not one of {', '.join(names)}, and no address such as http://HOST/v1"
            )
        endpoint = Endpoint(address, self._key_for(urlsplit(address).netloc))
        self._stack.callback(endpoint.close)
        return endpoint

    def _key_for(self, host: str) -> str:
        plain = []
        for key in self._keys:
            name, equals, rest = key.partition("=")
            if equals and name in self._hosts:
                if name == host:
                    return rest
            else:
                plain.append(key)
        if plain and len(self._hosts) > 1:
            raise FitError(
                f"--api-key does not say which of {', '.join(sorted(self._hosts))} it is for: write HOST=KEY for each"
            )
        return plain[0] if plain else ""


@contextmanager
def roles(lm: steering_vectors.LanguageModel, keys: Sequence[str] | None, *addresses: str) -> Iterator[Roles]:
    """Roles whose endpoints are closed at the end."""
    with ExitStack() as stack:
        yield Roles(lm, keys or (), addresses, stack)


Tokens = Annotated[int, flags.in_data(min=1, help="The maximum number of tokens of an answer.")]
Temperature = Annotated[float, flags.in_data(help="The temperature of answers, above 0 and at most 2.")]
