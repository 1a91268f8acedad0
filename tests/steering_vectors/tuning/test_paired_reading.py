"""One response under two prompts: aligned positions, equal tokens, plain references."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.data.chat import Example, Message, encode_example
from steering_vectors.errors import FitError
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.tuning.instructions import DEFAULTS, GENERAL, Instructions, instructed, instructions_for
from steering_vectors.tuning.paired_reading import Twin, grouped, mean_differences, pad_id, readings
from steering_vectors.tuning.twins import twins_of
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

ARCHITECTURES = ("llama", "gpt2", "opt", "bloom", "gpt_neox", "gemma3_text")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def twins(seed: int = 0) -> list[Twin]:
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (length,), generator=draw).tolist())

    return [Twin(ids(long), ids(short), ids(response)) for long, short, response in ((9, 4, 3), (5, 7, 6), (6, 6, 2))]


def alone(lm: LanguageModel, prompt: tuple[int, ...], twin: Twin, layer: int) -> torch.Tensor:
    """The response's activations in a separate pass, at the positions of the longer prompt: `[response, hidden]`."""
    ids = torch.tensor([[*prompt, *twin.response]])
    positions = torch.arange(twin.length - ids.shape[1], twin.length).unsqueeze(0)
    with torch.no_grad(), record(lm.blocks, [layer]) as outputs:
        lm.model(input_ids=ids, position_ids=positions, use_cache=False)
    return outputs[layer][0, len(prompt) :]


def test_mean_differences_equal_a_plain_reference(lm: LanguageModel) -> None:
    found = mean_differences(lm, twins(), [0, 2], batch_tokens=20)
    for layer in (0, 2):
        each = [(alone(lm, t.positive, t, layer) - alone(lm, t.negative, t, layer)).mean(0) for t in twins()]
        torch.testing.assert_close(found[layer].float(), torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)


def test_the_last_token_alone(lm: LanguageModel) -> None:
    found = mean_differences(lm, twins(), [1], tokens="last")
    each = [(alone(lm, t.positive, t, 1) - alone(lm, t.negative, t, 1))[-1] for t in twins()]
    torch.testing.assert_close(found[1].float(), torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_of_unequal_length_leave_no_position_offset(architecture: str) -> None:
    """Prompts that differ only in padding give difference 0, whatever else is in the batch."""
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    longer, same = (11, 12, 13, 14, 15, 16, 17, 18), (21, 22, 23)
    found = mean_differences(lm, [Twin(same, same, (31, 32, 33))], [0])
    assert float(found[0].abs().max()) == 0
    both, _ = readings([Twin(longer, same, (31, 32)), Twin(same, same, (33,))], pad_id(lm), "cpu")
    assert both.positions[:, both.start].tolist() == [8, 3]


def test_both_readings_hold_the_response_at_equal_positions(lm: LanguageModel) -> None:
    positive, negative = readings(twins(), pad_id(lm), "cpu")
    assert positive.start == negative.start == 9
    assert torch.equal(positive.positions, negative.positions)
    assert torch.equal(positive.ids[:, 9:], negative.ids[:, 9:])
    assert positive.mask.sum(1).tolist() == [12, 11, 8]
    assert negative.mask.sum(1).tolist() == [7, 13, 8]


def test_groups_keep_to_their_budget() -> None:
    assert [len(group) for group in grouped(twins() * 4, 30)] == [2, 2, 2, 2, 3, 1]
    assert [len(group) for group in grouped(twins(), 1)] == [1, 1, 1]


def test_no_response_is_an_error(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match="there are no responses to read under both prompts"):
        mean_differences(lm, [], [0])


def test_no_twin_has_a_second_bos(lm: LanguageModel) -> None:
    bos = lm.tokenizer.bos_token_id
    plain = [Example("Ask again", " and again"), Example(None, "The boat turned"), Example("Ask", "kindly")]
    made = twins_of(lm.tokenizer, plain, [encode_example(lm.tokenizer, one) for one in plain], DEFAULTS["warm"])
    for twin, example in zip(made, plain, strict=True):
        for prompt in (twin.positive, twin.negative):
            assert [*prompt, *twin.response].count(bos) == 1
            assert lm.tokenizer.decode([*prompt, *twin.response], skip_special_tokens=True).endswith(
                (example.prompt or "") + example.completion
            )


def test_a_response_keeps_the_tokens_of_its_plain_prompt(lm: LanguageModel) -> None:
    example = Example((Message("user", "Would you like some soup?"),), "Yes, please.")
    ids, start = encode_example(lm.tokenizer, example)
    (twin,) = twins_of(lm.tokenizer, [example], [(ids, start)], DEFAULTS["warm"])
    assert twin.response == tuple(ids[start:])
    assert twin.positive[-4:] == tuple(ids[start - 4 : start])


def test_examples_that_no_longer_fit_are_left_out(lm: LanguageModel) -> None:
    examples = [Example("Ask", "kindly"), Example("Ask", "kindly " * 30)]
    encoded = [encode_example(lm.tokenizer, one) for one in examples]
    instructions = Instructions("Be kind.", "Be rude.")
    limit = len(encoded[1][0])
    assert len(twins_of(lm.tokenizer, examples, encoded, instructions, limit=limit)) == 1
    with pytest.raises(FitError, match="no example fits the model's context of 5 tokens"):
        twins_of(lm.tokenizer, examples, encoded, instructions, limit=5)


def test_a_sample_is_drawn_from_the_seed(lm: LanguageModel) -> None:
    examples = [Example(f"Ask {i}", "kindly") for i in range(20)]
    encoded = [encode_example(lm.tokenizer, one) for one in examples]

    def drawn(seed: int) -> list[Twin]:
        return twins_of(lm.tokenizer, examples, encoded, DEFAULTS["warm"], max_twins=5, seed=seed)

    assert len(drawn(0)) == 5
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_where_an_instruction_stands(lm: LanguageModel) -> None:
    tokenizer, user = lm.tokenizer, Message("user", "Ask")
    assert instructed(tokenizer, None, "Be kind.") == "Be kind.\n\n"
    assert instructed(tokenizer, "Ask", "Be kind.") == "Be kind.\n\nAsk"
    assert instructed(tokenizer, (user,), "Be kind.") == (Message("system", "Be kind."), user)
    system = Message("system", "Today is Monday.")
    led = Message("system", "Be kind.\n\nToday is Monday.")
    assert instructed(tokenizer, (system, user), "Be kind.") == (led, user)


def test_a_template_without_system_messages_has_it_in_the_first_turn() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    assert instructed(tokenizer, (Message("user", "Ask"),), "Be kind.") == (Message("user", "Be kind.\n\nAsk"),)


def test_default_and_custom_instructions() -> None:
    assert instructions_for("warm") == DEFAULTS["warm"]
    assert instructions_for("anything else") == DEFAULTS[GENERAL]
    assert instructions_for("warm", "Sing.", "Be silent.") == Instructions("Sing.", "Be silent.")
    with pytest.raises(FitError, match="give both instructions"):
        instructions_for("warm", "Sing.")
    with pytest.raises(FitError, match="is empty"):
        Instructions(" ", "Be silent.")
    with pytest.raises(FitError, match="are equal"):
        Instructions("Sing.", "Sing.")
