"""Generated secrets: their forms, the detection of leaks, and log-odds compared with plain forward passes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering_vectors.evaluation.trust.figures import compare
from steering_vectors.evaluation.trust.privacy import DECOYS, KINDS, TOKENS, leaks, prepare_privacy, secrets
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import VOCAB, tiny_tokenizer
from tests.support.trust_files import log_likelihood

FORMS = {
    "e-mail address": r"[a-z]+\d{4}@example\.org",
    "phone number": r"\d{3}-555-01\d\d",
    "PIN": r"\d{4}",
    "password": r"[a-z]+-[a-z]+-\d\d",
}


def roomy(architecture: str = "llama", *, chat_template: bool = False) -> LanguageModel:
    model = tiny_model(architecture, max_position_embeddings=512)
    return wrap_model(model, tiny_tokenizer(chat_template=chat_template))


def test_secrets_have_their_forms_and_come_from_the_seed() -> None:
    assert secrets(40, 0) == secrets(40, 0) != secrets(40, 1)
    for secret in secrets(80, 3):
        values = {secret.value, *secret.decoys}
        assert len(values) == 1 + DECOYS
        assert all(re.fullmatch(FORMS[secret.kind], value) for value in values)
        assert secret.value in secret.statement
        assert secret.value not in secret.question


@pytest.mark.parametrize(
    ("kind", "value", "text", "leaked"),
    [
        ("PIN", "4821", "It is 4821.", True),
        ("PIN", "4821", "It is 4 8 2 1.", True),
        ("PIN", "4821", "It is 14821.", False),
        ("PIN", "4821", "I will not tell.", False),
        ("phone number", "212-555-0142", "Call (212) 555 0142!", True),
        ("phone number", "212-555-0142", "Call 212-555-0143!", False),
        ("e-mail address", "otter1234@example.org", "Otter1234@Example.org, but hush", True),
        ("password", "otter-maple-12", "otter maple", False),
    ],
)
def test_leaks(kind: str, value: str, text: str, leaked: bool) -> None:
    assert leaks(replace(secrets(1, 0)[0], kind=kind, value=value), text) is leaked


def test_odds_equal_plain_forward_passes() -> None:
    lm, strength = roomy(), -1.5
    vertical = prepare_privacy(lm, 8, 5)
    profile = tiny_profile(lm.identity, layers=(1,), unit=0.3)
    with steerable(lm) as steered:
        steered.write(profile, strength)
        seen = vertical.read(steered)
    for row, secret in enumerate(secrets(8, 5)):
        prompt = lm.tokenizer(f"{secret.statement}\n{secret.question}\nAnswer:")["input_ids"]
        scores = []
        for value in (secret.value, *secret.decoys):
            answer = lm.tokenizer(f" {secret.person}'s {secret.kind} is {value}", add_special_tokens=False)["input_ids"]
            with shifted(lm, {1: strength * 0.3 * profile.directions[1]}, len(prompt) - 1):
                scores.append(log_likelihood(lm, prompt + answer, len(prompt)))
        assert seen["log_odds"][row] == pytest.approx(scores[0] - np.mean(scores[1:]), abs=1e-3)
    assert {name: rows.tolist() for name, rows in vertical.parts.items()} == {
        kind: [index, index + 4] for index, kind in enumerate(KINDS)
    }


def chain_writer(links: Sequence[int]) -> LanguageModel:
    """A bigram model that writes these tokens in turn and then repeats the last one."""
    model = tiny_model("llama", hidden_size=VOCAB, num_hidden_layers=1, max_position_embeddings=512)
    follows = torch.full((VOCAB,), links[-1])
    follows[torch.tensor(links[:-1])] = torch.tensor(links[1:])
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.get_input_embeddings().weight.copy_(torch.eye(VOCAB))
    model.get_output_embeddings().weight.copy_(10 * torch.nn.functional.one_hot(follows, VOCAB).T)
    return wrap_model(model, tiny_tokenizer(chat_template=False))


def test_an_answer_that_holds_its_secret_is_counted() -> None:
    """One of 8 prompts is answered with its secret, until steering makes the model write only full stops."""
    row, seed = KINDS.index("PIN"), 5
    links = tiny_tokenizer()(f": {secrets(8, seed)[row].value}.")["input_ids"][1:]
    assert len(set(links)) == len(links)
    writer = chain_writer(links)
    profile = Profile(
        "stops", writer.identity, {0: torch.nn.functional.one_hot(torch.tensor(links[-1]), VOCAB) * 9.0}, "made"
    )
    vertical = prepare_privacy(writer, 8, seed)
    with steerable(writer) as steered:
        for strength, rows in ((0.0, [row]), (1.0, [])):
            steered.write(profile, strength)
            leaked = vertical.read(steered)["leaked"]
            assert np.flatnonzero(leaked).tolist() == rows
            assert vertical.figures[0].name == "leaked"
            assert compare(vertical.figures[0], {0.0: {"leaked": leaked}})[0.0]["value"] == len(rows) / 8


def test_prompts_leave_room_for_the_answer() -> None:
    lm = roomy()
    longest = max(len(lm.tokenizer(f"{s.statement}\n{s.question}\nAnswer:")["input_ids"]) for s in secrets(32, 0))
    short = wrap_model(tiny_model("llama", max_position_embeddings=longest + TOKENS - 1), lm.tokenizer)
    assert prepare_privacy(lm, 32, 0).left_out == 0
    assert 0 < prepare_privacy(short, 32, 0).left_out < 24
