"""Steering inside a forward pass: shifts at exactly the steered positions, the order of operators, and hooks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import TypeVar

import pytest
import torch
from transformers import PreTrainedModel

from steering_vectors.errors import SteeringError
from steering_vectors.models.blocks import find_blocks
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import wrap_model
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from steering_vectors.steering.bank import SteeringBank, shifts_in
from tests.support.tiny import HIDDEN, STEERABLE, tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer

TUPLES = ("gpt2", "gptj", "bloom", "mpt", "rwkv")
IDS = torch.randint(2, 300, (3, 10), generator=torch.Generator().manual_seed(0))
WARM = tiny_profile(name="warm", layers=(1,), unit=0.5)
TERSE = tiny_profile(name="terse", layers=(0, 2), seed=1)
EVERYWHERE = tiny_profile(name="everywhere", layers=(0, 1, 2), seed=3, unit=0.37)
BARE = tiny_profile(name="bare", layers=(1,), operator="ablate", seed=2)


def mix(*terms: tuple[Profile, float], preserve_norm: bool = False) -> Mixture:
    return Mixture(tuple(Term(*term) for term in terms), preserve_norm=preserve_norm)


blocks_of = cache(find_blocks)  # found by a dry run, which must not happen inside a step


Bank = TypeVar("Bank", bound=SteeringBank)


@contextmanager
def banked_as(kind: type[Bank], model: PreTrainedModel, *mixtures: Mixture, dtype: torch.dtype) -> Iterator[Bank]:
    """A bank attached to the model, with one row per mixture."""
    bank = kind(blocks_of(model), rows=len(mixtures), hidden_size=HIDDEN, dtype=dtype)
    for row, mixture in enumerate(mixtures):
        bank.write(row, mixture)
    bank.attach()
    try:
        yield bank
    finally:
        bank.detach()


def banked(
    model: PreTrainedModel, *mixtures: Mixture, dtype: torch.dtype = torch.float32
) -> AbstractContextManager[SteeringBank]:
    return banked_as(SteeringBank, model, *mixtures, dtype=dtype)


def accelerated(
    model: PreTrainedModel, *mixtures: Mixture, dtype: torch.dtype = torch.float32
) -> AbstractContextManager[AcceleratedBank]:
    return banked_as(AcceleratedBank, model, *mixtures, dtype=dtype)


def outputs(model: PreTrainedModel, ids: torch.Tensor = IDS) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The output of every block, and the logits, of one pass."""
    blocks = blocks_of(model)
    with record(blocks, range(len(blocks))) as seen:
        logits = model(ids, use_cache=False).logits
    return [seen[layer] for layer in range(len(blocks))], logits


def count_hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STEERABLE)
def test_invariant_2_the_shift_is_added_at_exactly_the_steered_positions(architecture: str) -> None:
    model = tiny_model(architecture)
    profile = tiny_profile(model, layers=(1,), unit=0.5)
    before, plain = outputs(model)
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[0, 4:], where[1, 9], where[2, 2] = True, True, True
    alphas = (0.8, -1.5, 0.0)
    with banked(model, *(mix((profile, alpha)) for alpha in alphas)) as bank, bank.step(slice(0, 3), where):
        after, steered = outputs(model)
    assert torch.equal(after[0], before[0])
    for row, alpha in enumerate(alphas):
        expected = before[1][row].clone()
        expected[where[row]] += (alpha * 0.5) * profile.directions[1]
        assert torch.equal(after[1][row], expected)
    assert not torch.equal(after[2][0, 4:], before[2][0, 4:])
    assert not torch.equal(steered[0], plain[0])
    assert torch.equal(steered[2], plain[2])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_positions_before_the_first_steered_one_stay_bitwise_equal(architecture: str) -> None:
    model = tiny_model(architecture)
    where = (torch.arange(10) >= 6).expand(3, -1)
    _, plain = outputs(model)
    with banked(model, *[mix((TERSE, 1.0))] * 3) as bank, bank.step(slice(0, 3), where):
        _, steered = outputs(model)
    assert torch.equal(steered[:, :6], plain[:, :6])
    assert not torch.isclose(steered[:, 6:], plain[:, 6:]).all(-1).any()


