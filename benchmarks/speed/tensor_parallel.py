"""Steering with transformers' tensor parallelism: hooks on blocks, and the same shifts on every rank.

    torchrun --nproc-per-node 2 -m benchmarks.speed.tensor_parallel [--model DIR] [--device cpu|cuda]

The number of ranks must divide the number of heads, and the demo model has too few heads. Without `--model`, a tiny
random Llama is used. Every rank loads the model with `tp_plan="auto"`, and once more as a whole. Three things are
compared in float32: whether each block's output is the whole residual stream on every rank; the logits with and without
shifts at every block; and the engine's runner over its slot cache, which holds only the keys and values of a rank's
heads.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, load_model, wrap_model
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.runtime.runner import BatchedRunner, RowInput
from steering_vectors.steering.bank import SteeringBank
from tests.support.tiny import save_tiny

PROMPTS = ([5, 9, 33, 71, 12, 40], [8, 21, 3])
STEPS = 8


def main(
    model: Annotated[Path | None, typer.Option(help="A directory; by default a tiny random Llama.")] = None,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (nccl).")] = "cpu",
) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    there = torch.device(device, rank) if device == "cuda" else torch.device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        with tempfile.TemporaryDirectory() as made:
            made_by_0: list[Any] = [made]
            dist.broadcast_object_list(made_by_0)
            directory = str(model or made_by_0[0])
            if model is None and rank == 0:
                save_tiny("llama", directory)
            dist.barrier()
            found = _compare(directory, there)
            dist.barrier()
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
        if rank == 0:
            for number, one in enumerate(every):
                print(f"rank {number}: " + ", ".join(f"{name} {value}" for name, value in one.items()), flush=True)
    finally:
        dist.destroy_process_group()


@torch.inference_mode()
def _compare(source: str, device: torch.device) -> dict[str, Any]:
    whole = load_model(source, dtype="float32", device=str(device))
    network = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    divided = wrap_model(network, whole.tokenizer)
    profile = _profile(whole)
    outputs = [_outputs(one.model, one.blocks) for one in (whole, divided)]
    steered = [_generated(one, profile) for one in (whole, divided)]
    unsteered = [_generated(one, None) for one in (whole, divided)]
    return {
        "parameters": f"{_held(network) / _held(whole.model):.2f} of them",
        "block outputs": f"{type(outputs[1][0]).__name__} {tuple(outputs[1][0].shape)}",
        "largest difference of a block's output": f"{_difference(*outputs):.1e}",
        "of logits unsteered": f"{_difference(*(logits for logits, _ in unsteered)):.1e}",
        "steered": f"{_difference(*(logits for logits, _ in steered)):.1e}",
        "steering moves logits by": f"{_difference(steered[0][0], unsteered[0][0]):.1f}",
        "greedy tokens equal": steered[0][1] == steered[1][1] and unsteered[0][1] == unsteered[1][1],
    }


def _outputs(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> list[torch.Tensor]:
    with record(blocks, range(len(blocks))) as seen:
        model(input_ids=torch.tensor([PROMPTS[0]], device=model.device), use_cache=False)
    return list(seen.values())


def _generated(language_model: LanguageModel, profile: Profile | None) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits and tokens of a few greedy steps of two rows, one of them steered, through the engine's runner."""
    bank = SteeringBank.over(language_model, rows=2)
    bank.attach()
    runner = BatchedRunner(language_model, bank, context=64)
    try:
        if profile is not None:
            bank.write(1, Mixture((Term(profile, 1.0),)))
        rows = [list(ids) for ids in PROMPTS]
        works = [RowInput(slot, ids, 0, len(ids) - 1) for slot, ids in enumerate(rows)]
        logits = []
        for _ in range(STEPS):
            logits.append(runner.forward(works).logits)
            for ids, token in zip(rows, logits[-1].argmax(dim=-1).tolist(), strict=True):
                ids.append(token)
            works = [RowInput(slot, ids[-1:], len(ids) - 1, 0) for slot, ids in enumerate(rows)]
    finally:
        runner.close()
        bank.detach()
    return logits, rows


def _profile(language_model: LanguageModel) -> Profile:
    generator = torch.Generator().manual_seed(0)
    layers, size = range(language_model.num_layers), language_model.hidden_size
    directions = {layer: torch.randn(size, generator=generator) for layer in layers}
    return Profile("random", language_model.identity, directions, method="random", unit=0.1, version="0" * 64)


def _held(model: PreTrainedModel) -> int:
    """The number of parameter elements in this process."""
    return sum(getattr(one, "_local_tensor", one).numel() for one in model.parameters())


def _difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    typer.run(main)
