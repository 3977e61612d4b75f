"""Every message and value that crosses a room of the ring. Read this first.

A **prompt** asks for a group of n captions of one image. A **caption** carries its token ids, the engine's
log-probability of each, and the weight **version** of each. **Questions** join a caption only in the queue;
a **verdict** is what a judge says of one caption and one question. A **scored group** has a reward for each
caption; the learner takes **train batches** of them.

All are msgspec structs: typed msgpack on the wire, no pickle. Times are seconds of `time.time()`.
"""

from __future__ import annotations

import enum
import hashlib
from typing import TypeAlias

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values: immutable, fields by name."""


class Version(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One published learner batch. A rollback to a checkpoint starts a new epoch."""

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Inverse of `str`; the text form is what vLLM keeps per token."""
        epoch, step = text.split(".")
        return cls(int(epoch), int(step))


FOREIGN = Version(-1, 0)
"""Weights that no step of this run made (a baseline under evaluation); never admitted to a batch."""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens start..end (end excluded) of one caption were sampled under `version`."""

    version: Version
    start: int
    end: int


class Purpose(enum.Enum):
    TRAIN = "train"  # goes through the ledger into a batch
    EVAL = "eval"  # is measured and never trained on


# ---------------------------------------------------------------- questions


class QuestionKind(enum.Enum):
    FACT = "fact"  # the answer is in the image
    ABSENT = "absent"  # asks for what is not there: the abstain option is the right answer


class Question(Struct, frozen=True):
    """One multiple-choice question. `choices` never holds the abstain text; the judge adds that option."""

    question_id: str
    stem: str
    choices: tuple[str, ...]  # without letters
    answer: int | None  # index into choices; None: the abstain option (kind ABSENT)
    kind: QuestionKind = QuestionKind.FACT
    weight: float = 1.0


class Frame(Struct, frozen=True):
    """One picture of a video."""

    sha256: str  # of the encoded bytes
    path: str
    time: float  # seconds from the video's start


class ImageRef(Struct, frozen=True):
    """An image by content; the pixels lie at a path that every node can read.

    A video is its frames: `sha256` then names all of them with their times, and `path` is the first one's.
    """

    sha256: str  # of the encoded bytes
    path: str
    frames: tuple[Frame, ...] = ()

    @property
    def pictures(self) -> tuple[ImageRef, ...]:
        """What a model is shown: the frames of a video, or the image alone."""
        if not self.frames:
            return (self,)
        return tuple(ImageRef(sha256=frame.sha256, path=frame.path) for frame in self.frames)

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of a video's frames; none of an image."""
        return tuple(frame.time for frame in self.frames)


class ImageData(Struct, frozen=True):
    """An image by its encoded bytes, for jobs that stream; the ring's messages carry references only."""

    sha256: str  # of the encoded bytes
    data: bytes

    @property
    def pictures(self) -> tuple[ImageData, ...]:
        return (self,)

    @property
    def times(self) -> tuple[float, ...]:
        return ()

    @classmethod
    def of(cls, data: bytes) -> ImageData:
        return cls(sha256=hashlib.sha256(data).hexdigest(), data=data)


# ---------------------------------------------------------------- captions


class Sampling(Struct, frozen=True):
    """How a group is drawn. top_p and top_k stay off, so behaviour log-probabilities are exact."""

    n: int
    temperature: float
    max_tokens: int
    min_tokens: int = 0
    seed: int | None = None


class Prompt(Struct, frozen=True):
    """A request for one group of captions. It carries no question.

    `key` names the prompt for its whole life (`train/17` is the 18th prompt the sampler issued); `attempt`
    counts re-issues of the same prompt.
    """

    key: str
    index: int  # position in the sampler's order, from 0
    attempt: int
    row_id: str  # id of the row in the data set
    image: ImageRef
    text: str
    sampling: Sampling
    purpose: Purpose = Purpose.TRAIN


class Finish(enum.Enum):
    STOP = "stop"  # the policy ended the caption
    LENGTH = "length"  # cut at max_tokens


class Caption(Struct, frozen=True):
    """One sampled caption; token ids are the engine's and text is never re-tokenised for training."""

    text: str
    token_ids: tuple[int, ...]  # T tokens, the end token included when sampled
    logprobs: tuple[float, ...]  # T behaviour log-probabilities, after temperature and bans
    spans: tuple[VersionSpan, ...]  # cover 0..T
    finish: Finish


class CaptionGroup(Struct, frozen=True):
    """The n captions of one prompt, as one rollout actor finished them."""

    key: str
    attempt: int
    prompt_token_ids: tuple[int, ...]  # image placeholders expanded, as the engine saw them
    image_sha256: str
    image_grid: tuple[tuple[int, int, int], ...]  # (t, h, w) patches of each picture
    captions: tuple[Caption, ...]
    actor: str
    started: float
    finished: float

    @property
    def oldest(self) -> Version:
        """The oldest version among all tokens of the group."""
        return min(span.version for caption in self.captions for span in caption.spans)


# ---------------------------------------------------------------- verdicts


class Outcome(enum.Enum):
    SCORED = "scored"
    UNSCORABLE = "unscorable"  # the question is bad; it leaves the mean
    JUDGE_DOWN = "judge_down"  # no answer was had; try again elsewhere
    NOT_ASKED = "not_asked"  # sample mode did not draw it: neither in the mean nor in the quorum


