"""The prompts on their way, and what is kept of them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caprl_async.replay.lives import Cut, Life
from caprl_async.replay.transport import encode
from caprl_async.reward.allocation import Allotted
from caprl_async.types import BatchReply, CaptionGroup, Question, ScoredGroup, Struct, TrainBatch, Version


class Kept(Struct, frozen=True):
    """The captions of a live prompt, with the questions that it is asked; `scored` once it is judged."""

    group: CaptionGroup
    questions: tuple[Question, ...]
    scale: float
    scored: ScoredGroup | None = None

    @classmethod
    def of(cls, life: Life, scored: ScoredGroup | None = None) -> Kept:
        assert life.group is not None, "nothing to keep yet"
        return cls(group=life.group, questions=life.questions, scale=life.asked.scale, scored=scored)

    @property
    def asked(self) -> Allotted:
        return Allotted(self.questions, self.scale)


@dataclass
class Queue:
    """Every prompt on its way; `version` is the learner's."""

    version: Version
    cursor: int = 0  # index of the next prompt to admit
    base: int = 0  # step from which this epoch went on
    taken: int = 0  # groups in the batches since
    lives: dict[int, Life] = field(default_factory=dict)
    again: list[Life] = field(default_factory=list)  # to be captioned (again), before any new prompt
    to_judge: list[Life] = field(default_factory=list)
    ready: dict[int, ScoredGroup] = field(default_factory=dict)
    cut: Cut | None = None
    bases: Mapping[int, int] = field(default_factory=dict)  # see staleness.Bases

    @property
    def outstanding(self) -> int:
        """Prompts admitted and neither in a batch nor evicted."""
        return len(self.lives) - (len(self.cut.batch.groups) if self.cut else 0)


def make_cut(batch: TrainBatch, lives: Mapping[int, Life]) -> Cut:
    """The batch with its encoded reply and each group's questions."""
    questions = tuple(lives[scored.index].questions for scored in batch.groups)
    return Cut(batch, encode(BatchReply(batch=batch)), questions)
