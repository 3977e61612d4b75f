"""What the judge's benchmarks ask: captions with questions, the released way's draws, a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from caprl_async.config import JudgePromptConfig
from caprl_async.data.load import load_rows
from caprl_async.tiny import grammar, measure
from caprl_async.tiny.facts import stated_facts
from caprl_async.tiny.grammar import UNKNOWN, Ask
from caprl_async.tiny.judge_data import answer_from
from caprl_async.tiny.judge_prompt import judge_prompt_config
from caprl_async.tiny.models import MODELS, save_model
from caprl_async.tiny.tokenizer import END_OF_TEXT, TURN_END, tokenizer, vocabulary
from caprl_async.types import Question

T = TypeVar("T")
GROUP = 8  # captions of an image
CAPTION, EXAMPLE, STEM, CHOICE = 400, 80, 14, 2  # `real`: words of each text
HELDOUT = MODELS.parent / "data" / "heldout.parquet"


@dataclass(frozen=True)
class Group:
    """The captions of one image and its questions."""

    captions: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Draw:
    """One request of the released way: `order` lists option indices as shown, the abstain option last."""

    caption: str
    question: Question
    order: tuple[int, ...]


def draw(group: Group, draws: int, rng: random.Random) -> list[list[Draw]]:
    """`[caption][draw]`: each caption meets questions and orders of its own, as released."""
    drawn: list[list[Draw]] = [[] for _ in group.captions]
    for caption, mine in zip(group.captions, drawn, strict=True):
        for _ in range(draws):
            question = rng.choice(group.questions)
            size = len(question.choices)
            mine.append(Draw(caption, question, (*rng.sample(range(size), size), size)))
    return drawn


def interleave(queues: Sequence[Sequence[T]], at_once: int, rng: random.Random) -> list[T]:
    """Items of all queues, each queue's in order; the next is of a random one of `at_once` open queues."""
    waiting = [list(queue) for queue in reversed(queues) if queue]
    opened: list[list[T]] = []
    order = []
    while waiting or opened:
        while waiting and len(opened) < at_once:
            opened.append(waiting.pop())
        queue = rng.choice(opened)
        order.append(queue.pop(0))
        opened = [queue for queue in opened if queue]
    return order


def real_work(images: int, questions: int, seed: int) -> tuple[JudgePromptConfig, list[Group]]:
    """Texts as long as the paper's, of words that any vocabulary spells."""
    rng, pool = random.Random(seed), grammar.COLORS + grammar.PLACES + grammar.VALUES

    def text(words: int) -> str:
        return " ".join(rng.choices(pool, k=words))

    def question(name: str) -> Question:
        choices = tuple(f"{first} {text(CHOICE - 1)}" for first in rng.sample(pool, 4))  # never two alike
        return Question(question_id=name, stem=f"{text(STEM)} ?", choices=choices, answer=rng.randrange(4))

    prompt = JudgePromptConfig()
    for _ in range(2):
        shown = "".join(f"\n{letter}) {text(CHOICE)}" for letter in "ABCD")
        prompt.instruction += f"\nExample:\n{text(EXAMPLE)}\nQuestion: {text(STEM)} ?{shown}\nThe answer is B"
    return prompt, [
        Group(
            tuple(text(CAPTION) for _ in range(GROUP)),
            tuple(question(f"q{image}.{i}") for i in range(questions)),
        )
        for image in range(images)
    ]


def tiny_work(images: int, seed: int) -> tuple[JudgePromptConfig, list[Group]]:
    """Held-out images of the demo; captions are the reference's sentences, shuffled and some left out."""
    rng, prompt, groups = random.Random(seed), judge_prompt_config(), []
    for row in load_rows(HELDOUT, prompt.abstain).rows[:images]:
        said = [f"{text.strip()} ." for text in (row.reference_caption or "").split(".") if text.strip()]
        captions = [" ".join(rng.sample(said, rng.randint(1, len(said)))) for _ in range(GROUP)]
        groups.append(Group(tuple(captions), row.questions))
    return prompt, groups


def caption_groups(images: int, policies: Sequence[str]) -> list[Group]:
    """Captions that the tiny policies sample of held-out images."""
    rows, raw = load_rows(HELDOUT, UNKNOWN).rows[:images], measure.read_rows(HELDOUT)[:images]
    pixels, words, groups = measure.parquet_pixels(raw), tokenizer(), []
    for name in policies:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODELS / name).eval()
        drawn = [measure.generate(model, pixels, temperature=1.0, seed=seed) for seed in range(GROUP)]
        for row, ids in zip(rows, zip(*drawn, strict=True), strict=True):
            captions = tuple(str(words.decode(i, skip_special_tokens=True)) for i in ids)
            groups.append(Group(captions, row.questions))
    return groups


def stated(caption: str, questions: Sequence[Question]) -> float:
    """Share of the questions whose right answer follows from what the caption says, by a program."""
    facts = stated_facts(caption)
    color = {place: word for place, part, word in facts if part == "color"}
    value = {place: word for place, part, word in facts if part == "value"}
    right = 0
    for question in questions:
        asked = question.stem.split()  # `what <attribute> is <key> ?` or `where is <key> ?`
        attribute = "place" if asked[0] == "where" else asked[1]
        gold = UNKNOWN if question.answer is None else question.choices[question.answer]
        right += answer_from(Ask("", attribute, asked[-2], gold), color, value) == gold
    return right / len(questions)


def random_judge(folder: Path) -> str:
    """A Qwen2 of 14M random parameters that reads the tiny world's words; its folder.

    Large enough that a token's work outweighs Python's; two heads of keys and values as the paper's judge.
    """
    ids = vocabulary()
    config = Qwen2Config(
        vocab_size=len(ids),
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=ids[END_OF_TEXT],
        eos_token_id=ids[TURN_END],
        pad_token_id=ids[END_OF_TEXT],
    )
    torch.manual_seed(0)
    save_model(Qwen2ForCausalLM(config), folder, vision=False)
    return str(folder)