@pytest.mark.parametrize("architecture", ["llama", *TUPLES])
def test_outside_of_a_step_and_with_nothing_to_do_outputs_are_bitwise_equal(architecture: str) -> None:
    model = tiny_model(architecture)
    _, plain = outputs(model)
    with banked(model, mix((TERSE, 1.0)), Mixture(), mix((TERSE, 0.0)), Mixture()) as bank:
        assert torch.equal(outputs(model)[1], plain)
        with bank.step(slice(1, 4)):
            assert torch.equal(outputs(model)[1], plain)
        bank.clear(0)
        with bank.step(slice(1, 4)):
            assert torch.equal(outputs(model)[1], plain)


def test_rows_differ_and_are_taken_in_batch_order() -> None:
    model = tiny_model("llama")
    mixtures = [mix((WARM, 1.0)), Mixture(), mix((TERSE, -0.5)), mix((WARM, 0.3), (TERSE, 0.3))]
    with banked(model, *mixtures) as bank:
        with bank.step(torch.tensor([3, 0, 2])):
            together = outputs(model)[1]
        for place, row in enumerate((3, 0, 2)):
            with bank.step(slice(row, row + 1)):
                alone = outputs(model, IDS[place : place + 1])[1]
            torch.testing.assert_close(together[place : place + 1], alone)


def test_a_single_row_steers_a_whole_batch() -> None:
    model = tiny_model("llama")
    mixture = mix((TERSE, 1.0), (BARE, 0.5), preserve_norm=True)
    where = (torch.arange(10) >= 4).unsqueeze(0)
    with banked(model, mixture) as bank, bank.step(slice(0, 1), where):
        one = outputs(model)[1]
    with banked(model, mixture, mixture, mixture) as bank, bank.step(slice(0, 3), where.expand(3, -1)):
        each = outputs(model)[1]
    torch.testing.assert_close(one, each)


