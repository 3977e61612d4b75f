"""Measuring captions of held-out images with every named judge; work beside training, never trained on."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from caprl_async.choices import JudgeMode
from caprl_async.config import Config
from caprl_async.data.rows import Dataset
from caprl_async.replay.eval_spec import Accuracy, EvalError, EvalResult, EvalSpec, JudgeResult
from caprl_async.replay.lives import Prepared
from caprl_async.replay.metrics import mean
from caprl_async.replay.work import (
    GenerateWork,
    JudgeWork,
    Verdicts,
    Work,
    judge_down,
    may_ask_again,
    shown_to,
)
from caprl_async.types import (
    CaptionGroup,
    Finish,
    Outcome,
    Prompt,
    Purpose,
    Question,
    Verdict,
    Version,
)

_BACKOFF_S = 1.0


@dataclass
class Item:
    """One held-out image on its way."""

    prepared: Prepared
    text: str | None = None
    tokens: int | None = None
    finish: Finish | None = None
    verdicts: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)
    attempt: int = 0
    failures: int = 0
    downs: int = 0  # how often a judge failed, whoever was to blame
    judged_then: int | None = None  # items that had been answered when it last did
    failed: str = ""
    facts: dict[str, int] | None = None


class EvalRun:
    """Implements WorkOwner for one evaluation. Pure: no sockets, time is passed in.

    Raises:
        EvalError: a judge has no question about any of the images, or no row has a reference caption.
    """

    def __init__(
        self,
        spec: EvalSpec,
        config: Config,
        prepared: Sequence[Prepared],
        questions: Mapping[str, Dataset],
        on_error: Callable[[str, str], None],
    ) -> None:
        self.spec = spec
        self._config = config
        self._questions = questions
        self._on_error = on_error
        self._items = [Item(row) for row in prepared]
        self._to_caption: list[tuple[float, Item]] = []  # not before, item
        self._to_judge: list[tuple[float, Item, str]] = []
        self._judged = 0  # answers of judges
        self._program_faults, self._program_fault = 0, ""
        self._program = _load_program(config.evaluate.program)
        for judge, dataset in questions.items():
            if not any(dataset.get(item.prepared.row.row_id) for item in self._items):
                raise EvalError(
                    f"{dataset.path}: no question about an image of data.heldout (judge {judge!r})"
                )
        for item in self._items:
            self._begin(item)
        if spec.source == "reference" and all(item.failed for item in self._items):
            raise EvalError(f"{config.data.heldout}: no row has a 'reference_caption'")

    def _begin(self, item: Item) -> None:
        row = item.prepared.row
        if self.spec.source == "blind":
            self._caption(item, "", None, None)
        elif self.spec.source == "reference":
            if row.reference_caption is None:
                item.failed = "no reference_caption"
            else:
                self._caption(item, row.reference_caption, None, None)
        elif item.prepared.image is None:
            item.failed = item.prepared.error
            self._on_error(f"row/{row.row_id}", item.prepared.error)
        else:
            self._to_caption.append((0.0, item))

    @property
    def waiting(self) -> int:
        """Pieces of work not leased yet."""
        return len(self._to_caption) + len(self._to_judge)

    @property
    def done(self) -> bool:
        return all(item.failed or self._complete(item) for item in self._items)

    def _complete(self, item: Item) -> bool:
        return item.text is not None and all(
            judge in item.verdicts or not self._asked(item, judge) for judge in self._questions
        )

    def _asked(self, item: Item, judge: str) -> tuple[Question, ...]:
        row = self._questions[judge].get(item.prepared.row.row_id)
        return row.questions if row is not None else ()

    def _caption(self, item: Item, text: str, tokens: int | None, finish: Finish | None) -> None:
        item.text, item.tokens, item.finish, item.failures = text, tokens, finish, 0
        facts = item.prepared.row.facts
        if self._program is not None and facts is not None:
            try:
                score = self._program(text, facts)
                item.facts = {"stated": score.stated, "correct": score.correct, "total": score.total}
            except Exception as error:  # the user's program: one caption costs the others nothing
                self._program_faults += 1
                self._program_fault = f"evaluate.program: {type(error).__name__}: {error}"
                self._on_error(f"program/{item.prepared.row.row_id}", self._program_fault)
        self._to_judge.extend((0.0, item, judge) for judge in self._questions if self._asked(item, judge))

    # ------------------------------------------------------------ work (WorkOwner)

    def next_generate(self, peer: str, engine: Version | None, now: float) -> GenerateWork | None:
        if self.spec.version is not None and engine != self.spec.version:
            return None
        for position, (not_before, item) in enumerate(self._to_caption):
            if not_before <= now:
                del self._to_caption[position]
                return GenerateWork(self, self._prompt(item), engine)
        return None

    def next_judge(self, peer: str, serves: str, now: float) -> JudgeWork | None:
        for position, (not_before, item, judge) in enumerate(self._to_judge):
            if judge == serves and not_before <= now:
                del self._to_judge[position]
                key, index = self._key(item), item.prepared.index
                asked = self._asked(item, judge)
                seen = shown_to(self._config, judge, item.prepared.image)
                return JudgeWork(self, key, item.attempt, (item.text or "",), asked, index, judge, image=seen)
        return None

    def waiting_judges(self) -> set[str]:
        return {judge for _, _, judge in self._to_judge}

    def generated(self, work: GenerateWork, group: CaptionGroup, now: float) -> None:
        item = self._items[work.prompt.index]
        caption = group.captions[0]
        wanted = self.spec.version
        if wanted is not None and any(span.version != wanted for span in caption.spans):
            item.attempt += 1  # the weights changed under it
            self._to_caption.append((now, item))
            return
        self._caption(item, caption.text, len(caption.token_ids), caption.finish)

    def judged(self, work: JudgeWork, verdicts: Verdicts, now: float) -> None:
        item = self._items[work.rotation]
        down = judge_down(verdicts)
        if down is None:
            item.verdicts[work.serves] = verdicts[0]
            self._judged += 1
            return
        self._on_error(work.key, down.reason)
        if may_ask_again(item, self._judged, self._config.replay.max_attempts, own=not down.whole):
            self._to_judge.append((now + _BACKOFF_S, item, work.serves))
        elif down.whole:
            item.failed = down.reason
        else:
            item.verdicts[work.serves] = verdicts[0]

    def failed(self, work: Work, reason: str, now: float, *, lost: bool = False) -> None:
        item = self._items[work.prompt.index if isinstance(work, GenerateWork) else work.rotation]
        self._on_error(self._key(item), reason)
        not_before = now if lost else now + _BACKOFF_S
        if isinstance(work, JudgeWork):
            if may_ask_again(item, self._judged, self._config.replay.max_attempts):
                self._to_judge.append((not_before, item, work.serves))
            else:
                item.failed = reason
            return
        item.failures += 1
        if item.failures >= self._config.replay.max_attempts:
            item.failed = reason
        else:
            item.attempt += 1
            self._to_caption.append((not_before, item))

    def _key(self, item: Item) -> str:
        return f"eval/{self.spec.name}/{item.prepared.index}"

    def _prompt(self, item: Item) -> Prompt:
        config, row = self._config, item.prepared.row
        assert item.prepared.image is not None, "an image that could not be read was not failed"
        sampling = self.spec.sampling
        if sampling.seed is not None:  # each image draws its own numbers
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + item.prepared.index)
        return Prompt(
            key=self._key(item),
            index=item.prepared.index,
            attempt=item.attempt,
            row_id=row.row_id,
            image=item.prepared.image,
            text=config.data.prompt or row.prompt,
            sampling=msgspec.structs.replace(sampling, n=1),
            purpose=Purpose.EVAL,
        )

    # ------------------------------------------------------------ result

    def answers(self) -> dict[str, list[list[tuple[Question, Verdict]]]]:
        """By judge the verdicts on each image that has any; call it when `done`."""
        good = [item for item in self._items if not item.failed]
        return {
            judge: [
                list(zip(self._asked(item, judge), item.verdicts[judge], strict=True))
                for item in good
                if judge in item.verdicts
            ]
            for judge in self._questions
        }

    def result(self) -> EvalResult:
        """The table's row of this evaluation; call it when `done`."""
        good = [item for item in self._items if not item.failed]
        lengths = [item.tokens for item in good if item.tokens is not None]
        return EvalResult(
            name=self.spec.name,
            images=len(self._items),
            failed=len(self._items) - len(good),
            judges={judge: self._judge_result(good, judge) for judge in self._questions},
            length=mean(lengths) if lengths else None,
            truncated=mean(item.finish is Finish.LENGTH for item in good),
            facts=_fact_result(item.facts for item in good),
            program_faults=self._program_faults,
            program_fault=self._program_fault,
        )

    def _judge_result(self, items: Iterable[Item], judge: str) -> JudgeResult:
        pairs = [
            pair
            for item in items
            for pair in zip(self._asked(item, judge), item.verdicts.get(judge, ()), strict=True)
        ]
        scored = [(question, v) for question, v in pairs if v.outcome is Outcome.SCORED]
        kinds = {question.kind for question, _ in scored}
        rated = judge == "judge" and self._config.judge.mode is JudgeMode.rate
        return JudgeResult(
            **self._accuracy(scored, rated),
            kinds={
                kind.value: self._accuracy([pair for pair in scored if pair[0].kind is kind], rated)
                for kind in sorted(kinds, key=lambda kind: kind.value)
            },
            unscored=sum(v.outcome in (Outcome.UNSCORABLE, Outcome.JUDGE_DOWN) for _, v in pairs),
        )

    def _accuracy(self, scored: Sequence[tuple[Question, Verdict]], rated: bool) -> Accuracy:
        """Who rates answers no question: nothing is right or wrong."""
        right = [] if rated else [verdict.choice == self._gold(question) for question, verdict in scored]
        scores = [verdict.score for _, verdict in scored if verdict.score is not None]
        return Accuracy(accuracy=mean(right), score=mean(scores), n=len(scored))

    def _gold(self, question: Question) -> str:
        return (
            self._config.judge.prompt.abstain
            if question.answer is None
            else question.choices[question.answer]
        )

    def write(self, path: Path) -> None:
        """One JSON line per image."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with temporary.open("w", encoding="utf-8") as out:
            for item in self._items:
                out.write(json.dumps(self._line(item), ensure_ascii=False) + "\n")
        temporary.replace(path)

    def _line(self, item: Item) -> dict[str, Any]:
        image = item.prepared.image
        return {
            "row_id": item.prepared.row.row_id,
            "image": image.path if image else None,
            "caption": item.text,
            "tokens": item.tokens,
            "finish": item.finish.value if item.finish else None,
            "questions": {judge: self._answers(item, judge) for judge in self._questions},
            "facts": item.facts,
            "failed": item.failed or None,
        }

    def _answers(self, item: Item, judge: str) -> list[dict[str, Any]]:
        return [
            {
                "question_id": question.question_id,
                "stem": question.stem,
                "choices": list(question.choices),
                "answer": self._gold(question),
                "kind": question.kind.value,
                "choice": verdict.choice,
                "score": verdict.score,
                "outcome": verdict.outcome.value,
            }
            for question, verdict in zip(self._asked(item, judge), item.verdicts.get(judge, ()), strict=False)
        ]


def _load_program(name: str) -> Callable[[str, str], Any] | None:
    """The function that `evaluate.program` names: (caption, facts) -> object with stated, correct, total."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        program: Callable[[str, str], Any] = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's module
        raise EvalError(f"evaluate.program={name!r} is no module:function: {error}") from error
    return program


def _fact_result(facts: Iterable[dict[str, int] | None]) -> dict[str, float] | None:
    """Precision and recall over all stated and all true facts; nothing stated is precise."""
    known = [counts for counts in facts if counts is not None]
    if not known:
        return None
    stated, correct, total = (
        sum(counts[name] for counts in known) for name in ("stated", "correct", "total")
    )
    return {
        "precision": correct / stated if stated else 1.0,
        "recall": correct / total if total else 1.0,
        "stated_mean": stated / len(known),
    }
