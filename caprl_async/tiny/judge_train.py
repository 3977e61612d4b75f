"""Trains a tiny judge along a curriculum, many questions per caption in one packed row.

Each row holds a caption once and its questions after it; a question sees the caption and itself only, at the
positions it would have alone. So the packed row computes exactly what separate prompts would.

The answer is asked for not only after the prefill but at every token from the end of the question on. The
look-up is then learnt at the question's own words, one hop from the caption, and later tokens need only carry
it; asked for at the last token alone, a model this small stays for thousands of steps at "some value that
occurs in the caption".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from caprl_async.tiny import grammar
from caprl_async.tiny.grammar import UNKNOWN
from caprl_async.tiny.judge_data import Mix, Reading, readings
from caprl_async.tiny.judge_prompt import prompter
from caprl_async.tiny.pretrain import apply_gradient, learning_rate, optimizer_for
from caprl_async.tiny.tokenizer import tokenizer, vocabulary
from caprl_async.tiny.world import options

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Packed:
    """A batch of packed rows; L tokens, `labels` is -100 except where an answer is predicted."""

    ids: torch.Tensor  # [B, L]
    positions: torch.Tensor  # [B, L]
    visible: torch.Tensor  # [B, 1, L, L] bool
    labels: torch.Tensor  # [B, L]: the answer's token, wherever it is asked for
    final: torch.Tensor  # [B, L] bool: the place after the prefill, which alone counts for accuracy


@dataclass(frozen=True)
class Stage:
    """Part of a curriculum: ends when the running accuracy reaches `until`, or after `steps`."""

    name: str
    mix: Mix
    steps: int
    until: float = 2.0
    peak: float = 7e-4
    floor: float = 7e-4
    batch: int = 24  # captions per step


def block(
    ask: grammar.Ask, phrasing: str, mix: Mix, letters: bool, rng: random.Random
) -> tuple[list[int], list[int]]:
    """(token ids from the question to the prefill, token ids of the answer) of one question."""
    ids = vocabulary()
    question = grammar.question(ask, phrasing)
    if not letters:
        return prompter().tail(question, None), [ids[ask.answer]]
    shown = options(ask, rng)
    shown.insert(rng.randint(0, len(shown)), UNKNOWN)
    letter = LETTERS[shown.index(ask.answer)]
    first = [ask.answer] if rng.random() < mix.words_first else []
    return prompter().tail(question, shown), [ids[word] for word in (*first, letter)]


def pack(drawn: Sequence[Reading], mix: Mix, letters: bool, rng: random.Random) -> Packed:
    """Lays readings out as packed rows, padded on the right."""
    words = tokenizer()
    close = words.eos_token_id  # ends the user's turn
    rows: list[tuple[list[int], ...]] = []
    for item in drawn:
        ids = prompter().head(item.caption)
        head = len(ids)
        place, segment, labels, final = list(range(head)), [0] * head, [-100] * head, [0] * head
        for number, (ask, phrasing) in enumerate(item.asks, start=1):
            asked, answer = block(ask, phrasing, mix, letters, rng)
            said = [*answer, words.eos_token_id]
            if mix.bare:
                asked, said = asked[: asked.index(close)], answer
            ids += asked + said[:-1]
            # Tokens from the question's last one to the prefill's last but one.
            early = 0 if mix.bare else len(asked) - asked.index(close)
            labels += [-100] * (len(asked) - 1 - early) + [said[0]] * early + said
            final += [0] * (len(asked) - 1) + [1] + [0] * (len(said) - 1)
            place += range(head, head + len(asked) + len(said) - 1)
            segment += [number] * (len(asked) + len(said) - 1)
        rows.append((ids, place, segment, labels, final))
    longest = max(len(row[0]) for row in rows)

    def padded(part: int, fill: int) -> torch.Tensor:
        return torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in rows])

    segment_ids = padded(2, -1)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = (same | (segment_ids[:, None, :] == 0)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    return Packed(
        padded(0, int(words.pad_token_id)),
        padded(1, 0),
        visible[:, None],
        padded(3, -100),
        padded(4, 0).bool(),
    )


def answer_logits(model: Qwen2ForCausalLM, packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [A, V], labels [A], final [A]) at the labelled places."""
    hidden = model.model(
        input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.visible, use_cache=False
    ).last_hidden_state
    places = packed.labels != -100
    return model.lm_head(hidden[places]), packed.labels[places], packed.final[places]


def train_judge(
    model: Qwen2ForCausalLM,
    stages: Sequence[Stage],
    checkpoint: Path,
    report: Callable[[str, int, int, float, float], None],
    seed: int = 0,
) -> None:
    """Trains in place through the stages; `report` gets (stage, step, steps, loss, running accuracy)."""
    model.train()
    optimizer = optimizer_for(model)
    first, start, running = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, start, running = state["stage"], state["step"], state["running"]

    def save(stage: int, step: int) -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        temporary = checkpoint.with_suffix(".tmp")
        torch.save({**state, "stage": stage, "step": step, "running": running}, temporary)
        temporary.replace(checkpoint)

    for index in range(first, len(stages)):
        stage = stages[index]
        for step in range(start, stage.steps):
            rng = random.Random(f"{seed}-{stage.name}-{step}")
            letters = rng.random() < stage.mix.letters
            packed = pack(list(readings(stage.mix, rng, stage.batch)), stage.mix, letters, rng)
            logits, labels, final = answer_logits(model, packed)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            warmup = 100 if index == 0 else 1
            apply_gradient(
                model, optimizer, learning_rate(step, stage.steps, stage.peak, stage.floor, warmup)
            )
            right = float((logits.argmax(-1) == labels)[final].float().mean())
            if not letters or stage.mix.letters == 1:
                running += 0.04 * (right - running)
            report(stage.name, step + 1, stage.steps, float(loss.detach()), right)
            if (step + 1) % 250 == 0:
                save(index, step + 1)
            if running >= stage.until:
                break
        start, running = 0, 0.0
        save(index + 1, 0)
