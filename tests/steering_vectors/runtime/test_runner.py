"""A runner's output: logits, residuals and their sums equal those of one plain pass per row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.runtime.row_runners import RecomputingRunner, RowRunner
from steering_vectors.runtime.runner import BatchedRunner, RowInput, Runner
from steering_vectors.runtime.static_decoding import StaticRunner
from tests.support.running import attached_bank, mixture, prompts, random_profile
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

READ = [0, 2]
RUNNERS: dict[str, Callable[..., Runner]] = {
    "batched": BatchedRunner,
    "static": StaticRunner,
    "row by row": partial(RowRunner, chunked=True),
    "recomputing": RecomputingRunner,
}
anywhere = pytest.mark.parametrize("make", RUNNERS.values(), ids=RUNNERS)


def plain_pass(lm: LanguageModel, ids: list[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits `[positions, vocabulary]` and block outputs `[positions, hidden]` by layer."""
    with record(lm.blocks, READ) as outputs:
        logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits, {layer: hidden[0] for layer, hidden in outputs.items()}


@anywhere
def test_every_row_has_its_logits_residuals_and_sums(make: Callable[..., Runner]) -> None:
    """Prompts in two passes of unequal chunks, then one token each, in slots with a gap between them."""
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    texts = dict(zip((0, 2, 3), prompts(lm, [9, 6, 7]), strict=True))
    with attached_bank(lm, 4) as bank:
        runner = make(lm, bank, context=32)
        done = dict.fromkeys(texts, 0)
        for chunks in ({0: 4, 2: 3, 3: 5}, {0: 4, 2: 2, 3: 1}, {0: 1, 2: 1, 3: 1}):
            batch = [RowInput(slot, texts[slot][done[slot] : done[slot] + n], done[slot]) for slot, n in chunks.items()]
            output = runner.forward(batch, READ)
            for place, row in enumerate(batch):
                logits, states = plain_pass(lm, texts[row.slot][: row.end])
                torch.testing.assert_close(output.logits[place], logits[-1], atol=1e-4, rtol=1e-3)
                for layer in READ:
                    own = states[layer][row.start :]
                    torch.testing.assert_close(output.residuals[row.slot][layer], own[-1], atol=1e-4, rtol=1e-3)
                    torch.testing.assert_close(output.sums[row.slot][layer], own.sum(0), atol=1e-4, rtol=1e-3)
                done[row.slot] = row.end
        runner.close()


@anywhere
def test_wanted_logits_come_with_residuals(make: Callable[..., Runner]) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    texts = prompts(lm, [9, 6])
    with attached_bank(lm, 3) as bank:
        runner = make(lm, bank, context=32)
        batch = [RowInput(0, texts[0], 0, wanted=4), RowInput(2, texts[1], 0, wanted=1)]
        output = runner.forward_all(batch, READ)
        for row, logits in zip(batch, output.logits, strict=True):
            expected, states = plain_pass(lm, list(row.ids))
            torch.testing.assert_close(logits, expected[-row.wanted :], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(output.residuals[row.slot][2], states[2][-1], atol=1e-4, rtol=1e-3)
        runner.close()


@anywhere
def test_residuals_are_read_after_steering(make: Callable[..., Runner]) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    profile = random_profile(lm, layers=[0], scale=3.0)
    (ids,) = prompts(lm, [5])
    with attached_bank(lm, 1) as bank:
        runner = make(lm, bank, context=32)
        before = runner.forward([RowInput(0, ids, 0)], READ).residuals[0][0]
        bank.write(0, mixture(profile))
        after = runner.forward([RowInput(0, ids, 0, steered_from=4)], READ).residuals[0][0]
        torch.testing.assert_close(after, before + profile.directions[0])
        runner.close()


@anywhere
def test_nothing_is_read_unless_asked_for(make: Callable[..., Runner]) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    (ids,) = prompts(lm, [5])
    with attached_bank(lm, 1) as bank:
        runner = make(lm, bank, context=32)
        output = runner.forward([RowInput(0, ids, 0)])
        assert (output.residuals, output.sums) == ({}, {})
        assert runner.forward([RowInput(0, [7], 5)], READ).residuals
        assert not runner.forward([RowInput(0, [7], 6)]).residuals
        runner.close()
