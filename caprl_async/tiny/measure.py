"""Measures the tiny models with plain transformers: how valid a judge is, how a policy captions."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch
from PIL import Image

from caprl_async.tiny.facts import stated_facts, true_facts
from caprl_async.tiny.grammar import UNKNOWN, VALUE_KIND
from caprl_async.tiny.judge_prompt import prompter
from caprl_async.tiny.pretrain import GRID, pixels_of, prompt_ids
from caprl_async.tiny.tokenizer import IMAGE_PAD, tokenizer
from caprl_async.tiny.world import POLICY_PROMPT

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A caption, a question's stem, its content options, and the right one (`UNKNOWN` to abstain)."""

    caption: str
    stem: str
    content: tuple[str, ...]
    answer: str


def read_rows(path: Path) -> list[Row]:
    """Rows of a parquet file of the tiny world."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def asked(row: Row, caption: str) -> list[Asked]:
    """The row's questions put to a caption."""
    items = []
    for question in row["reward_model"]["ground_truth"]:
        texts = {choice[0]: choice[3:] for choice in question["choices"]}
        content = tuple(text for text in texts.values() if text != UNKNOWN)
        items.append(Asked(caption, question["question"], content, texts[question["answer"]]))
    return items


@torch.no_grad()
def last_logprobs(model: Qwen2ForCausalLM, prompts: Sequence[list[int]], batch: int = 128) -> torch.Tensor:
    """Log-probabilities [N, V] of the token after each prompt."""
    pad = int(tokenizer().pad_token_id)
    out = []
    for start in range(0, len(prompts), batch):  # padded on the right, which causal attention never sees
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        ids = torch.tensor([prompt + [pad] * (longest - len(prompt)) for prompt in part])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        ends = torch.tensor([len(prompt) - 1 for prompt in part])
        out.append(model.lm_head(hidden[torch.arange(len(part)), ends]).log_softmax(-1))
    return torch.cat(out)


def choose(
    model: Qwen2ForCausalLM, items: Sequence[Asked], abstain: bool, letters: bool = False
) -> list[str]:
    """The judge's choice per question, among the content options and, if `abstain`, `UNKNOWN`.

    `letters` shows the options, shuffled, and reads the letter; otherwise the option's own word is read.
    """
    ask, rng = prompter(), random.Random(0)
    prompts, shown = [], []
    for item in items:
        options = [*item.content, UNKNOWN]
        if letters:
            rng.shuffle(options)
        shown.append(options)
        prompts.append(ask.head(item.caption) + ask.tail(item.stem, options if letters else None))
    chosen = []
    for row, options in zip(last_logprobs(model, prompts), shown, strict=True):
        ids = ask.letter_ids(len(options)) if letters else tuple(ask.option_ids(text)[0] for text in options)
        scores = {text: float(row[token]) for text, token in zip(options, ids, strict=True)}
        if not abstain:
            del scores[UNKNOWN]
        chosen.append(max(scores, key=scores.__getitem__))
    return chosen


def _share(
    model: Qwen2ForCausalLM,
    items: Sequence[Asked],
    abstain: bool,
    right: Callable[[Asked, str], bool],
    letters: bool,
) -> dict[str, float]:
    chosen = choose(model, items, abstain, letters)
    hits = [right(item, text) for item, text in zip(items, chosen, strict=True)]
    return {"mean": round(sum(hits) / max(1, len(hits)), 4), "n": len(hits)}


