"""A profile as weights: biases that equal steering, and a LoRA near its target that peft loads."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from server.engines.config import EngineConfig
from server.engines.torch.build import build_engine
from steering_vectors.data.chat import Example, encode_example
from steering_vectors.data.preferences import Preferences
from steering_vectors.distillation.baking import bake
from steering_vectors.distillation.lora import DistillSettings, MethodTarget, distill, distill_method, paper_blocks
from steering_vectors.errors import FitError, ModelError, ProfileMismatch, SteeringError
from steering_vectors.methods.rahf import scit_tuned
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, load_model, wrap_model
from steering_vectors.steering.generate import steer
from steering_vectors.tuning.paired_reading import differences
from tests.support.planted import OPTIONS, planted_model, planted_task
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 12).unsqueeze(0)
BAKED = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "phi", "granite", "starcoder2", "codegen", "smollm3")
FAST = DistillSettings(steps=60, batch=8, learning_rate=0.02, rank=8, targets="all-linear", dropout=0.0)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def pairs() -> Preferences:
    names = [f"Ask {row}" for row in range(24)]
    return Preferences(
        "preference",
        tuple(Example(name, f" please, kindly {name}") for name in names),
        tuple(Example(name, f" three apples {name}") for name in names),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", BAKED)
def test_a_baked_model_is_the_steered_model(architecture: str) -> None:
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    profile = tiny_profile(lm.model, layers=(0, 1))
    with steer(lm.model, profile, 0.7, apply_to="all"):
        wanted = logits(lm.model)
    before = logits(lm.model)
    torch.testing.assert_close(logits(bake(lm, profile, 0.7)), wanted, atol=2e-5, rtol=1e-5)
    assert torch.equal(logits(lm.model), before)
    assert not torch.allclose(before, wanted, atol=0.1)


def test_a_baked_model_is_saved_and_loaded(lm: LanguageModel, tmp_path: Path) -> None:
    profile = tiny_profile(lm.model, layers=(0, 2))
    baked = bake(lm, profile, -1.0)
    baked.save_pretrained(tmp_path / "baked")
    lm.tokenizer.save_pretrained(tmp_path / "baked")
    loaded = load_model(str(tmp_path / "baked"))
    torch.testing.assert_close(logits(loaded.model), logits(baked))
    assert loaded.identity.fingerprint != lm.identity.fingerprint


def test_what_cannot_be_baked(lm: LanguageModel) -> None:
    unbiased = wrap_model(tiny_model("mistral"), tiny_tokenizer())
    with pytest.raises(FitError, match="MistralForCausalLM has no bias that is added to the residual stream"):
        bake(unbiased, tiny_profile(unbiased.model), 1.0)
    with pytest.raises(FitError, match="ablates, which a bias cannot do"):
        bake(lm, tiny_profile(lm.model, operator="ablate"), 1.0)
    with pytest.raises(SteeringError, match="beyond its safe range"):
        bake(lm, tiny_profile(lm.model), 9.0)
    with pytest.raises(ProfileMismatch):
        bake(lm, tiny_profile(tiny_model("gpt2")), 1.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the deprecated attribute
def test_a_lora_comes_near_its_target_and_peft_loads_it(lm: LanguageModel, tmp_path: Path) -> None:
    profile = tiny_profile(lm.model, layers=(1,))
    before = logits(lm.model)
    found = distill(lm, profile, pairs(), tmp_path / "adapter", settings=FAST)
    assert found.before == pytest.approx(float(profile.unit * profile.directions[1].norm()))
    assert found.ratio < 0.5
    assert torch.equal(logits(lm.model), before)
    ids, start = encode_example(lm.tokenizer, Example("Ask 100", " please, kindly Ask"))
    outputs = []
    for model in (lm.model, PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").base_model.model):
        with torch.no_grad(), record(wrap_model(model, lm.tokenizer).blocks, [1]) as seen:
            model(input_ids=torch.tensor([ids]))
        outputs.append(seen[1][0, start:])
    moved = (outputs[1] - outputs[0]).mean(0)
    assert float(torch.cosine_similarity(moved, profile.directions[1], dim=0)) > 0.8


def test_a_merged_adapter_is_a_model_of_its_own(lm: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    plain = load_model(str(folder))
    profile = tiny_profile(plain.identity, layers=(1,))
    distill(plain, profile, pairs(), tmp_path / "adapter", settings=FAST)
    merged = load_model(str(folder), adapter=tmp_path / "adapter")
    assert not torch.allclose(logits(merged.model), logits(plain.model), atol=1e-2)
    assert merged.identity.fingerprint != plain.identity.fingerprint
    assert merged.identity == load_model(str(folder), adapter=tmp_path / "adapter").identity
    engine = build_engine(EngineConfig(model=str(folder), adapter=tmp_path / "adapter"))
    assert engine.info.identity == merged.identity
    asyncio.run(engine.close())
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json: it is not an adapter in peft's format"):
        load_model(str(folder), adapter=folder)
    other = tmp_path / "other"
    tiny_model("gpt2").save_pretrained(other)
    lm.tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="cannot be put into this model"):
        load_model(str(other), adapter=tmp_path / "adapter")


def test_the_loss_is_the_mean_distance(lm: LanguageModel, tmp_path: Path) -> None:
    """A new LoRA changes nothing, so its distance is the norm of the shift, as is the first loss."""
    profile, told = tiny_profile(lm.model, layers=(0, 2)), list[str]()

    def progress(_stage: str, _done: int, _total: int, /, detail: str = "") -> None:
        told.append(detail)

    settings = DistillSettings(steps=1, batch=4, targets="all-linear", dropout=0.0)
    distill(lm, profile, pairs(), tmp_path / "adapter", settings=settings, progress=progress)
    norm = sum(float(profile.unit * profile.directions[layer].norm()) for layer in (0, 2)) / 2
    assert told == [f"loss {norm:.3f}"]


def planted_pairs(lm: LanguageModel) -> Preferences:
    task = planted_task(lm, "mean-diff")
    return Preferences("preference", tuple(task.positives), tuple(task.negatives))


@pytest.mark.parametrize("method", ["rahf-scit", "rahf-dual"])
def test_rahfs_second_step_as_a_lora(method: str, tmp_path: Path) -> None:
    """On unseen responses the LoRA is close to the difference of the tuned models."""
    lm, _ = planted_model()
    before = logits(lm.model)
    target = MethodTarget(method, options=OPTIONS[method], layers=(1,), strength=2.0)
    settings = DistillSettings(steps=60, batch=16, learning_rate=0.02, targets="all-linear", dropout=0.0)
    found = distill_method(lm, target, planted_pairs(lm), tmp_path / "adapter", settings=settings)
    assert found.ratio < 0.5
    assert found.layers == (1,)
    assert torch.equal(logits(lm.model), before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_target_is_the_difference_of_each_token() -> None:
    """Compared with passes of one row each, without padding."""
    lm, _ = planted_model()
    task = replace(planted_task(lm, "rahf-scit"), wanted=(0, 1), statistics={})
    with scit_tuned(task) as first:
        twins = [*[twin for twin in first.twins if len(twin.response) == 4][:2], first.twins[0]]
        found, _ = differences(lm, twins, (0, 1), first.side)
        for row, twin in enumerate(twins):
            sides = []
            for prompt in (twin.positive, twin.negative):
                with first.weights.use("scit"), torch.no_grad(), record(lm.blocks, [0, 1]) as seen:
                    lm.model(input_ids=torch.tensor([[*prompt, *twin.response]]))
                sides.append(torch.stack([seen[layer][0, len(prompt) :] for layer in (0, 1)]))
            torch.testing.assert_close(found[:, row, : len(twin.response)], sides[0] - sides[1], atol=1e-4, rtol=1e-4)


def test_the_papers_blocks_are_the_middle_ones() -> None:
    assert paper_blocks(32) == (9, 11, 13, 15, 17)  # hidden_states 10, 12, …, 18
    assert paper_blocks(8) == (2, 3, 4)


def test_nothing_to_distil(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="strength 0 changes nothing, so there is nothing to distil"):
        distill(lm, tiny_profile(lm.model), pairs(), tmp_path / "adapter", strength=0.0)
    with pytest.raises(FitError, match="must be positive"):
        DistillSettings(steps=0)
    with pytest.raises(FitError, match="'pca' has no difference per token; use rahf-scit or rahf-dual"):
        MethodTarget("pca")
    with pytest.raises(FitError, match="strength 0 changes nothing, so there is nothing to distil"):
        MethodTarget("rahf-scit", strength=0.0)
    full = MethodTarget("rahf-scit", options={"tuning": "full"})
    with pytest.raises(FitError, match="use option tuning=lora"):
        distill_method(lm, full, pairs(), tmp_path / "adapter")
