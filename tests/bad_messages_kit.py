"""Messages that lie, say nonsense or are none, for the fuzz tests of hub and peers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from replay_kit import StubLearner, StubRollout, group, turn, verdicts

from caprl_async.replay.hub import ReplayQueue
from caprl_async.replay.transport import encode
from caprl_async.types import (
    BatchRequest,
    CaptionGroup,
    Credit,
    Generated,
    Hello,
    Holding,
    ImageRef,
    Judged,
    Outcome,
    Prompt,
    Question,
    Role,
    Sampling,
    Verdict,
    Version,
    VersionSpan,
)

PROMPT = Prompt(
    key="train/0",
    index=0,
    attempt=0,
    row_id="row-0",
    image=ImageRef(sha256="a" * 64, path="/a"),
    text="describe .",
    sampling=Sampling(n=3, temperature=1.0, max_tokens=8),
)
QUESTIONS = (
    Question(question_id="q0", stem="a ?", choices=("x", "y"), answer=0),
    Question(question_id="q1", stem="b ?", choices=("x", "y"), answer=None),
)
NUMBERS = [math.nan, math.inf, -math.inf, 1e308, -1e308, -0.5, 0.5, 1.5, -1.0, 0.0, 5e-324]
WHOLE = [-(2**63), -(2**31), -1, 0, 1, 3, 2**31, 2**32, 2**63, 2**64 - 1]


def one(values: Sequence[Any], value: Any) -> tuple[Any, ...]:
    return (*values[:-1], value)


def with_last(group: CaptionGroup, **changes: Any) -> CaptionGroup:
    return replace(group, captions=one(group.captions, replace(group.captions[-1], **changes)))


def lying_groups(honest: CaptionGroup, most: int) -> Iterator[CaptionGroup]:
    """What no honest rollout would answer; `most` tokens were asked for."""
    last = honest.captions[-1]
    for number in (math.nan, math.inf, -math.inf, 0.5, 1e308):
        yield with_last(honest, logprobs=one(last.logprobs, number))
    for token in (-1, -(2**63), 2**31, 2**64 - 1):
        yield with_last(honest, token_ids=one(last.token_ids, token))
        yield replace(honest, prompt_token_ids=one(honest.prompt_token_ids, token))
    for side in (-1, 0, 2**31):
        yield replace(honest, image_grid=((1, side, 2),))
    for number in (math.nan, math.inf, -math.inf):
        yield replace(honest, started=number)
        yield replace(honest, finished=number)
    longer = most + 1
    many = (VersionSpan(last.spans[0].version, 0, longer),)
    yield with_last(honest, token_ids=(1,) * longer, logprobs=(-0.5,) * longer, spans=many)
    yield with_last(honest, token_ids=(), logprobs=(), spans=())
    yield with_last(honest, logprobs=last.logprobs[1:])
    yield with_last(honest, logprobs=())
    for spans in ((), (VersionSpan(Version(0, 0), 0, 1),), (VersionSpan(Version(0, 0), 0, 99),)):
        yield with_last(honest, spans=spans)
    yield with_last(honest, spans=(VersionSpan(Version(0, 0), 0, 99), VersionSpan(Version(0, 0), 99, 2)))
    yield with_last(honest, spans=(VersionSpan(Version(0, 0), -2, 2),))
    yield replace(honest, captions=())
    yield replace(honest, captions=honest.captions[1:])
    yield replace(honest, captions=honest.captions * 2)
    yield replace(honest, image_grid=())
    yield replace(honest, image_grid=honest.image_grid * 2)
    yield replace(honest, image_sha256="b" * 64)
    yield replace(honest, prompt_token_ids=())
    yield replace(honest, key="train/999")
    yield replace(honest, attempt=honest.attempt + 1)


def lying_verdicts(honest: Sequence[Sequence[Verdict]]) -> Iterator[tuple[tuple[Verdict, ...], ...]]:
    """What no honest judge would answer."""
    rows = tuple(tuple(row) for row in honest)
    last = rows[-1][-1]
    liars = [
        replace(last, score=number) for number in (math.nan, math.inf, -math.inf, -0.1, 1.1, 1e308, None)
    ]
    for number in (math.nan, math.inf, -0.1, 1.1):
        liars += [replace(last, abstained=number), replace(last, off_options=number)]
    liars += [replace(last, draws=draws) for draws in (0, -1, -(2**63), 2**31, 2**64 - 1)]
    liars += [replace(last, outcome=other) for other in Outcome if other is not Outcome.SCORED]
    liars += [Verdict(question_id="other", outcome=Outcome.SCORED, score=0.5)]
    for liar in liars:
        yield one(rows, one(rows[-1], liar))
    yield ()
    yield rows[1:]
    yield rows * 2
    yield ((),) * len(rows)
    yield tuple(row[::-1] for row in rows)


def contents(chance: random.Random) -> Any:
    """A message that decodes and says nonsense, of a peer that is given no work."""
    whole, number = chance.choice(WHOLE), chance.choice(NUMBERS)
    step = chance.choice([w for w in WHOLE if not 0 <= w < 100])
    name = chance.choice(["vandal", "", "\0", "x" * 5000, "../../etc", "<script>", "learner-7", "\u202e"])
    honest = group(PROMPT, Version(0, 0))
    match chance.randrange(8):
        case 0:
            return Credit(
                slots=whole, version=Version(whole, step), busy_s=number, alive_s=number, tokens=whole
            )
        case 1:
            role = chance.choice([Role.ROLLOUT, Role.JUDGE])
            return Hello(role=role, name=name, incarnation=str(whole), serves="nothing")
        case 2:
            return Generated(lease=whole, group=replace(honest, key=name, started=number))
        case 3:  # of someone else's work
            return Generated(
                lease=chance.randrange(1, 60), group=replace(honest, key=f"train/{chance.randrange(9)}")
            )
        case 4:
            return Judged(lease=chance.randrange(1, 60), verdicts=verdicts(QUESTIONS, 3))
        case 5:
            kind = chance.choice([Generated, Judged])
            return kind(lease=whole, failure="x" * chance.choice([0, 1, 50_000]))
        case 6:
            return BatchRequest(version=Version(chance.choice([0, 0, whole]), chance.choice(WHOLE)))
        case _:
            holds = (Holding(whole, name, whole), Holding(-1, f"train/{chance.randrange(9)}", 0))
            return Credit(slots=-abs(whole) // 2, holds=holds * chance.randrange(1, 99))


def broken(data: bytes, chance: random.Random) -> bytes:
    """A message that is cut, flipped, or random altogether."""
    changed, at = bytearray(data), chance.randrange(len(data))
    match chance.randrange(4):
        case 0:
            return chance.randbytes(chance.randrange(300))
        case 1:
            return data[:at]
        case 2:
            changed[at] ^= 1 << chance.randrange(8)
        case _:
            changed[at] = chance.choice([0x80, 0xC1, 0xDF, 0xDD, 0xC6, 0xFF])  # how lengths begin
    return bytes(changed)


def garbage(chance: random.Random) -> list[bytes]:
    """Frames: a broken message, deep nesting, or a good one in a wrong number of them."""
    data = encode(contents(chance))
    match chance.randrange(7):
        case 0:
            return [data] * chance.choice([2, 3, 50])
        case 1:
            return [b"", data]
        case 2:
            nested = chance.choice([b"\x91", b"\x81", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff"])
            return [nested * chance.randrange(1, 20_000)]
        case _:
            return [broken(data, chance)]


async def train(
    queue: ReplayQueue, learner: StubLearner, rollout: StubRollout, *, steps: int, first: int = 0
) -> list[int]:
    """Indices of the prompts in these steps' batches; all that the learner gets is sound."""
    trained: list[int] = []
    for step in range(first, first + steps):
        batch = await turn(queue, learner, rollout, step)
        for scored in batch.groups:
            trained.append(scored.index)
            assert [parts.total for parts in scored.rewards] == pytest.approx([0, 1 / 3, 2 / 3])
            for caption in scored.group.captions:
                assert all(-math.inf < value <= 0 for value in caption.logprobs)
                assert scored.group.key in caption.text
    return trained
