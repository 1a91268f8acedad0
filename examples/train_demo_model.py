"""Train the embedded demo model from scratch: tokenizer, weights and preference sets, all from one seed.

    python examples/train_demo_model.py --out steering_vectors/demo

This writes `OUT/model/` (a Hugging Face folder, bfloat16) and `OUT/preferences/`. The model first reads replies that
show their manner in some places, then dense replies that show it in nearly every sentence. Checkpoints are kept, and
`--resume` continues from them with the same batches as an uninterrupted run. The text comes from `demo_corpus`.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.demo_corpus.dialogues import Document, write_documents
from examples.demo_corpus.preferences import save_preferences

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS
VOCABULARY = 3072
CONTEXT = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Run:
    """The settings of a training phase. Equal runs give equal weights on the same machine."""

    seed: int
    dense: bool
    steps: int
    documents: int
    learning_rate: float
    batch_tokens: int = 4096


@dataclass(slots=True)
class Progress:
    """The progress of a run: steps, seconds, moving average of the loss, tokens seen."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    tokens: int = 0


def render(document: Document) -> str:
    """The text of a document, with special tokens."""
    if document.prose:
        return f"{BOS}{document.prose}{END}"
    turns = (f"<|{message['role']}|>{message['content']}{END}" for message in document.messages)
    return BOS + "".join(turns)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which adds BOS to plain text and can encode every string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pack(encoded: list[list[int]], length: int, pad: int) -> Tensor:
    """Rows of `length` ids. Each holds as many whole documents as fit."""
    rows: list[list[int]] = [[]]
    for ids in encoded:
        if len(rows[-1]) + len(ids) > length and rows[-1]:
            rows.append([])
        rows[-1].extend(ids[:length])
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # [rows, length]


def pick_batches(run: Run, packed: dict[int, Tensor], start: int) -> Iterator[Tensor]:
    """Yield the batch of every step from `start` on. Every sixth step has rows of the full context."""
    for step in range(start, run.steps):
        length = CONTEXT if step % 6 == 5 else CONTEXT // 2
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        rows = packed[length]
        yield rows[torch.randint(len(rows), (run.batch_tokens // length,), generator=generator)]


def separate(batch: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """Positions that restart at each document of a row, and the mask that limits a token to its own document."""
    length = batch.shape[1]
    starts = batch == bos
    document = starts.cumsum(1)  # [rows, length]
    places = torch.arange(length)
    positions = places - (places * starts).cummax(1).values
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return positions, (same & causal)[:, None]  # [rows, length], [rows, 1, length, length]


def compute_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over all tokens except padding."""
    pad, bos = model.config.pad_token_id, model.config.bos_token_id
    positions, mask = separate(batch, bos)
    logits = model(input_ids=batch, position_ids=positions, attention_mask=mask, use_cache=False).logits[:, :-1]
    unseen = (batch[:, 1:] == pad) | (batch[:, 1:] == bos)
    targets = batch[:, 1:].masked_fill(unseen, -100)  # [rows, length - 1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW, without weight decay on the embedding and the norms."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def schedule(run: Run, step: int) -> float:
    """The learning rate: a linear warm-up over 60 steps, constant up to 60 % of the run, then a decay to 2 %.

    Until the decay, runs of any length take the same steps, so `--resume` may change `--steps`."""
    left = (run.steps - step) / (0.4 * run.steps)
    return run.learning_rate * min(1.0, (step + 1) / 60, 0.02 + 0.98 * left)


def train(model: LlamaForCausalLM, packed: dict[int, Tensor], run: Run, checkpoint: Path, resume: bool) -> Progress:
    """Train to the last step of the phase and return its progress."""
    optimizer, progress = build_optimizer(model), Progress()
    if resume and checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    model.train()
    began = time.monotonic() - progress.seconds
    for batch in pick_batches(run, packed, progress.step):
        rate = schedule(run, progress.step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compute_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        progress.loss = 0.98 * progress.loss + 0.02 * loss.item() if progress.step else loss.item()
        progress.step += 1
        progress.tokens += int((batch != model.config.pad_token_id).sum())
        progress.seconds = time.monotonic() - began
        report(run, progress)
        if progress.step % 200 == 0 or progress.step == run.steps:
            save_checkpoint(checkpoint, model, optimizer, progress)
    return progress


def report(run: Run, progress: Progress) -> None:
    """Print a line of progress every 25 steps."""
    if progress.step % 25 == 0 or progress.step == run.steps:
        eta = progress.seconds / progress.step * (run.steps - progress.step)
        speed = progress.tokens / progress.seconds
        print(
            f"step {progress.step}/{run.steps}  loss {progress.loss:.3f}  {speed:.0f} tokens/s  eta {eta:.0f} s",
            flush=True,
        )


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state of the run atomically."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore a saved state and return its progress."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """The loss on new documents from another seed."""
    documents = [render(document) for document in write_documents(400, seed)]
    rows = pack(tokenizer(documents, add_special_tokens=False)["input_ids"], CONTEXT // 2, tokenizer.pad_token_id)
    model.eval()
    losses = [compute_loss(model, part).item() for part in rows.split(16)]
    return sum(losses) / len(losses)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder in bfloat16, replacing an older one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".model-", dir=folder.parent))
    fresh.chmod(0o755)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(fresh)  # type: ignore[arg-type]
    tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("steering_vectors/demo"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "demo-model.pt")
    parser.add_argument("--resume", action="store_true", help="Continue from the checkpoint.")
    return parser.parse_args()


def main() -> None:
    """Train the model and write it with its preference sets."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    phases = (
        Run(options.seed, dense=False, steps=2700, documents=150_000, learning_rate=2.5e-3),
        Run(options.seed + 1, dense=True, steps=1200, documents=60_000, learning_rate=1.5e-3),
    )
    texts = write_texts(phases[0])
    tokenizer = train_tokenizer(re.sub(r"<\|\w+\|>", " ", text) for text in texts[:40_000])
    model = build_model(tokenizer, options.seed)
    figures: list[object] = []
    for number, run in enumerate(phases):
        packed = pack_texts(texts if number == 0 else write_texts(run), tokenizer, run.seed)
        checkpoint = options.checkpoint.with_stem(f"{options.checkpoint.stem}-{number}")
        figures.append(asdict(train(model, packed, run, checkpoint, options.resume)))
    size = sum(p.numel() for p in model.parameters())
    loss = evaluate(model, tokenizer, options.seed + 100)
    save_model(model, tokenizer, options.out / "model")
    save_preferences(options.out / "preferences", options.seed)
    print(json.dumps({"parameters": size, "phases": figures, "fresh_loss": loss}), flush=True)


def write_texts(run: Run) -> list[str]:
    """The texts of a phase's documents."""
    return [render(document) for document in write_documents(run.documents, run.seed, run.dense)]


def pack_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[int, Tensor]:
    """The texts, shuffled and packed into rows of both lengths."""
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    random.Random(seed).shuffle(encoded)
    return {length: pack(encoded, length, tokenizer.pad_token_id) for length in (CONTEXT // 2, CONTEXT)}


if __name__ == "__main__":
    main()
