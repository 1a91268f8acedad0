"""The engine on a CUDA device; skipped without one. What else is run there is listed in docs/gpu.md."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.models import wrap_model
from tests.running import mixture, prompts, random_profile, request, run_all
from tests.tiny import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "falcon_alibi", "gpt_oss"])
def test_greedy_tokens_on_cuda_equal_those_on_the_cpu(architecture: str) -> None:
    """Float32, eight rows of which half are steered."""
    here = wrap_model(tiny_model(architecture), tiny_tokenizer())
    there = wrap_model(tiny_model(architecture).to("cuda"), tiny_tokenizer())
    profile = random_profile(here, scale=2.0)

    def requests() -> list:
        return [
            request(ids, mixture(profile, i % 2), max_tokens=24, ignore_eos=True)
            for i, ids in enumerate(prompts(here, [5, 30, 11, 2, 19, 8, 23, 14]))
        ]

    assert [one.ids for one in run_all(there, requests())] == [one.ids for one in run_all(here, requests())]
