"""Which runner a model gets: the fastest whose logits agree with the plain model, found by trying, not by name.

Two random sequences run through a candidate as in an engine (slots apart, prompts in unequal chunks, then decoding
together) and are compared with plain forward passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from steering_vectors.errors import ModelError
from steering_vectors.models.forward import last_logits
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.cpu.fused_blocks import FusedRunner, can_fuse
from steering_vectors.runtime.row_runners import RecomputingRunner, RowRunner
from steering_vectors.runtime.runner import BatchedRunner, RowInput, Runner
from steering_vectors.runtime.static_decoding import GraphRunner, StaticRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank

logger = logging.getLogger(__name__)

PROMPTS = (23, 9)  # lengths of the two probes' prompts
DECODED = 4
CHUNK = 5
# Relative error of logits that sums in another order may make.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def choose_runner(
    language_model: LanguageModel, bank: AcceleratedBank, *, context: int, static: bool | None = None
) -> Runner:
    """The fastest runner whose logits agree with the plain model. Raises ModelError if none does.

    `static` asks for decoding over static buffers, which a CUDA device replays as graphs: on any device and nothing
    else if True, never if False, on CUDA if it agrees if None.
    """
    reasons = []
    for make in _candidates(language_model, static):
        runner: Runner | None = None
        try:
            runner = make(language_model, bank, context=context)
            error = disagreement(runner, language_model)
        except Exception as failure:  # an architecture may fail in any way; the next candidate is tried
            reasons.append(f"{runner.path if runner else 'set-up'}: {type(failure).__name__}: {failure}")
        else:
            if error <= TOLERANCE.get(language_model.dtype, 0.05):
                if reasons:
                    logger.warning("the model is run %s; other ways failed: %s", runner.path, "; ".join(reasons))
                return runner
            reasons.append(f"{runner.path}: logits differ by {error:.2g}")
        if runner is not None:
            runner.close()
    kind = language_model.identity.architecture
    if static:
        raise ModelError(f"{kind} cannot decode over static buffers ({'; '.join(reasons)}): leave cuda_graphs out")
    raise ModelError(f"{kind} cannot be served: " + "; ".join(reasons))


def _candidates(language_model: LanguageModel, static: bool | None) -> list[Callable[..., Runner]]:
    """The runners to try, fastest first."""
    on_cuda = language_model.device.type == "cuda"
    over_buffers = GraphRunner if on_cuda else StaticRunner
    if static:
        return [over_buffers]
    return [
        *([over_buffers] if on_cuda and static is None else []),
        *([FusedRunner] if can_fuse(language_model.blocks) else []),
        BatchedRunner,
        partial(RowRunner, chunked=True),
        partial(RowRunner, chunked=False),
        RecomputingRunner,
    ]


def disagreement(runner: Runner, language_model: LanguageModel) -> float:
    """Largest relative error ‖a − b‖/‖b‖ of the runner's logits against plain forward passes; inf if not finite."""
    slots = (0, min(2, runner.bank.num_rows - 1))
    rows = list(zip(slots, _probes(language_model, runner.context), strict=True))[: len(set(slots))]
    errors = []
    with torch.inference_mode():
        for batch in _batches(rows, runner.chunked):
            logits = runner.forward(batch).logits
            for found, row in zip(logits.float(), batch, strict=True):
                ids = torch.tensor([dict(rows)[row.slot][0][: row.end]], device=language_model.device)
                expected = last_logits(language_model.model(input_ids=ids, use_cache=False))[0].float()
                error = (found - expected).norm() / expected.norm().clamp_min(1e-9)
                errors.append(float(error.nan_to_num(nan=float("inf"))))
    for slot in slots:
        runner.release(slot)
    return max(errors)


def _batches(rows: list[tuple[int, tuple[list[int], int]]], chunked: bool) -> list[list[RowInput]]:
    """The probes' prompts in unequal chunks side by side, then the rest a token at a time."""
    steps: list[list[RowInput]] = []
    for slot, (ids, prompt) in rows:
        size = CHUNK + slot if chunked else prompt
        bounds = [*range(0, prompt, size), *range(prompt, len(ids) + 1)]
        for step, (start, end) in enumerate(pairwise(bounds)):
            if step == len(steps):
                steps.append([])
            steps[step].append(RowInput(slot, ids[start:end], start))
    return steps


def _probes(language_model: LanguageModel, context: int) -> list[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(0)
    probes = []
    for wanted in PROMPTS:
        prompt = max(1, min(wanted, context - DECODED))
        ids = torch.randint(0, language_model.vocab_size, (prompt + DECODED,), generator=generator)
        probes.append((ids.tolist(), prompt))
    return probes
