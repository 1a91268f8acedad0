"""Interrupted and resumed training (Ctrl-C, a full disk, a broken file), and trainable weights."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from steering_vectors.errors import FitError
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.progress import Progress
from steering_vectors.tuning import training
from steering_vectors.tuning.paired_reading import Twin, pad_id, readings
from steering_vectors.tuning.response_likelihoods import response_log_likelihoods
from steering_vectors.tuning.trainable_weights import FullWeights, LoraShape, LoraWeights, TunedWeights
from steering_vectors.tuning.training import Run, TrainingSchedule, train, uninterrupted
from tests.support.full_disk import full_disk
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

TWINS = [Twin((5, 6, 7), (5, 6, 7), (20 + i, 30 + i, 40)) for i in range(4)]
IDS = torch.arange(3, 12).unsqueeze(0)
Make = Callable[[LanguageModel], TunedWeights]


def lora(lm: LanguageModel) -> TunedWeights:
    return LoraWeights(lm, dict.fromkeys(("one", "two"), LoraShape(rank=4, alpha=8, dropout=0.2)), seed=0)


def full(lm: LanguageModel) -> TunedWeights:
    return FullWeights(lm, ["one", "two"])


KINDS = pytest.mark.parametrize("make", [lora, full])


@pytest.fixture
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def loss_on(lm: LanguageModel, *, stop_at: int = -1) -> Callable[[int], list[torch.Tensor]]:
    def loss(step: int) -> list[torch.Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        reading, _ = readings([TWINS[step % 4]], pad_id(lm), "cpu")
        sums, counts = response_log_likelihoods(lm, reading)
        return [-(sums / counts).mean()]

    return loss


def counting(steps: list[int]) -> Progress:
    def progress(_stage: str, done: int, _total: int, /, detail: str = "") -> None:
        assert re.fullmatch(r"loss \d+\.\d{3}", detail)
        steps.append(done)

    return progress


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=IDS).logits.clone()


@KINDS
def test_weights_act_only_while_they_are_used(lm: LanguageModel, make: Make, tmp_path: Path) -> None:
    before = logits(lm)
    weights = make(lm)
    train(Run(weights, "one", TrainingSchedule(4, 0.05), tmp_path / "one.safetensors", 0), loss_on(lm))
    assert torch.equal(logits(lm), before)
    with weights.use("one"):
        assert not torch.allclose(logits(lm), before, atol=1e-3)
    with weights.use("two"):
        assert torch.allclose(logits(lm), before, atol=1e-6)
    weights.close()
    assert torch.equal(logits(lm), before)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


@pytest.mark.slow
@KINDS
def test_a_run_lowers_its_loss(lm: LanguageModel, make: Make, tmp_path: Path) -> None:
    weights, losses = make(lm), []
    loss = loss_on(lm)

    def watched(step: int) -> list[torch.Tensor]:
        losses.append(float((parts := loss(step))[0].detach()))
        return parts

    train(Run(weights, "one", TrainingSchedule(40, 0.02), tmp_path / "one.safetensors", 0), watched)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    weights.close()


@KINDS
def test_an_interrupted_run_resumes_with_equal_steps(lm: LanguageModel, make: Make, tmp_path: Path) -> None:
    unbroken = make(lm)
    train(Run(unbroken, "one", TrainingSchedule(6, 0.01), tmp_path / "whole.safetensors", 3), loss_on(lm))
    wanted = unbroken.state("one")
    unbroken.close()
    file = tmp_path / "broken.safetensors"
    weights = make(lm)
    with pytest.raises(KeyboardInterrupt):
        train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 3), loss_on(lm, stop_at=4))
    weights.close()
    weights, steps = make(lm), list[int]()
    train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 3), loss_on(lm), progress=counting(steps))
    assert steps == [5, 6]
    found = weights.state("one")
    weights.close()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class InterruptedStep(torch.optim.AdamW):
    """Ctrl-C arrives during a step, after some weights have changed."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        hidden = self.param_groups[0]["params"][1:]
        held, self.param_groups[0]["params"] = self.param_groups[0]["params"], self.param_groups[0]["params"][:1]
        super().step()
        os.kill(os.getpid(), signal.SIGINT)
        self.param_groups[0]["params"] = hidden
        super().step()
        self.param_groups[0]["params"] = held


