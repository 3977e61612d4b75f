"""Counts the tokens that judging must prefill, and those that it does; for the judge's benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from caprl_async.engine.engine import EngineStats
from caprl_async.engine.types import Request, RequestFailed, Response
from caprl_async.judge.asker import Answerer

Ids = tuple[int, ...]

REASONS = {
    "opening": "opening and instruction, once for all",
    "captions": "captions, each once",
    "tails": "questions with options, each once",
    "bound": "= bound",
    "part_blocks": "end of a shared text, less than a block: for each question again",
    "last_blocks": "last block of a prompt that was known as a whole",
    "missed": "known but not found: asked in the same step, or evicted",
    "measured": "= measured",
}
"""What `decompose` tells apart; lines with = are sums of those above."""


def _common(one: Ids, other: Ids) -> int:
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))


def distinct_prefixes(sequences: Sequence[Ids]) -> int:
    """Tokens to compute if no prefix is ever computed twice: the nodes of the sequences' tree."""
    ordered = sorted(set(sequences))
    before: list[Ids] = [(), *ordered]
    return sum(len(s) - _common(s, b) for s, b in zip(ordered, before, strict=False))


def block_shared(prompts: Sequence[Ids], block: int) -> tuple[int, int]:
    """Tokens computed if whole blocks are shared and never lost: without and with the end of each prompt.

    Where every block of a prompt is known its last is computed all the same, for the state at its end.
    """
    known: dict[tuple[int, Ids], int] = {}  # (number of the block before, tokens) -> number
    ideal = real = 0
    for prompt in prompts:
        node = hit = 0
        for start in range(0, len(prompt) - block + 1, block):
            place = (node, prompt[start : start + block])
            hit += place in known
            node = known.setdefault(place, len(known) + 1)
        ideal += len(prompt) - hit * block
        real += len(prompt) - min(hit, (len(prompt) - 1) // block) * block
    return ideal, real


def decompose(heads: Sequence[Ids], prompts: Sequence[Ids], block: int, measured: int) -> dict[str, float]:
    """Prefilled tokens by reason; `heads` are the prompts up to the caption's end. See `REASONS`."""
    opening, of_heads = _common(min(heads), max(heads)), distinct_prefixes(heads)
    bound, (ideal, real) = distinct_prefixes(prompts), block_shared(prompts, block)
    parts = {"opening": opening, "captions": of_heads - opening, "tails": bound - of_heads, "bound": bound}
    rest = {"part_blocks": ideal - bound, "last_blocks": real - ideal, "missed": measured - real}
    return {**parts, **rest, "measured": measured}


class Tally:
    """Hands requests on to an engine and keeps what they cost; a judge takes it for an engine."""

    def __init__(self, engine: Answerer) -> None:
        self.engine = engine
        self.prompts: list[Ids] = []
        self.cached = self.generated = 0

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]:
        answers = await self.engine.generate_many(requests)
        for answer in answers:
            if isinstance(answer, RequestFailed):
                raise answer
            self.prompts.append(answer.prompt_token_ids)
            self.cached += answer.cached_tokens
            self.generated += sum(len(completion.token_ids) for completion in answer.completions)
        return answers

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """The engine is its owner's."""
