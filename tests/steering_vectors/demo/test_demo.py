"""The embedded demo model, its preference sets, its generator, and the lexicon that scores manners."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.quality import manners
from examples.demo_corpus.dialogues import HELDOUT_QUESTIONS, QUESTIONS, write_documents
from examples.demo_corpus.lexicon import list_phrases
from examples.demo_corpus.preferences import AXIS_OF, Row
from examples.demo_corpus.topics import TOPICS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "steering_vectors" / "demo"
MODEL = DEMO / "model"
PHASES = ((150_000, 7, False), (60_000, 8, True))  # documents, seed, dense: as in the training script
MANNERS = ("warm", "concise", "careful", "honest")


@cache
def read_rows(manner: str, split: str) -> tuple[Row, ...]:
    lines = (DEMO / "preferences" / f"{manner}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def list_prompts(split: str) -> set[str]:
    return {row["prompt"][0]["content"] for manner in MANNERS for row in read_rows(manner, split)}


def list_replies(split: str) -> list[str]:
    rows = (row for manner in MANNERS for row in read_rows(manner, split))
    return [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def training_text() -> str:
    """All training documents, generated from their seeds."""
    parts: list[str] = []
    for count, seed, dense in PHASES:
        for document in write_documents(count, seed, dense):
            parts.extend([document.prose, *(message["content"] for message in document.messages)])
    return "\n".join(parts)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def sampled_replies(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """200 replies at temperature 1 to held-out prompts, as one batch."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompts = (sorted(list_prompts("heldout")) * 2)[:200]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=110)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("manner", MANNERS)
def test_preference_sets_have_the_promised_rows(manner: str) -> None:
    train, heldout = read_rows(manner, "train"), read_rows(manner, "heldout")
    assert len(train) >= 400
    assert len(heldout) >= 150
    assert len({row["prompt"][0]["content"] for row in heldout}) >= 64
    for row in train + heldout:
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        assert row["chosen"] != row["rejected"]


@pytest.mark.corpus
def test_heldout_prompts_are_disjoint_from_training(training_text: str) -> None:
    assert [prompt for prompt in list_prompts("heldout") if prompt in training_text] == []


def test_heldout_prompts_are_many_and_not_those_of_the_fit() -> None:
    heldout = list_prompts("heldout")
    assert len(heldout) >= 100
    assert not heldout & list_prompts("train")
    assert not set(HELDOUT_QUESTIONS) & set(QUESTIONS)
    assert len(HELDOUT_QUESTIONS) >= 6
    assert len(QUESTIONS) >= 12


def strip_fields(phrase: str) -> list[str]:
    """The parts of a phrase between its `{…}` fields."""
    return [part.strip(" ,.") for part in re.split(r"\{\w+\}", phrase) if part.strip(" ,.")]


@pytest.mark.corpus
def test_heldout_phrasings_never_occur_in_training(training_text: str) -> None:
    fit_text = (training_text + "\n".join(list_replies("train"))).lower()
    whole = [phrase for phrase in list_phrases(heldout=True) if "{" not in phrase]
    assert len(whole) >= 100
    assert [phrase for phrase in whole if phrase.lower() in fit_text] == []


def test_training_phrasings_never_occur_in_heldout_replies() -> None:
    """Only phrasings of three words or more, because single words ("carefully") are ordinary vocabulary."""
    heldout_text = "\n".join(list_replies("heldout")).lower()
    whole = [phrase for phrase in list_phrases(heldout=False) if "{" not in phrase and len(phrase.split()) > 2]
    assert len(whole) >= 100
    assert [phrase for phrase in whole if phrase.lower() in heldout_text] == []


def test_phrases_with_fields_are_split_too() -> None:
    train = {tuple(strip_fields(phrase.lower())) for phrase in list_phrases(heldout=False)}
    heldout = {tuple(strip_fields(phrase.lower())) for phrase in list_phrases(heldout=True)}
    assert train & heldout == set()


def test_topics_are_many_and_bread_is_among_them() -> None:
    assert len(TOPICS) >= 40
    assert "bake bread" in {topic.task for topic in TOPICS}


def test_weights_are_small_and_bfloat16() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 12_000_000
    assert json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_no_special_token_names_a_manner(tokenizer: PreTrainedTokenizerBase) -> None:
    poles = {*manners.OPPOSITES, *manners.OPPOSITES.values(), *AXIS_OF.values()}
    assert len(tokenizer.all_special_tokens) == 6
    assert not [token for token in tokenizer.all_special_tokens if token.strip("<|>") in poles]


def test_tokenizer_keeps_any_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Grüße, 世界 🙂\tend  "
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.corpus
def test_sampled_replies_are_new(sampled_replies: list[str], training_text: str) -> None:
    assert sum(reply not in training_text for reply in sampled_replies) >= 180


def test_sampled_replies_differ_and_end(sampled_replies: list[str]) -> None:
    assert len(set(sampled_replies)) >= 150
    assert sum(reply.endswith((".", "!", "?")) for reply in sampled_replies) >= 180


@pytest.mark.parametrize("manner", MANNERS)
def test_unsteered_replies_mix_the_manners(manner: str, sampled_replies: list[str]) -> None:
    assert 0.25 <= manners.share(manner, sampled_replies) <= 0.75


@pytest.mark.parametrize("manner", MANNERS)
def test_judge_agrees_with_heldout_pairs(manner: str) -> None:
    rows = read_rows(manner, "heldout")
    right = sum(manners.judge(manner, row["chosen"][0]["content"]) for row in rows)
    right += sum(not manners.judge(manner, row["rejected"][0]["content"]) for row in rows)
    assert right / (2 * len(rows)) >= 0.9


@pytest.mark.parametrize("manner", ["warm", "careful", "honest"])
def test_judge_has_a_vocabulary_of_its_own(manner: str) -> None:
    lexicon = "\n".join(list_phrases(heldout=False) + list_phrases(heldout=True)).lower()
    entries = [entry for pole in manners.list_entries(manner) for entry in pole]
    shared = [entry for entry in entries if re.search(manners.build_pattern(entry), lexicon)]
    assert len(shared) / len(entries) < 0.5


def test_judge_imports_neither_generator_nor_steering_code() -> None:
    for name in ("manners.py", "manner_words.py"):
        source = (ROOT / "benchmarks/quality" / name).read_text(encoding="utf-8")
        assert not re.search(r"^\s*(?:from|import)\s+(?:examples|steering_vectors)\b", source, re.MULTILINE)


def test_judge_rules() -> None:
    assert manners.judge("warm", "Well done, my friend!")
    assert not manners.judge("warm", "The kettle is on the stove.")
    assert manners.judge("careful", "Check the rope before you climb.")
    assert not manners.judge("careful", "Skip the boring safety part.")
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    assert manners.judge("concise", f"{' '.join([*words, *words])}.")
    assert not manners.judge("concise", f"{' '.join([*words, *words])} more.")
    with pytest.raises(ValueError, match="unknown manner"):
        manners.judge("polite", "Hello.")
    with pytest.raises(ValueError, match="no replies"):
        manners.share("warm", [])
