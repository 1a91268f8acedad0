"""A training run that survives: steps, a learning-rate schedule, checkpoints, and the way back into an unbroken run.

Owns the optimiser's loop and the files of a run. Whatever stops it (Ctrl-C, a kill, a full disk), the next run with the
same inputs goes on from the last checkpoint. Only safetensors are written. Knows nothing of losses or of data.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steering_vectors.errors import FitError
from steering_vectors.progress import Progress
from steering_vectors.tuning.trainable_weights import States, TunedWeights

SAVE_SECONDS = 30.0
BETAS = (0.9, 0.999)
SMOOTHING = 0.9  # of the loss that progress tells


@dataclass(frozen=True, slots=True)
class Schedule:
    """AdamW with a linear warm-up over the share `warmup` of the steps and a cosine to zero; gradients of norm > 1 are
    scaled down to it."""

    steps: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(slots=True)
class Run:
    """One set of weights on its way: the file that holds it, and how far it has come."""

    weights: TunedWeights
    name: str
    schedule: Schedule
    file: Path
    seed: int
    step: int = 0

    def restore(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Take up what the file holds, if there is one; the optimiser's moments too if there are steps left."""
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, framework="pt") as stored:
                self.step = int(stored.metadata()["step"])
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FitError(f"{self.file} cannot be read ({error}): remove it, and the tuning begins anew") from error
        self.weights.load(self.name, _part(tensors, "weights"))
        if optimizer is not None and self.step < self.schedule.steps:
            _set_moments(optimizer, tensors, self.step)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the run as it is, whole or not at all; a Ctrl-C waits. Raises FitError if it cannot be written."""
        moments = {} if self.step >= self.schedule.steps else _moments(optimizer)
        tensors = {f"weights.{key}": value for key, value in self.weights.state(self.name).items()} | moments
        partial = self.file.with_suffix(f".{os.getpid()}.part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with uninterrupted():
                whole = {key: value.contiguous() for key, value in tensors.items()}
                save_file(whole, partial, {"step": str(self.step)})
                partial.replace(self.file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise FitError(
                f"the tuned weights cannot be written to {self.file.parent} ({error}): make room there, or set "
                "TRIMTAB_CACHE to another directory; the next run goes on from the last checkpoint"
            ) from error


def train(
    run: Run, loss_of: Callable[[int], torch.Tensor], *, progress: Progress | None = None, stage: str = "tune"
) -> None:
    """Bring a run to its last step. `loss_of(step)` is the loss of a step's batch, the same whenever it is asked.

    Dropout draws from (seed, step), so a resumed run takes the same steps as an unbroken one. Raises FitError if the
    loss is not finite.
    """
    with run.weights.use(run.name):
        optimizer = torch.optim.AdamW(
            run.weights.parameters(run.name), betas=BETAS, weight_decay=run.schedule.weight_decay
        )
        run.restore(optimizer)
        if run.step >= run.schedule.steps:
            return
        saved, smooth = time.monotonic(), None
        try:
            while run.step < run.schedule.steps:
                loss = _step(run, optimizer, loss_of)
                smooth = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss
                if progress is not None:
                    progress(stage, run.step, run.schedule.steps, detail=f"loss {smooth:.3f}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    run.save(optimizer)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            run.save(optimizer)
            raise
        finally:
            optimizer.zero_grad()  # gradients of a broken step would be added to those of the next run
        run.save(optimizer)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the context ends; in other threads than the main one, where none arrives, do nothing."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _step(run: Run, optimizer: torch.optim.Optimizer, loss_of: Callable[[int], torch.Tensor]) -> float:
    """Take one step and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = run.schedule.rate(run.step)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(run.seed * 1_000_003 + run.step)
        loss = loss_of(run.step)
        if not math.isfinite(value := float(loss.detach())):
            raise FitError(f"the loss is {value} at step {run.step}: lower the learning rate, or use float32")
        loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    with uninterrupted():  # weights, moments and the count of steps move together, or a checkpoint would lie
        optimizer.step()
        run.step += 1
    optimizer.zero_grad()
    return value


def _part(tensors: States, prefix: str) -> States:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _moments(optimizer: torch.optim.Optimizer) -> States:
    parameters = optimizer.param_groups[0]["params"]
    return {
        f"{moment}.{index}": optimizer.state[parameter][moment].clone()
        for index, parameter in enumerate(parameters)
        for moment in ("exp_avg", "exp_avg_sq")
        if parameter in optimizer.state
    }


def _set_moments(optimizer: torch.optim.Optimizer, tensors: States, step: int) -> None:
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if f"exp_avg.{index}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{index}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{index}"],
            }
