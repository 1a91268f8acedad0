"""Loading models and finding their decoder blocks, on every tiny architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from steering_vectors.errors import ModelError
from steering_vectors.models.blocks import find_blocks, hidden_size_of
from steering_vectors.models.hooks import block_output, registered, trace_calls
from steering_vectors.models.loading import load_model, wrap_model
from tests.support.tiny import HIDDEN, STEERABLE, save_tiny, tiny_blocks, tiny_model, tiny_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STEERABLE)
def test_blocks_are_found(architecture: str) -> None:
    model = tiny_model(architecture)
    found, expected = find_blocks(model), tiny_blocks(architecture, model)
    assert len(found) == len(expected)
    assert all(block is other for block, other in zip(found, expected, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STEERABLE)
def test_every_tiny_model_has_an_output_projection(architecture: str) -> None:
    """Position selection needs an output projection."""
    assert tiny_model(architecture).get_output_embeddings() is not None


def test_interwoven_streams_are_refused() -> None:
    with pytest.raises(ModelError) as refusal:
        find_blocks(tiny_model("gemma3n_text"))
    assert str(refusal.value) == (
        "no decoder blocks were found in Gemma3nForCausalLM: no list of modules hands a residual stream of width 32 "
        "from one to the next. This architecture cannot be steered yet."
    )


def test_the_width_is_the_residual_streams() -> None:
    opt = tiny_model("opt")
    assert opt.get_input_embeddings().weight.shape[1] == 16
    assert hidden_size_of(opt) == HIDDEN
    assert hidden_size_of(tiny_model("gemma3")) == HIDDEN


def test_blocks_return_tensors_or_tuples() -> None:
    """Both forms occur, so a test over all architectures covers both."""
    forms = set()
    for architecture in ("llama", "gpt2", "gptj", "bloom", "rwkv"):
        model = tiny_model(architecture)
        block, seen = tiny_blocks(architecture, model)[0], []
        with registered([block.register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))]):
            model(torch.tensor([[1, 2, 3]]))
        assert block_output(seen[0]).shape == (1, 3, HIDDEN)
        forms.add(type(seen[0]))
    assert forms == {torch.Tensor, tuple}


class Custom(PreTrainedModel):
    """A custom model around any body that maps `[batch, positions, hidden]` to the same shape."""

    config_class = LlamaConfig

    def __init__(self, body: nn.Module, layers: int = 2) -> None:
        super().__init__(LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2))
        self.embed = nn.Embedding(16, 8)
        self.body = body

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.body(self.embed(input_ids))
        return hidden


class Chain(nn.Module):
    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for member in self.members:
            hidden = member(hidden)
        return hidden


class Experts(Chain):
    """Modules that all read the same input, as experts and parallel branches do."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + sum(member(hidden) for member in self.members)


