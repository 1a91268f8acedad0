"""A tensor-parallel process: `python -m tests.support.parallel_worker MODEL`, with the environment of torchrun."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import torch

from server.engines.protocol import GenerationRequest
from server.engines.torch.build import follow_engine
from steering_vectors.models.loading import LanguageModel, load_model
from steering_vectors.runtime.tensor_parallel import Channel
from tests.support.running import plan, prompts, random_profile, request, run_all, steps

SLOTS, CONTEXT = 4, 96


def requests(language_model: LanguageModel) -> list[GenerationRequest]:
    """More requests than slots. Half are steered, some share a prefix, one changes while it runs, one ablates, and one
    reads projections."""
    adding = random_profile(language_model, scale=2.0)
    ablating = random_profile(language_model, "ablating", seed=1, operator="ablate")
    common, *rest = prompts(language_model, [20, 3, 11, 7, 5, 9])
    plans = [None, plan(adding, 1.0), plan(adding, -0.5), plan(ablating), None]
    made = [request(common + ids, one, max_tokens=12, ignore_eos=True) for ids, one in zip(rest, plans, strict=True)]
    changing = request(rest[0], plan(adding, steps((0, 0.5), (4, 1.5))), max_tokens=12, ignore_eos=True)
    reading = replace(request(rest[0], plan(adding, 0.5), max_tokens=12), projections=(adding.version,))
    return [*made, changing, reading]


def main() -> None:
    torch.set_num_threads(1)
    channel = Channel("cpu")
    language_model = load_model(sys.argv[1], dtype="float32", tensor_parallel=True)
    if os.environ["RANK"] != "0":
        follow_engine(language_model, SLOTS, CONTEXT, channel)
        return
    found = run_all(
        language_model, requests(language_model), slots=SLOTS, context=CONTEXT, prefill_chunk=16, channel=channel
    )
    held = sum(getattr(one, "_local_tensor", one).numel() for one in language_model.model.parameters())
    print(json.dumps({"ids": [one.ids for one in found], "held": held}))


if __name__ == "__main__":
    main()
