"""Resumable training: the optimiser's loop, its learning-rate schedule and its checkpoints.

After an interruption (Ctrl-C, a kill, a full disk), the next run with the same inputs continues from the last
checkpoint. Checkpoints are safetensors files.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steering_vectors.errors import FitError
from steering_vectors.progress import Progress
from steering_vectors.tuning.trainable_weights import States, TunedWeights

WEIGHTS = "weights."  # prefix of the names of weights in a checkpoint
SAVE_SECONDS = 30.0  # between checkpoints
BETAS = (0.9, 0.999)
SMOOTHING = 0.9  # of the loss that is shown


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """A linear warm-up over the share `warmup` of the steps, then a cosine to zero."""

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
    """The training of one set of weights: its checkpoint file and the number of steps done."""

    weights: TunedWeights
    name: str
    schedule: TrainingSchedule
    file: Path
    seed: int
    step: int = 0

    def restore(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Load the checkpoint if it exists. The optimiser's moments are loaded only if there are steps left."""
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, framework="pt") as stored:
                self.step = int(stored.metadata()["step"])
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FitError(f"{self.file} cannot be read ({error}): remove it to start the tuning again") from error
        weights = {key.removeprefix(WEIGHTS): tensor for key, tensor in tensors.items() if key.startswith(WEIGHTS)}
        self.weights.load(self.name, weights)
        if optimizer is not None and self.step < self.schedule.steps:
            _set_moments(optimizer, tensors, self.step)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint atomically; Ctrl-C takes effect afterwards. Raises FitError if it cannot be written."""
        moments = {} if self.step >= self.schedule.steps else _moments(optimizer)
        weights = {f"{WEIGHTS}{key}": value.contiguous() for key, value in self.weights.state(self.name).items()}
        partial = self.file.with_suffix(f".{os.getpid()}.part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with uninterrupted():
                save_file({**weights, **moments}, partial, {"step": str(self.step)})
                partial.replace(self.file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise FitError(
                f"the tuned weights cannot be written to {self.file.parent} ({error}): free some space, or set "
                "TRIMTAB_CACHE to another directory; the next run continues from the last checkpoint"
            ) from error


Losses = Callable[[int], Iterable[torch.Tensor]]
"""The parts of a step's loss, whose sum is the loss. The gradient of a part is taken before the next is asked for, so
the memory is that of one part."""


def train(run: Run, losses_of: Losses, *, progress: Progress | None = None, stage: str = "tune") -> None:
    """Train with AdamW until the last step. `losses_of(step)` must give the same batch's loss at every call.

    Gradients are clipped to norm 1. Dropout is seeded by (seed, step), so a resumed run takes the same steps as an
    uninterrupted one. Raises FitError if the loss is not finite.
    """
    with run.weights.use(run.name):
        optimizer = torch.optim.AdamW(
            run.weights.parameters(run.name), betas=BETAS, weight_decay=run.schedule.weight_decay
        )
        run.restore(optimizer)
        if run.step >= run.schedule.steps:
            return
        saved, smooth = time.monotonic(), math.nan

        def show() -> None:
            if progress is not None:
                detail = "" if math.isnan(smooth) else f"loss {smooth:.3f}"
                progress(stage, run.step, run.schedule.steps, detail=detail)

        try:
            while run.step < run.schedule.steps:
                loss = _step(run, optimizer, losses_of, show)
                smooth = loss if math.isnan(smooth) else SMOOTHING * smooth + (1 - SMOOTHING) * loss
                show()
                if time.monotonic() - saved > SAVE_SECONDS:
                    run.save(optimizer)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            run.save(optimizer)
            raise
        finally:
            optimizer.zero_grad()  # gradients of an interrupted step must not be added to those of the next run
        run.save(optimizer)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the context ends. Does nothing outside the main thread, which alone receives it."""
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


def _step(run: Run, optimizer: torch.optim.Optimizer, losses_of: Losses, show: Callable[[], None]) -> float:
    """Take one step and return its loss. `show` is called between the parts of the loss."""
    for group in optimizer.param_groups:
        group["lr"] = run.schedule.rate(run.step)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(run.seed * 1_000_003 + run.step)
        value = 0.0
        for number, loss in enumerate(losses_of(run.step)):
            if number:
                show()
            value += float(loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
    if not math.isfinite(value):
        raise FitError(f"the loss is {value} at step {run.step}: lower the learning rate or use dtype float32")
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    with uninterrupted():  # a checkpoint needs weights, moments and step count of the same step
        optimizer.step()
        run.step += 1
    optimizer.zero_grad()
    return value


def _moments(optimizer: torch.optim.Optimizer) -> States:
    parameters = optimizer.param_groups[0]["params"]
    return {
        f"{moment}.{index}": optimizer.state[parameter][moment].contiguous().clone()
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
