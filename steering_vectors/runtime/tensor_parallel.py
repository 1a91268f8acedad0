"""Tensor parallelism: one model whose weights are divided among several processes that run the same passes.

The first process serves. It sends the others each pass, change of steering and copy in the cache, and they do the same.
Each process steers with the same shifts, since the residual stream between blocks is whole on all of them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.runner import Output, RowInput, Runner
from steering_vectors.runtime.slot_cache import Columns
from steering_vectors.steering.bank import SteeringBank

IDLE = timedelta(days=365)  # the longest time between two messages


class Channel:
    """Sends messages from the first process to all others, in order."""

    def __init__(self, device: str) -> None:
        """Join torchrun's process group, with `nccl` on CUDA, where each process takes a device of its own.

        Processes of one machine talk over its loopback interface, because what they receive is unpickled.
        """
        if sys.platform == "linux" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self._group = dist.new_group(backend="gloo", timeout=IDLE)

    def send(self, *message: Any) -> None:
        dist.broadcast_object_list([message], src=0, group=self._group)

    def receive(self) -> Any:
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=0, group=self._group)
        return received[0]

    def minimum(self, number: int) -> int:
        """The smallest of all processes' numbers; every process must call this."""
        numbers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, number, group=self._group)
        return int(min(numbers))

    def close(self) -> None:
        dist.destroy_process_group()


class LeadingRunner(Runner):
    """The first process's runner. The others repeat what it does."""

    def __init__(self, language_model: LanguageModel, runner: Runner, channel: Channel) -> None:
        super().__init__(language_model, runner.bank, context=runner.context)
        self._runner, self._channel = runner, channel
        self.chunked = runner.chunked
        self.path = f"{runner.path}, in {dist.get_world_size()} processes"
        runner.bank.watch(lambda row, mixture: channel.send("steer", row, mixture))

    def forward(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[torch.Tensor]:
        self._channel.send("forward", list(batch), list(read))
        return self._runner.forward(batch, read)

    def forward_all(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[list[torch.Tensor]]:
        self._channel.send("forward_all", list(batch), list(read))
        return self._runner.forward_all(batch, read)

    @property
    def columns(self) -> Columns | None:
        columns = self._runner.columns
        return None if columns is None else LeadingColumns(columns, self._channel)

    def release(self, slot: int) -> None:
        self._channel.send("release", slot)
        self._runner.release(slot)

    def zero_slot(self, slot: int) -> None:
        self._channel.send("zero_slot", slot)
        self._runner.zero_slot(slot)

    def close(self) -> None:
        with suppress(RuntimeError):  # the others may have ended
            self._channel.send("close")
            self._channel.close()
        self._runner.close()


class LeadingColumns:
    """The first process's cache. The others repeat its copies."""

    def __init__(self, columns: Columns, channel: Channel) -> None:
        self._columns, self._channel = columns, channel

    def copy(self, source: int, target: int, length: int) -> None:
        self._channel.send("copy", source, target, length)
        self._columns.copy(source, target, length)

    def swap(self, one: int, other: int, length: int) -> None:
        self._channel.send("swap", one, other, length)
        self._columns.swap(one, other, length)


@torch.inference_mode()
def repeat(channel: Channel, runner: Runner, bank: SteeringBank) -> None:
    """What the other processes do: repeat what the first one does until that one closes.

    An error ends the process, and torchrun then ends all of them: processes that disagree must not go on.
    """
    # the first process ends the others, after it has answered waiting requests
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while (message := channel.receive()) != ("close",):
        match message:
            case ("steer", row, None):
                bank.clear(row)
            case ("steer", row, mixture):
                bank.write(row, mixture)
            case ("copy" | "swap" as method, *details):
                getattr(runner.columns, method)(*details)
            case (method, *details):
                getattr(runner, method)(*details)
    channel.close()
    runner.close()
    bank.detach()
