"""The committed models load with plain transformers, and do what their card says, on a few images."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from caprl_async.tiny import grammar, measure
from caprl_async.tiny.grammar import HELDOUT, JUDGE, SHARED, UNKNOWN, Ask
from caprl_async.tiny.judge_data import Mix, answer_from, readings
from caprl_async.tiny.judge_prompt import prompter
from caprl_async.tiny.judge_train import answer_logits, pack
from caprl_async.tiny.models import MODELS
from caprl_async.tiny.tokenizer import tokenizer, vocabulary

DATA = MODELS.parent / "data"
SPLIT = {"judge": "heldout.parquet", "heldout_judge": "heldout_alt.parquet"}


def load_judge(name: str) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(MODELS / name).eval()


def load_policy(name: str) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(MODELS / name).eval()


@pytest.mark.parametrize("name", ["policy", "policy_dense", "judge", "heldout_judge", "judge_letters"])
def test_layout(name: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(MODELS / name)
    text = config.get_text_config()
    assert text.hidden_size // text.num_attention_heads in (32, 64, 80, 96, 112, 128)  # vLLM's CPU attention
    assert not text.tie_word_embeddings
    words = AutoTokenizer.from_pretrained(MODELS / name)
    assert words.get_vocab() == vocabulary()
    assert text.vocab_size == len(words)
    assert words.decode(words("topleft red circle .").input_ids) == "topleft red circle ."


def test_models_are_small() -> None:
    size = sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file())
    assert size < 40e6


@pytest.mark.parametrize(
    ("name", "letters"),
    [("judge", False), ("heldout_judge", False), ("judge_letters", False), ("judge_letters", True)],
)
def test_judge_is_valid(name: str, letters: bool) -> None:
    rows = measure.read_rows(DATA / SPLIT.get(name, "heldout.parquet"))[:30]
    table = {line: cell["mean"] for line, cell in measure.validity(load_judge(name), rows, letters).items()}
    assert table["full caption"] >= 0.95
    assert table["full caption, absent"] >= 0.9
    assert abs(table["blind, forced choice"] - table["chance of the forced choice"]) < 0.12  # n = 180
    assert table["other caption"] < 0.3
    assert table["blind, says unknown"] >= 0.95
    assert table["fact left out, says unknown"] >= 0.95


def test_judges_agree_across_wordings_only_by_the_caption() -> None:
    """Both judges read the shared captions, each asked in its own words."""
    rows = [measure.read_rows(DATA / split)[:10] for split in SPLIT.values()]
    chosen = []
    for name, part in zip(SPLIT, rows, strict=True):
        items = [item for row in part for item in measure.asked(row, row["reference_caption"])]
        chosen.append(measure.choose(load_judge(name), items, abstain=True))
    same = [a == b for a, b in zip(*chosen, strict=True)]
    assert sum(same) / len(same) >= 0.9


def test_policy_says_little_but_true() -> None:
    rows = measure.read_rows(DATA / "heldout.parquet")[:48]
    sparse = measure.policy_report(load_policy("policy"), rows, temperature=1.0)
    dense = measure.policy_report(load_policy("policy_dense"), rows, temperature=0.0)
    assert sparse["precision"] >= 0.75
    assert sparse["recall"] <= 0.6
    assert dense["precision"] >= 0.85
    assert dense["recall"] >= 0.8
    assert sparse["length"] < dense["length"]


def test_packed_rows_compute_what_separate_prompts_do() -> None:
    """A question in a packed row sees its caption and itself only, at the positions it would have alone."""
    rng = random.Random(0)
    mix = Mix(forms=(*SHARED, JUDGE), phrasings=(JUDGE, HELDOUT), partial=0.5, unknown=0.3)
    drawn = list(readings(mix, rng, 4))
    model = load_judge("judge")
    packed = pack(drawn, mix, letters=False, rng=rng)
    with torch.no_grad():
        logits, labels, final = answer_logits(model, packed)
    prompts, answers = [], []
    for item in drawn:
        for ask, phrasing in item.asks:
            prompts.append(
                prompter().head(item.caption) + prompter().tail(grammar.question(ask, phrasing), None)
            )
            answers.append(ask.answer)
    assert tokenizer().convert_ids_to_tokens(labels[final].tolist()) == answers
    torch.testing.assert_close(
        logits[final].log_softmax(-1), measure.last_logprobs(model, prompts), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("key", "attribute", "answer"),
    [
        ("topleft", "color", "red"),
        ("topleft", "shape", UNKNOWN),
        ("red", "place", "topleft"),
        ("red", "shape", UNKNOWN),
        ("blue", "place", None),  # two things are blue: no question
        ("green", "place", UNKNOWN),
    ],
)
def test_answers_follow_from_the_caption(key: str, attribute: str, answer: str | None) -> None:
    color = {"topleft": "red", "topright": "blue", "bottomleft": "blue"}
    assert answer_from(Ask("scene", attribute, key, ""), color, {"topright": "star"}) == answer


@pytest.mark.parametrize("judge", ["judge (words)", "heldout_judge (words)", "judge_letters (letters)"])
def test_the_saved_measurements_make_a_valid_judge(judge: str) -> None:
    """On all held-out images: right with the caption, at chance without, honest about what is missing."""
    rows = json.loads((MODELS / "validity.json").read_text())["judges"][judge]
    found = {name: cell["mean"] for name, cell in rows.items()}
    chance = found["chance of the forced choice"]
    assert rows["full caption"]["n"] == 1600
    assert found["full caption"] >= 0.95
    assert abs(found["blind, forced choice"] - chance) <= 0.03
    assert abs(found["other caption, forced choice"] - chance) <= 0.03
    assert found["fact left out, says unknown"] >= 0.95


def test_card_shows_the_saved_measurements() -> None:
    report = json.loads((MODELS / "validity.json").read_text())
    card = (MODELS / "README.md").read_text()
    assert f"{report['judges']['judge (words)']['full caption']['mean']:.3f}" in card