@KINDS
def test_a_ctrl_c_in_mid_step_waits_for_the_step(
    lm: LanguageModel, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = make(lm)
    train(Run(unbroken, "one", TrainingSchedule(3, 0.01), tmp_path / "whole.safetensors", 3), loss_on(lm))
    wanted = unbroken.state("one")
    unbroken.close()
    file, weights = tmp_path / "broken.safetensors", make(lm)
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", InterruptedStep)
        with pytest.raises(KeyboardInterrupt):
            train(Run(weights, "one", TrainingSchedule(3, 0.01), file, 3), loss_on(lm))
    weights.close()
    weights, steps = make(lm), list[int]()
    train(Run(weights, "one", TrainingSchedule(3, 0.01), file, 3), loss_on(lm), progress=counting(steps))
    assert steps == [2, 3]
    found = weights.state("one")
    weights.close()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_ctrl_c_is_delayed_and_not_lost() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_takes_no_step(lm: LanguageModel, tmp_path: Path) -> None:
    for _ in range(2):
        weights = lora(lm)
        run = Run(weights, "one", TrainingSchedule(3, 0.01), tmp_path / "one.safetensors", 0)
        steps: list[int] = []
        train(run, loss_on(lm), progress=counting(steps))
        state = weights.state("one")
        weights.close()
    assert steps == []
    assert any(bool(value.abs().max() > 0) for key, value in state.items() if "lora_B" in key)


def test_checkpoints_are_written_on_the_way(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot be caught, so the last checkpoint must be on disk."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    file, weights = tmp_path / "one.safetensors", lora(lm)

    def loss(step: int) -> list[torch.Tensor]:
        if step == 3:
            raise SystemExit
        return loss_on(lm)(step)

    with pytest.raises(SystemExit):
        train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 0), loss)
    run = Run(weights, "one", TrainingSchedule(6, 0.01), file, 0)
    run.restore(None)
    weights.close()
    assert run.step == 3


def test_a_full_disk_leaves_the_last_checkpoint(lm: LanguageModel, tmp_path: Path) -> None:
    file, weights = tmp_path / "one.safetensors", lora(lm)
    with pytest.raises(KeyboardInterrupt):
        train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 0), loss_on(lm, stop_at=2))
    written = file.read_bytes()
    with (
        full_disk(1000),
        pytest.raises(FitError, match=r"cannot be written to .*free some space, or set TRIMTAB_CACHE"),
    ):
        train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 0), loss_on(lm))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == written
    steps: list[int] = []
    train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 0), loss_on(lm), progress=counting(steps))
    assert steps == [3, 4, 5, 6]
    weights.close()


def test_a_broken_file_says_what_to_do(lm: LanguageModel, tmp_path: Path) -> None:
    file, weights = tmp_path / "one.safetensors", lora(lm)
    file.write_bytes(b"no")
    with pytest.raises(FitError, match=r"cannot be read .*: remove it to start the tuning again"):
        train(Run(weights, "one", TrainingSchedule(6, 0.01), file, 0), loss_on(lm))
    weights.close()


def test_a_loss_that_is_not_finite_ends_the_run(lm: LanguageModel, tmp_path: Path) -> None:
    weights = lora(lm)
    with pytest.raises(FitError, match="the loss is nan at step 0"):
        train(
            Run(weights, "one", TrainingSchedule(2, 0.01), tmp_path / "one.safetensors", 0),
            lambda step: [loss * float("nan") for loss in loss_on(lm)(step)],
        )
    weights.close()


def test_full_tuning_refuses_narrow_weights() -> None:
    narrow = wrap_model(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer())
    with pytest.raises(FitError, match="full fine-tuning needs dtype float32"):
        full(narrow)


def test_an_architecture_without_lora_targets_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match="peft cannot add a LoRA to LlamaForCausalLM"):
        LoraWeights(lm, {"one": LoraShape(targets="nowhere")}, seed=0)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = TrainingSchedule(20, 1.0)
    rates = [schedule.rate(step) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.01


def test_log_likelihoods_equal_those_without_gradients(lm: LanguageModel) -> None:
    reading, _ = readings(TWINS, pad_id(lm), "cpu")
    sums, counts = response_log_likelihoods(lm, reading)
    with steerable(lm) as steered:
        wanted, tokens = steered.log_likelihoods([((*t.positive, *t.response), 3) for t in TWINS], steer=False)
    torch.testing.assert_close(sums.double(), wanted, atol=1e-4, rtol=1e-5)
    assert torch.equal(counts.double(), tokens)
