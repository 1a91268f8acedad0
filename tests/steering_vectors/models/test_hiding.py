"""Hiding part of a text from a model's upper blocks, or refusing the model."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.errors import FitError
from steering_vectors.methods.tuned import mean_log_likelihoods
from steering_vectors.models.hiding import check_hiding
from steering_vectors.models.hooks import hide, hiding, record
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.tuning.paired_reading import Twin, pad_id, readings
from tests.support.tiny import REQUIRED, tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

ALSO = ("bloom", "gemma2", "gpt_oss", "gptj", "deepseek_v3")
RECURRENT = ("mamba", "rwkv", "falcon_h1", "recurrent_gemma", "lfm2")
START, QUESTION, RESPONSE = (0,), (21, 22, 23), (31, 32, 33, 34)
TWINS = [
    Twin((*START, 5, 6, 7, *QUESTION), (*START, 50, 60, 70, *QUESTION), RESPONSE),
    Twin((*START, 8, *QUESTION), (*START, 80, *QUESTION), RESPONSE[:2]),
]


def tiny(architecture: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture), tiny_tokenizer())


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny("llama")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*REQUIRED, *ALSO])
def test_an_instruction_hidden_from_every_block_changes_no_response(architecture: str) -> None:
    lm = tiny(architecture)
    check_hiding(lm, 1)
    with torch.no_grad():
        positive, negative = mean_log_likelihoods(lm, TWINS, lm.blocks)
        seen, other = mean_log_likelihoods(lm, TWINS)
    torch.testing.assert_close(positive, negative, atol=1e-5, rtol=0)
    assert float((seen - other).abs().min()) > 1e-3


def test_hidden_from_the_upper_blocks_it_still_acts_through_the_lower_ones(llama: LanguageModel) -> None:
    with torch.no_grad():
        positive, negative = mean_log_likelihoods(llama, TWINS, llama.blocks[2:])
        everywhere, _ = mean_log_likelihoods(llama, TWINS)
    assert float((positive - negative).abs().min()) > 1e-4
    assert float((positive - everywhere).abs().min()) > 1e-4


def test_hiding_ends_with_the_context(llama: LanguageModel) -> None:
    side, _ = readings(TWINS, pad_id(llama), "cpu")

    def output() -> torch.Tensor:
        with torch.no_grad(), record(llama.blocks, [2]) as outputs:
            llama.model(input_ids=side.ids, attention_mask=side.mask.long(), position_ids=side.positions)
        return outputs[2]

    before = output()
    with hiding(llama.blocks, side.instruction):
        assert not torch.equal(output(), before)
    assert torch.equal(output(), before)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_block_that_carries_along_what_its_mask_hides_is_refused(architecture: str) -> None:
    with pytest.raises(FitError, match=r"cannot be hidden from the upper blocks, which .* use option"):
        check_hiding(tiny(architecture), 1)


def test_only_tokens_where_the_prompts_differ_are_hidden() -> None:
    assert [twin.shared for twin in TWINS] == [(1, 3), (1, 3)]
    assert Twin((1, 2, 3), (1, 2, 3), (4,)).shared == (3, 0)
    assert Twin((7, 7, 7), (7, 7), (4,)).shared == (0, 2)
    assert Twin((1, 2), (3, 4), (5,)).shared == (0, 0)
    for side in readings(TWINS, 0, "cpu"):
        assert side.instruction.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 3]]
    same, _ = readings([Twin((1, 2, 3), (1, 2, 3), (4,))], 0, "cpu")
    assert not same.instruction.any()


COLUMNS = torch.tensor([[False, True, False]])
ROWS = [[True, False, False], [True, True, False], [True, False, True]]  # causal, without column 1 in the last row


def test_a_mask_keeps_its_form() -> None:
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16).masked_fill(~causal, -torch.inf)
    assert hide(None, COLUMNS).tolist() == [[ROWS]]
    assert hide(causal, COLUMNS).tolist() == [[ROWS]]
    found = hide(added, COLUMNS)
    assert found.dtype == torch.bfloat16
    assert (found == 0).tolist() == [[ROWS]]


def test_masks_of_other_forms_are_refused() -> None:
    for mask in (torch.ones(1, 3), torch.ones(1, 1, 3, 4)):
        with pytest.raises(FitError, match="have a form in which no token can be hidden"):
            hide(mask, COLUMNS)