class AsMapping(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> Any:
        return {"hidden": super().forward(hidden)}


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def test_parts_of_a_block_are_not_the_blocks() -> None:
    """Each of two blocks has three sublayers, so the longer list is the wrong one."""
    model = Custom(Chain(Chain(linear(), linear(), linear()), Chain(linear(), linear(), linear())))
    assert find_blocks(model) == tuple(model.body.members)


def test_a_wrapper_in_a_list_of_one_is_not_the_blocks() -> None:
    inner = Chain(linear(), linear())
    assert find_blocks(Custom(Chain(inner))) == tuple(inner.members)


def test_without_a_configured_number_the_longest_chain_is_used() -> None:
    short, long = Chain(linear()), Chain(linear(), linear(), linear())
    assert find_blocks(Custom(Chain(short, long), layers=7)) == tuple(long.members)


def test_experts_are_not_blocks() -> None:
    blocks = [Chain(linear(), Experts(linear(), linear())) for _ in range(2)]
    assert find_blocks(Custom(Chain(*blocks))) == tuple(blocks)
    with pytest.raises(ModelError, match="no decoder blocks were found in Custom: no list of modules hands"):
        find_blocks(Custom(Experts(linear(), linear())))


def test_a_block_that_runs_twice_is_refused() -> None:
    shared = linear()
    with pytest.raises(ModelError, match="no decoder blocks"):
        find_blocks(Custom(Chain(shared, shared)))


def test_outputs_that_cannot_be_written_are_refused() -> None:
    class Unpacking(Chain):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for member in self.members:
                hidden = member(hidden)["hidden"]
            return hidden

    with pytest.raises(ModelError, match="no decoder blocks"):
        find_blocks(Custom(Unpacking(AsMapping(8, 8), AsMapping(8, 8))))


def test_a_model_that_needs_more_than_ids_is_refused() -> None:
    class Needy(Custom):
        def forward(self, input_ids: torch.Tensor, images: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
            return images

    with pytest.raises(ModelError, match=r"Needy cannot run on token ids alone, .*images"):
        find_blocks(Needy(Chain(linear())))


def test_calls_are_traced_in_the_order_of_return() -> None:
    inner = linear()
    chain = Chain(inner)
    given = torch.ones(1, 8)
    calls = trace_calls([("chain", chain), ("inner", inner)], lambda: chain(given))
    assert [call.name for call in calls] == ["inner", "chain"]
    assert calls[0].given == (given,)
    assert calls[0].returned is calls[1].returned


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def copied(directory: Path, target: Path, *, without: str) -> Path:
    target.mkdir()
    for file in directory.iterdir():
        if not file.match(without):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_directory_is_loaded(directory: Path) -> None:
    lm = load_model(str(directory))
    assert (lm.name, lm.identity.id, lm.identity.architecture) == ("tiny-llama", "tiny-llama", "LlamaForCausalLM")
    assert (lm.hidden_size, lm.num_layers, lm.vocab_size) == (HIDDEN, 3, 384)
    assert lm.dtype == torch.float32
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    ids = torch.arange(2, 12).unsqueeze(0)
    assert torch.equal(lm.model(ids).logits, tiny_model("llama")(ids).logits)
    assert lm.tokenizer.decode(lm.tokenizer("a boat 🙂").input_ids, skip_special_tokens=True) == "a boat 🙂"


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(directory: Path, dtype: str, loaded: torch.dtype) -> None:
    assert load_model(str(directory), dtype=dtype).dtype == loaded


def test_a_model_in_memory_is_wrapped() -> None:
    model = tiny_model("gpt2")
    lm = wrap_model(model, tiny_tokenizer(), name="mine")
    assert (lm.name, lm.identity.id) == ("mine", "mine")
    assert wrap_model(model, tiny_tokenizer()).name == "GPT2LMHeadModel"


def test_bfloat16_is_computed_in_float32_where_a_cpu_has_no_such_products(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored, found = (load_model(str(tmp_path), dtype=dtype) for dtype in ("bfloat16", "auto"))
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert found.dtype == (torch.bfloat16 if supported else torch.float32)
    assert found.identity == stored.identity
    pairs = zip(found.model.parameters(), stored.model.parameters(), strict=True)
    assert all(torch.equal(one.to(torch.bfloat16), other) for one, other in pairs)


def test_unknown_dtype(directory: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        load_model(str(directory), dtype="int3")
    assert str(refusal.value) == "dtype 'int3' is not one of auto, float32, bfloat16, float16"


def test_missing_tokenizer(directory: Path, tmp_path: Path) -> None:
    bare = copied(directory, tmp_path / "bare", without="tokenizer*")
    with pytest.raises(ModelError) as refusal:
        load_model(str(bare))
    assert str(refusal.value) == (
        f"{bare} holds no tokenizer (tokenizer.json, tokenizer.model or tokenizer_config.json): "
        "copy the model's tokenizer files into it"
    )


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        load_model(str(tmp_path / "nowhere"))
    assert str(refusal.value) == f"there is no model directory {tmp_path / 'nowhere'}"


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        load_model(str(tmp_path))
    assert str(refusal.value) == f"{tmp_path} holds no config.json: it is not a model's directory"


def test_pickled_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    pickled = copied(directory, tmp_path / "pickled", without="*.safetensors")
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError) as refusal:
        load_model(str(pickled))
    assert str(refusal.value) == (
        f"{pickled} holds no safetensors weights, and of other formats only GGUF is read (a pickle can run code): "
        "convert them, for example by loading the model elsewhere and calling save_pretrained"
    )


def test_damaged_weights(directory: Path, tmp_path: Path) -> None:
    damaged = copied(directory, tmp_path / "damaged", without="*.safetensors")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="damaged' cannot be loaded: "):
        load_model(str(damaged))


def test_missing_weights_are_an_error(directory: Path, tmp_path: Path) -> None:
    incomplete = copied(directory, tmp_path / "incomplete", without="config.json")
    config = json.loads((directory / "config.json").read_text())
    (incomplete / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"lacks weights for 9 of its parameters, 'model\.layers\.3\."):
        load_model(str(incomplete))


def test_code_in_a_checkpoint_is_not_run(directory: Path, tmp_path: Path) -> None:
    foreign = copied(directory, tmp_path / "foreign", without="config.json")
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "code.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(foreign))


def test_an_unavailable_hub_id() -> None:
    with pytest.raises(ModelError, match="'nobody/nothing' cannot be loaded"):
        load_model("nobody/nothing")


def test_a_folder_with_an_adapter_is_no_base_model(directory: Path, tmp_path: Path) -> None:
    """transformers would fetch the base model that the adapter names."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    beside = copied(directory, tmp_path / "beside", without="nothing")
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    (quantized / "small.gguf").touch()
    for folder in (adapter, beside, quantized):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
        with pytest.raises(ModelError) as refusal:
            load_model(str(folder))
        assert str(refusal.value) == (
            f"{folder} holds an adapter (adapter_config.json), so it is no base model: give the model that the adapter "
            "was made for, and the adapter's folder as --adapter"
        )
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(str(quantized / "small.gguf"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["nobody/kernels", "flash_attention_2", "eager"])
def test_a_config_does_not_choose_the_code_of_attention(directory: Path, tmp_path: Path, key: str, value: str) -> None:
    foreign = copied(directory, tmp_path / "foreign", without="config.json")
    config = json.loads((directory / "config.json").read_text())
    (foreign / "config.json").write_text(
        json.dumps({**config, key: value, key.replace("attn", "experts"): "nobody/kernels", "use_kernels": True})
    )
    found, plain = load_model(str(foreign)).model, load_model(str(directory)).model
    assert (found.config._attn_implementation, found.config._experts_implementation) == (
        plain.config._attn_implementation,
        plain.config._experts_implementation,
    )
    assert plain.config._attn_implementation == "sdpa"
    ids = torch.arange(2, 12).unsqueeze(0)
    assert torch.equal(found(ids).logits, plain(ids).logits)


@dataclass(frozen=True, slots=True)
class Hub:
    """A cache in which revisions of a hub id lie."""

    folder: Path
    name: str = "some/tiny"

    def add(self, directory: Path, commit: str, *, branch: str | None = None) -> Path:
        """Lay a copy of a directory as a commit, and let a branch or tag point to it. Returns the copy."""
        repository = self.folder / f"models--{self.name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots").mkdir(exist_ok=True)
        if branch is not None:
            (repository / "refs" / branch).write_text(commit)
        return copied(directory, repository / "snapshots" / commit, without="nothing")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


def test_a_revision_chooses_weights_tokenizer_and_identity(directory: Path, hub: Hub, tmp_path: Path) -> None:
    old = hub.add(directory, OLD, branch="v1")
    other = tiny_model("llama", num_hidden_layers=2)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer(chat_template=False).save_pretrained(tmp_path / "other")
    new = hub.add(tmp_path / "other", NEW, branch="main")
    for revision, expected in ((None, new), ("main", new), (NEW, new), ("v1", old), (OLD, old)):
        found, local = load_model(hub.name, revision=revision), load_model(str(expected))
        assert found.name == hub.name
        assert found.identity.fingerprint == local.identity.fingerprint
        assert found.num_layers == local.num_layers
        assert found.tokenizer.chat_template == local.tokenizer.chat_template
    assert load_model(str(old)).identity.fingerprint != load_model(str(new)).identity.fingerprint


def test_a_revision_that_does_not_exist(directory: Path, hub: Hub) -> None:
    hub.add(directory, OLD, branch="main")
    with pytest.raises(ModelError, match="model 'some/tiny@v9' cannot be loaded: "):
        load_model(hub.name, revision="v9")


def test_a_hub_id_with_an_adapter_is_no_base_model(directory: Path, hub: Hub) -> None:
    commit = hub.add(directory, OLD, branch="main")
    (commit / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(ModelError, match=r"^some/tiny holds an adapter .* as --adapter$"):
        load_model(hub.name)


def test_files_have_no_revisions(directory: Path, tmp_path: Path) -> None:
    for model in (str(directory), "demo", "smollm2", str(tmp_path / "small.gguf")):
        with pytest.raises(ModelError) as refusal:
            load_model(model, revision="v1")
        assert str(refusal.value) == f"revision 'v1' is for hub ids, and {model} is not one: leave it out"
