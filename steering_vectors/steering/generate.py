"""Steering transformers' own `generate`, for notebooks and research: `with steer(model, profile): …`.

All rows of a batch are steered alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from steering_vectors.errors import SteeringError
from steering_vectors.models.blocks import find_blocks
from steering_vectors.models.forward import STATE_ARGUMENTS
from steering_vectors.models.loading import LanguageModel, identify
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import ApplyTo, Profile
from steering_vectors.steering.bank import SteeringBank

Steering = Profile | Mixture | Sequence[tuple[Profile, float]]


@contextmanager
def steer(
    model: PreTrainedModel | LanguageModel,
    steering: Steering,
    strength: float = 1.0,
    *,
    layers: Sequence[int] | None = None,
    apply_to: ApplyTo = "generated",
    preserve_norm: bool = False,
    prompt_length: int | None = None,
    allow_model_mismatch: bool = False,
) -> Iterator[Mixture]:
    """Steer every forward pass of `model` inside the context; afterwards it has no hooks. Yields what is applied.

    `steering` is a profile at `strength` (α; `layers` restricts it to some of its layers), a list of (profile,
    strength), or a Mixture, which brings its own options (it alone can allow strengths beyond the safe range).

    `apply_to="generated"` steers from the last prompt token on. Inside `model.generate` the prompt is generate's input,
    with KV cache or without, and prompts of a batch must be padded on the left. In a forward pass outside of generate,
    the prompt is the whole input if there is no cache yet; with a cache, every position is steered. `prompt_length`
    (positions, padding included) overrides both, for example to score a completion in one pass. `apply_to="all"`
    steers every position, padding included.

    Raises ProfileMismatch for a profile of another model (`allow_model_mismatch` accepts one of the same shape),
    SteeringError for strengths and layers that are not possible, a profile with a gate or a batch padded on the right,
    ModelError if the model's blocks cannot be found.
    """
    mixture = _mixture(steering, strength, layers, apply_to, preserve_norm)
    if mixture.gated:
        name = mixture.gated[0].profile.name
        raise SteeringError(
            f"profile {name!r} has a gate, which only a server decides: use replace(profile, gate=None)"
        )
    timeline = Timeline(prompt_length)
    if isinstance(model, LanguageModel):
        network, blocks, identity = model.model, model.blocks, model.identity
    else:
        network, blocks = model, find_blocks(model)
        identity = identify(model, num_layers=len(blocks))
    for term in mixture.terms:
        term.profile.check_model(identity, allow_mismatch=allow_model_mismatch)
    bank = SteeringBank(blocks, rows=1, hidden_size=identity.hidden_size, dtype=network.dtype, device=network.device)
    bank.write(0, mixture)
    where = timeline.where if mixture.apply_to == "generated" else lambda *_: None
    bank.attach()
    try:
        with bank.steps(network, where), _announcing(network, timeline.begin):
            yield mixture
    finally:
        bank.detach()


class Timeline:
    """Tracks where forward passes are in their sequence, and which of their positions are steered."""

    def __init__(self, prompt_length: int | None) -> None:
        if prompt_length is not None and prompt_length < 1:
            raise SteeringError(f"prompt_length is {prompt_length}: a prompt has at least one token")
        self._given = prompt_length
        self._prompt_length = prompt_length
        self._seen = 0  # positions of the sequence that passes have covered
        self._generating = False

    @contextmanager
    def begin(self, prompt_length: int) -> Iterator[None]:
        """Start a new sequence, whose prompt has this many positions, while generate runs."""
        self._prompt_length, self._seen, self._generating = self._given or prompt_length, 0, True
        try:
            yield
        finally:
            self._prompt_length, self._generating = self._given, False

    def where(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The steered positions of the next pass, bool `[1, positions]`; None for all of them."""
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1])
        inputs: torch.Tensor = next(one for one in given if one is not None)  # [rows, positions, …]
        length = inputs.shape[1]
        past = self._past(length, kwargs)
        self._seen = past + length
        prompt_length = self._prompt_length or (past + 1 if past else length)
        first = prompt_length - 1 - past
        return None if first <= 0 else (torch.arange(length, device=inputs.device) >= first).unsqueeze(0)

    def _past(self, length: int, kwargs: Mapping[str, Any]) -> int:
        """Positions before this pass.

        If the cache has no length, a pass no longer than the positions seen so far continues from them: generate's
        passes over a whole sequence only grow.
        """
        cache: Any = next((kwargs[name] for name in STATE_ARGUMENTS if kwargs.get(name) is not None), None)
        try:
            known = int(cache.get_seq_length())
        except (AttributeError, ValueError):  # no cache, or one that has no length, as those of recurrent models
            known = None
        if cache is None or known:
            return known or 0
        unsure = known is None or self._generating
        return self._seen if unsure and length <= self._seen else 0


def _mixture(
    steering: Steering, strength: float, layers: Sequence[int] | None, apply_to: ApplyTo, preserve_norm: bool
) -> Mixture:
    if not isinstance(steering, Profile) and (strength != 1.0 or layers is not None):
        raise SteeringError("strength and layers belong to a single profile; in a mix, set them for each term")
    if isinstance(steering, Mixture):
        if apply_to != "generated" or preserve_norm:
            raise SteeringError("a Mixture has its own apply_to and preserve_norm: set them there")
        return steering
    if isinstance(steering, Profile):
        terms: tuple[Term, ...] = (Term(steering, strength, None if layers is None else tuple(layers)),)
    else:
        terms = tuple(Term(profile, alpha) for profile, alpha in steering)
    return Mixture(terms, apply_to=apply_to, preserve_norm=preserve_norm)


@contextmanager
def _announcing(model: PreTrainedModel, begin: Callable[[int], Any]) -> Iterator[None]:
    """Run each call of `model.generate` inside `begin(prompt length)`: only generate knows where its prompt ends."""
    if not hasattr(model, "generate"):
        yield
        return
    own, generate = vars(model).get("generate"), model.generate

    def announced(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise SteeringError(
                "the prompts are padded on the right, so they have no common last position: "
                "set tokenizer.padding_side = 'left'"
            )
        given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        # without a prompt, generate starts from a single BOS token
        with begin(next((int(one.shape[1]) for one in given if one is not None), 1)):
            return generate(*args, **kwargs)

    model.generate = announced
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own