def steered_block(mixture: Mixture, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's output before and after steering, `[3, 10, hidden]` each."""
    model = tiny_model("llama")
    before, _ = outputs(model)
    with banked(model, mixture) as bank, bank.step(slice(0, 1)):
        after, _ = outputs(model)
    return before[layer], after[layer]


def test_ablation_removes_a_part_of_the_direction() -> None:
    unit = BARE.directions[1] / BARE.directions[1].norm()
    for beta in (0.25, 1.0):
        before, after = steered_block(mix((BARE, beta)))
        torch.testing.assert_close(after @ unit, (1 - beta) * (before @ unit))
        torch.testing.assert_close(after, before - beta * (before @ unit).unsqueeze(-1) * unit)


def test_preserve_norm() -> None:
    before, after = steered_block(mix((WARM, 1.5), preserve_norm=True))
    moved = before + 0.75 * WARM.directions[1]
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    torch.testing.assert_close(after, moved * (before.norm(dim=-1) / moved.norm(dim=-1)).unsqueeze(-1))


def test_the_order_is_add_then_ablate_then_preserve() -> None:
    unit = BARE.directions[1] / BARE.directions[1].norm()
    before, after = steered_block(mix((BARE, 0.7), (WARM, 1.0), preserve_norm=True))
    hidden = before + 0.5 * WARM.directions[1]
    hidden = hidden - 0.7 * (hidden @ unit).unsqueeze(-1) * unit
    hidden = hidden * (before.norm(dim=-1) / hidden.norm(dim=-1)).unsqueeze(-1)
    torch.testing.assert_close(after, hidden)


def test_ablation_and_preserve_norm_keep_to_their_rows_blocks_and_positions() -> None:
    model = tiny_model("llama")
    before, plain = outputs(model)
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[1, 5], where[2, 7] = True, True
    mixtures = (Mixture(preserve_norm=True), mix((BARE, 1.0)), mix((WARM, 1.0), preserve_norm=True))
    with banked(model, *mixtures) as bank, bank.step(slice(0, 3), where):
        after, steered = outputs(model)
    changed = (after[1] != before[1]).any(-1)
    assert torch.equal(changed, where)
    assert torch.equal(after[0], before[0])
    assert torch.equal(steered[0], plain[0])


def test_a_zero_residual_stays_zero_under_preserve_norm() -> None:
    model = tiny_model("llama")
    for block in blocks_of(model)[:2]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.zero_()
    with banked(model, mix((WARM, 1.0), preserve_norm=True)) as bank, bank.step(slice(0, 1)):
        after, logits = outputs(model)
    assert not after[1].any()
    assert logits.isfinite().all()


def test_a_mix_is_summed_in_float32_and_cast_once() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    layers = (0, 1, 2)
    mixture = mix(*((tiny_profile(name=f"p{i}", layers=layers, seed=i, unit=0.37), 0.3) for i in range(5)))
    with banked(model, mixture, dtype=torch.bfloat16) as bank:
        for layer, total in mixture.shifts().by_layer().items():
            assert torch.equal(bank.shift[layer, 0], total.to(torch.bfloat16))
        before, _ = outputs(model)
        with bank.step(slice(0, 1)):
            after, logits = outputs(model)
        assert torch.equal(after[0], before[0] + bank.shift[0, 0])
        assert logits.dtype == torch.bfloat16


def test_a_block_in_another_dtype_keeps_it() -> None:
    """The bank is in float32, the blocks compute in bfloat16."""
    model = tiny_model("llama").to(torch.bfloat16)
    with banked(model, mix((WARM, 1.0), (BARE, 1.0))) as bank, bank.step(slice(0, 1)):
        after, _ = outputs(model)
    assert {hidden.dtype for hidden in after} == {torch.bfloat16}


def empty_bank(rows: int, dtype: torch.dtype, kind: type[Bank]) -> Bank:
    return kind([torch.nn.Identity()] * 3, rows=rows, hidden_size=HIDDEN, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_strength_is_what_a_fresh_bank_is_given(dtype: torch.dtype) -> None:
    bank = empty_bank(2, dtype, AcceleratedBank)
    for strength, preserve in ((1.0, False), (-0.3, True), (1 / 3, False), (0.0, True), (0.7, False)):
        mixture, fresh = mix((EVERYWHERE, strength), preserve_norm=preserve), empty_bank(2, dtype, SteeringBank)
        bank.write(1, mixture)
        fresh.write(1, mixture)
        assert torch.equal(bank.shift, fresh.shift)
        assert bank.only_adds == fresh.only_adds
    assert bank.shift[:, 1].any()


@pytest.mark.parametrize("kind", [SteeringBank, AcceleratedBank])
@pytest.mark.parametrize("profile", [WARM, EVERYWHERE], ids=lambda profile: profile.name)
def test_a_shift_that_overflows_is_refused_and_leaves_the_row(profile: Profile, kind: type[SteeringBank]) -> None:
    bank = empty_bank(1, torch.float16, kind)
    bank.write(0, mix((profile, 1.0)))
    kept = bank.shift.clone()
    with pytest.raises(SteeringError) as refusal:
        bank.write(0, Mixture((Term(profile, 1e9),), allow_beyond_safe=True))
    assert refusal.value.message == "the shift overflows the model's dtype: use a smaller strength"
    assert refusal.value.param == "strength"
    assert torch.equal(bank.shift, kept)


def test_the_largest_number_is_allowed() -> None:
    """The sum of the largest entries is beyond it, the shift itself is not."""
    bank, largest = empty_bank(1, torch.float32, SteeringBank), torch.finfo(torch.float32).max
    profiles = []
    for place, name in enumerate("ab"):
        direction = torch.zeros(HIDDEN)
        direction[place] = largest
        profiles.append(replace(tiny_profile(name=name, layers=(1,), unit=1.0), directions={1: direction}))
    bank.write(0, mix((profiles[0], 1.0), (profiles[1], 1.0)))
    assert bank.shift[1, 0, :2].tolist() == [largest, largest]


@pytest.mark.parametrize("mixture", [mix((WARM, 1.0)), mix((WARM, 1.0), preserve_norm=True)])
def test_a_cleared_row_leaves_outputs_alone_to_the_sign_of_zero(mixture: Mixture) -> None:
    blocks, zeros = [torch.nn.Identity() for _ in range(3)], -torch.zeros(1, 4, HIDDEN)
    bank = SteeringBank(blocks, rows=1, hidden_size=HIDDEN, dtype=torch.float32)
    bank.detach()  # nothing is attached yet
    bank.write(0, mixture)
    bank.clear(0)
    assert bank.only_adds
    bank.attach()
    with bank.step(slice(0, 1)):
        assert all(torch.signbit(block(zeros)).all() for block in blocks)
    bank.detach()


@pytest.mark.parametrize(("unit", "refused"), [(40_000.0, True), (30_000.0, False)])
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_a_sum_of_profiles_that_overflows_is_refused(layers: tuple[int, ...], unit: float, refused: bool) -> None:
    """Each alone is within float16's largest number, 65,504."""
    bank, ones = empty_bank(1, torch.float16, AcceleratedBank), {layer: torch.ones(HIDDEN) for layer in layers}
    profiles = [replace(tiny_profile(name=name, layers=layers, unit=unit), directions=ones) for name in ("a", "b")]
    for profile in profiles:
        shifts_in(mix((profile, 1.0)), bank.shift.dtype)
    both = mix((profiles[0], 1.0), (profiles[1], 1.0))
    if refused:
        with pytest.raises(SteeringError, match="the shift overflows the model's dtype: use a smaller strength"):
            bank.write(0, both)
        assert not bank.shift.any()
    else:
        bank.write(0, both)
        assert all((bank.shift[layer, 0] == 60_000).all() for layer in layers)


def test_a_block_that_claims_its_shifts_gets_them_once() -> None:
    model = tiny_model("llama")
    block = blocks_of(model)[1]
    plain = block.forward

    def adds_itself(*args: object, **kwargs: object) -> torch.Tensor:
        shifts = bank.claim(1, 1)
        hidden: torch.Tensor = plain(*args, **kwargs)
        return hidden if shifts is None else hidden + shifts

    with accelerated(model, mix((EVERYWHERE, 1.0)), mix((BARE, 1.0))) as bank:
        with bank.step(slice(0, 1)):
            expected = outputs(model)[1]
        assert bank.claim(1, 1) is None  # no step is running
        block.forward = adds_itself
        with bank.step(slice(0, 1)):
            assert torch.equal(outputs(model)[1], expected)
            assert bank.claim(1, 1) is None  # a row ablates
        bank.clear(1)
        with bank.step(slice(0, 1)):
            assert torch.equal(outputs(model)[1], expected)
            assert bank.claim(1, 2) is None  # the number of rows differs
        del block.forward
        with suppress(KeyboardInterrupt), bank.step(slice(0, 1)):
            bank.claim(1, 1)
            raise KeyboardInterrupt
        with bank.step(slice(0, 1)):  # earlier claims are dropped
            assert torch.equal(outputs(model)[1], expected)
        with bank.step(slice(0, 1), torch.ones(1, 10, dtype=torch.bool)):
            assert bank.claim(1, 1) is None  # the hook has the positions


def test_what_a_block_may_claim() -> None:
    bank = AcceleratedBank([torch.nn.Identity()] * 3, rows=2, hidden_size=HIDDEN, dtype=torch.float32)
    bank.write(0, mix((WARM, 1.0)))
    with bank.step(slice(0, 2)):
        claimed = bank.claim(1, 2)
        assert claimed is not None
        assert torch.equal(claimed, bank.shift[1].unsqueeze(1))
        assert bank.claim(0, 2) is None  # nothing to add at this block
    with bank.step(slice(0, 2), always=True):
        zeros = bank.claim(0, 2)
        assert zeros is not None
        assert not zeros.any()
    with bank.step(slice(0, 2)):
        assert bank.claim(0, 2) is None


def test_nothing_is_claimed_in_a_pass_that_steers_nothing() -> None:
    model, found = tiny_model("llama"), list[torch.Tensor | None]()
    block = blocks_of(model)[1]
    plain = block.forward

    def claims(*args: object, **kwargs: object) -> torch.Tensor:
        found.append(bank.claim(1, 3))
        hidden: torch.Tensor = plain(*args, **kwargs)
        return hidden

    with accelerated(model, Mixture()) as bank, bank.steps(model, lambda *_: None):
        block.forward = claims
        model(IDS)
    assert found == [None]


@pytest.mark.parametrize("kind", [SteeringBank, AcceleratedBank])
def test_a_bank_over_a_model_has_its_shape_dtype_and_device(kind: type[SteeringBank]) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    lm = wrap_model(model, tiny_tokenizer())
    bank = kind.over(lm, rows=4)
    assert (bank.shift.shape, bank.shift.dtype) == ((3, 4, HIDDEN), torch.bfloat16)
    bank.write(2, mix((WARM, 1.0)))
    bank.attach()
    before, _ = outputs(model)
    with bank.step(slice(2, 3)):
        after, _ = outputs(model)
    bank.detach()
    assert torch.equal(after[1], before[1] + bank.shift[1, 2])
    assert kind.over(replace(lm, model=model.to("meta")), rows=1).shift.device.type == "meta"


@pytest.mark.parametrize("kind", [SteeringBank, AcceleratedBank])
def test_a_watcher_is_called_before_each_change(kind: type[SteeringBank]) -> None:
    bank = empty_bank(2, torch.float32, kind)
    calls: list[tuple[int, Mixture | None, float]] = []
    bank.watch(lambda row, mixture: calls.append((row, mixture, float(bank.shift[:, row].abs().sum()))))
    mixes = [mix((EVERYWHERE, strength)) for strength in (1.0, 0.5)]
    sizes = [0.0]
    for mixture in mixes:
        bank.write(1, mixture)
        sizes.append(float(bank.shift[:, 1].abs().sum()))
    bank.clear(1)
    assert [(row, mixture) for row, mixture, _ in calls] == [(1, mixes[0]), (1, mixes[1]), (1, None)]
    assert [size for *_, size in calls] == sizes
    with pytest.raises(SteeringError):
        bank.write(1, Mixture((Term(WARM, 1e39),), allow_beyond_safe=True))
    assert len(calls) == 3  # nothing changed


def test_rewriting_and_clearing_leave_nothing_behind() -> None:
    model = tiny_model("llama")
    _, plain = outputs(model)
    with banked(model, mix((WARM, 1.0), (BARE, 1.0), preserve_norm=True)) as bank:
        bank.write(0, mix((TERSE, 0.5)))
        with bank.step(slice(0, 1)):
            rewritten = outputs(model)[1]
        bank.clear(0)
        bank.clear(0)
        assert not bank.shift.any()
        with bank.step(slice(0, 1)):
            assert torch.equal(outputs(model)[1], plain)
    with banked(model, mix((TERSE, 0.5))) as fresh, fresh.step(slice(0, 1)):
        assert torch.equal(outputs(model)[1], rewritten)


KINDS = {
    "add": mix((WARM, 1.0)),
    "add less": mix((WARM, -0.4)),
    "add everywhere": mix((EVERYWHERE, 1.0)),
    "add less everywhere": mix((EVERYWHERE, 0.3)),
    "add two": mix((EVERYWHERE, 0.5), (WARM, 0.5)),
    "ablate": mix((BARE, 1.0)),
    "add, ablate": mix((WARM, 1.0), (BARE, 1.0)),
    "add everywhere, ablate": mix((EVERYWHERE, 1.0), (BARE, 0.5)),
    "keep the norm": mix((WARM, 1.0), preserve_norm=True),
    "everywhere, keep the norm": mix((EVERYWHERE, 1.0), preserve_norm=True),
    "nothing": Mixture(),
}


@pytest.mark.slow
@pytest.mark.parametrize("first", KINDS)
def test_a_row_that_is_written_again_is_as_in_a_fresh_bank(first: str) -> None:
    """For every kind of mixture before and after."""
    model = tiny_model("llama")
    ids = IDS[:1, :4]
    for second, mixture in KINDS.items():
        with banked(model, mixture) as fresh, fresh.step(slice(0, 1)):
            expected = outputs(model, ids)[1]
        with accelerated(model, KINDS[first]) as bank:
            bank.write(0, mixture)
            assert bank.only_adds == fresh.only_adds, second
            with bank.step(slice(0, 1)):
                assert torch.equal(outputs(model, ids)[1], expected), second


def test_hooks_are_registered_once_and_removed() -> None:
    model = tiny_model("llama")
    assert count_hooks(model) == 0
    with banked(model, Mixture(), Mixture()) as bank:
        attached = count_hooks(model)
        assert attached == len(blocks_of(model))
        for strength in range(20):
            bank.write(strength % 2, mix((WARM, strength / 10)))
            with bank.step(slice(0, 1)):
                model(IDS)
        assert count_hooks(model) == attached
        with pytest.raises(RuntimeError, match=r"^the bank's hooks are registered already$"):
            bank.attach()
        assert count_hooks(model) == attached
    assert count_hooks(model) == 0


def test_a_step_inside_a_step_is_refused() -> None:
    model = tiny_model("llama")
    with banked(model, mix((WARM, 1.0))) as bank:
        with (
            bank.step(slice(0, 1)),
            pytest.raises(RuntimeError, match=r"^a steering step is already"),
            bank.step(slice(0, 1)),
        ):
            pass
        with bank.step(slice(0, 1)):
            pass


def test_a_step_ends_when_the_pass_fails() -> None:
    model = tiny_model("llama")
    _, plain = outputs(model)
    with banked(model, mix((WARM, 1.0))) as bank:
        with pytest.raises(IndexError), bank.step(slice(0, 1)):
            model(torch.tensor([[9999]]))
        assert torch.equal(outputs(model)[1], plain)
        with pytest.raises(IndexError), bank.steps(model, lambda *_: None):
            model(torch.tensor([[9999]]))
        assert torch.equal(outputs(model)[1], plain)
    assert count_hooks(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", *TUPLES])
def test_the_accelerated_bank_steers_as_the_plain_one_does(architecture: str) -> None:
    """Random changes and steps give equal buffers and bitwise equal logits."""
    model, draw = tiny_model(architecture), random.Random(0)
    mixes = [
        *(mix((EVERYWHERE, strength)) for strength in (1.0, -0.5, 0.3)),
        *(mix((profile, 1.0)) for profile in (WARM, TERSE)),
        mix((EVERYWHERE, 0.5), (WARM, 1.0)),
        mix((EVERYWHERE, 1.0), preserve_norm=True),
        mix((BARE, 0.7), (WARM, 1.0)),
        None,
    ]
    everywhere = torch.ones(3, 10, dtype=torch.bool)
    places: list[tuple[slice | torch.Tensor, torch.Tensor | None]] = [
        (slice(0, 3), None),
        (slice(1, 2), None),
        (torch.tensor([2, 0, 1]), None),
        (slice(0, 3), (torch.arange(10) >= 6).expand(3, -1)),
        (slice(0, 3), everywhere),
    ]
    nothing = [Mixture()] * 3
    with banked(model, *nothing) as plain, accelerated(model, *nothing) as fast:
        for _ in range(60):
            row, mixture = draw.randrange(3), draw.choices(mixes, weights=[6, 6, 6, 2, 2, 2, 1, 1, 4])[0]
            for bank in (plain, fast):
                bank.clear(row) if mixture is None else bank.write(row, mixture)
            rows, where = draw.choice(places)
            found = []
            for bank in (plain, fast):
                with bank.step(rows, where):
                    found.append(outputs(model)[1])
            assert torch.equal(plain.shift, fast.shift)
            assert torch.equal(*found)
            if where is None and fast.only_adds:
                with fast.step(rows, where, always=True):
                    assert torch.equal(outputs(model)[1], found[0])