class Verdict(Struct, frozen=True):
    """What a judge says of one (caption, question). Meaningless fields are None, never 0.

    A caption's accuracy is the mean of its scores weighted by `draws`: in sample mode that is the mean over
    all of its draws, and draws is 0 only if the question was not asked.
    """

    question_id: str
    outcome: Outcome
    score: float | None = None  # probability (or share of draws) of the right option, 0..1
    abstained: float | None = None  # the same of the abstain option
    off_options: float | None = None  # probability mass (or share of draws) on none of the options
    choice: str | None = None  # text of the most likely option
    reason: str | None = None  # why it is not scored
    draws: int = 1  # answers that the score is the mean of; its weight among the caption's verdicts


class RewardParts(Struct, frozen=True):
    """One caption's reward and the terms it is made of; `total` is None if the quorum was missed."""

    total: float | None  # the terms times their weights, added
    accuracy: float | None  # 0..1; with `data.adaptive_questions` it may pass 1, and is right on average
    length: float  # 0..1
    format: float  # 0..1
    cost: float  # thousands of tokens
    scored: int
    asked: int
    fact: float | None = None  # accuracy over the questions about what is there
    absent: float | None = None  # and over those about what is not


class ScoredGroup(Struct, frozen=True):
    """A caption group with its verdicts and rewards; captions without a reward have left the group."""

    group: CaptionGroup
    verdicts: tuple[tuple[Verdict, ...], ...]  # [caption][question]
    rewards: tuple[RewardParts, ...]
    weights: tuple[float, ...]  # with which each question counts
    blind: tuple[Verdict, ...]  # on an empty caption, per question; empty without `reward.blind`
    index: int  # the prompt's position in the sampler's order
    row_id: str
    image: ImageRef


class TrainBatch(Struct, frozen=True):
    """What the learner trains on to get from `version` to the next; the same bytes go to every rank."""

    version: Version
    groups: tuple[ScoredGroup, ...]
    cut: float


class Evicted(enum.Enum):
    """Why a prompt ended without being trained on."""

    FILTERED = "filtered"  # all rewards of the group are equal: nothing to learn
    UNSCORABLE = "unscorable"  # too few captions had a quorum of verdicts
    FAILED = "failed"  # generation or judging failed `max_attempts` times
    BAD_ROW = "bad_row"  # the image could not be read
    NOT_ASKED = "not_asked"  # all its questions are about absent things, and `reward.absent` is 0


class Retried(enum.Enum):
    """Why a prompt was issued again as the next attempt."""

    STALE = "stale"
    FAILED = "failed"


# ---------------------------------------------------------------- the wire


class Role(enum.Enum):
    ROLLOUT = "rollout"
    JUDGE = "judge"
    LEARNER = "learner"


class Hello(Struct, frozen=True, tag="hello"):
    """First message of a peer, and the first after a restart; older incarnations lose their leases."""

    role: Role
    name: str  # unique in the ring, kept over restarts
    incarnation: str
    serves: str = ""  # a judge: which questions it answers ("judge", "heldout"); else empty


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """One lease that a peer is working on, or has answered without having heard that the answer arrived."""

    lease: int
    key: str
    attempt: int


class Credit(Struct, frozen=True, tag="credit"):
    """What a rollout or judge holds and takes; a heartbeat with its stage's busy time.

    By `holds` a hub that has been restarted finds again what its predecessor had leased.
    """

    slots: int  # pieces of work it takes at one time
    holds: tuple[Holding, ...] = ()
    version: Version | None = None  # the engine's weights (rollout)
    busy_s: float = 0.0  # since start: seconds in which the engine had work
    alive_s: float = 0.0
    tokens: int = 0  # since start: sampled (rollout) or prefilled (judge)
    cached_tokens: int = 0  # since start: prompt tokens served from the prefix cache


class GenerateLease(Struct, frozen=True, tag="generate"):
    lease: int
    prompt: Prompt


class Generated(Struct, frozen=True, tag="generated"):
    """Answer to a GenerateLease: a group, or why there is none."""

    lease: int
    group: CaptionGroup | None = None
    failure: str | None = None


class JudgeLease(Struct, frozen=True, tag="judge"):
    """All questions of all captions of one group, so that each caption is prefilled once.

    `rotation` rotates the gold positions over steps; all captions of a group meet the same permutations.
    """

    lease: int
    key: str
    attempt: int
    captions: tuple[str, ...]
    questions: tuple[Question, ...]
    rotation: int
    image: ImageRef | None = None  # for `judge.mode=rate` alone


class Judged(Struct, frozen=True, tag="judged"):
    """Answer to a JudgeLease; verdicts [caption][question] in the order of the lease."""

    lease: int
    verdicts: tuple[tuple[Verdict, ...], ...] | None = None
    failure: str | None = None


class BatchRequest(Struct, frozen=True, tag="batch_request"):
    """A learner rank at `version` asks for the batch that leads to the next; asking twice is harmless."""

    version: Version


class BatchReply(Struct, frozen=True, tag="batch"):
    batch: TrainBatch | None  # None: training is over


class Ack(Struct, frozen=True, tag="ack"):
    """The hub has journalled the answer to `lease`; until then the peer resends it."""

    lease: int


class Revoke(Struct, frozen=True, tag="revoke"):
    """The hub no longer wants this lease; the peer may abort it."""

    lease: int


PeerMessage: TypeAlias = Hello | Credit | Generated | Judged | BatchRequest
HubMessage: TypeAlias = GenerateLease | JudgeLease | BatchReply | Ack | Revoke