def validity(
    model: Qwen2ForCausalLM, rows: Sequence[Row], letters: bool = False
) -> dict[str, dict[str, float]]:
    """The validity table of a judge: each line a mean and the number of questions behind it."""
    model.eval()
    full = [item for row in rows for item in asked(row, row["reference_caption"])]
    present = [item for item in full if item.answer != UNKNOWN]
    absent = [item for item in full if item.answer == UNKNOWN]
    blind = [item for row in rows for item in asked(row, "")]
    blind_present = [item for item in blind if item.answer != UNKNOWN]
    other, lacking = [], []
    for index, row in enumerate(rows):
        foreign = rows[(index + 3) % len(rows)]  # the next image of the same domain
        other += [item for item in asked(row, foreign["reference_caption"]) if item.answer != UNKNOWN]
        # The true caption without the sentences that speak of the question's subject or answer.
        for item in asked(row, ""):
            sentences = [f"{text.strip()} ." for text in row["reference_caption"].split(".") if text.strip()]
            words = set(item.stem.split()) | {item.answer}
            kept = " ".join(text for text in sentences if not words & (set(text.split()) - {"."}))
            if item.answer != UNKNOWN:
                lacking.append(Asked(kept, item.stem, item.content, item.answer))
    chance = sum(1 / len(item.content) for item in blind_present) / max(1, len(blind_present))

    def same(item: Asked, text: str) -> bool:
        return text == item.answer

    def abstains(item: Asked, text: str) -> bool:
        return text == UNKNOWN

    return {
        "full caption": _share(model, full, True, same, letters),
        "full caption, answerable": _share(model, present, True, same, letters),
        "full caption, absent": _share(model, absent, True, same, letters),
        "blind, forced choice": _share(model, blind_present, False, same, letters),
        "chance of the forced choice": {"mean": round(chance, 4), "n": len(blind_present)},
        "other caption, forced choice": _share(model, other, False, same, letters),
        "other caption": _share(model, other, True, same, letters),
        "blind, says unknown": _share(model, blind_present, True, abstains, letters),
        "fact left out, says unknown": _share(model, lacking, True, abstains, letters),
    }


@torch.no_grad()
def generate(
    model: Qwen2_5_VLForConditionalGeneration,
    pixels: torch.Tensor,
    temperature: float,
    prompt: str = POLICY_PROMPT,
    max_tokens: int = 40,
    seed: int = 0,
) -> list[list[int]]:
    """One caption per image as token ids, the end included; `pixels` is [N * 64, 1176]. 0 means greedy."""
    words, count = tokenizer(), len(pixels) // (GRID * GRID)
    special = [index for index in words.all_special_ids if index != words.eos_token_id]
    ids = torch.tensor([prompt_ids(prompt)] * count)
    image = torch.tensor(words.convert_tokens_to_ids(IMAGE_PAD))
    torch.manual_seed(seed)
    out: Any = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == image).int(),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, GRID, GRID]] * count),
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature else None,
        top_p=1.0 if temperature else None,
        suppress_tokens=special,
    )
    captions = []
    for row in out[:, ids.shape[1] :].tolist():
        end = row.index(words.eos_token_id) + 1 if words.eos_token_id in row else len(row)
        captions.append(row[:end])
    return captions


def caption_report(captions: Sequence[list[int]], facts: Sequence[str]) -> dict[str, float]:
    """Precision, recall and mean length in tokens, and precision by kind of fact."""
    words = tokenizer()
    kinds: dict[str, list[bool]] = {}
    stated = correct = total = 0
    for ids, truth_json in zip(captions, facts, strict=True):
        said, truth = stated_facts(str(words.decode(ids, skip_special_tokens=True))), true_facts(truth_json)
        stated, correct, total = stated + len(said), correct + len(said & truth), total + len(truth)
        for place, part, word in said:
            kind = "color" if part == "color" else VALUE_KIND.get(place, "none")
            kinds.setdefault(kind, []).append((place, part, word) in truth)
    report = {
        "precision": correct / max(1, stated),
        "recall": correct / max(1, total),
        "length": sum(map(len, captions)) / max(1, len(captions)),
    }
    report |= {f"precision {kind}": sum(hits) / len(hits) for kind, hits in sorted(kinds.items())}
    return {name: round(value, 4) for name, value in report.items()}


def parquet_pixels(rows: Sequence[Row]) -> torch.Tensor:
    """Pixels of the stored images, [N * 64, 1176]."""
    return pixels_of([Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows])


def policy_report(
    model: Qwen2_5_VLForConditionalGeneration,
    rows: Sequence[Row],
    temperature: float,
    prompt: str = POLICY_PROMPT,
) -> dict[str, float]:
    """`caption_report` of one caption per image."""
    model.eval()
    captions = generate(model, parquet_pixels(rows), temperature, prompt)
    return caption_report(captions, [row["facts"] for row in rows])
