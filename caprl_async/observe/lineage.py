"""One sample's whole life as text: what happened to it when, what was asked about it, what it trained."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from caprl_async.config import Config
from caprl_async.data.images import image_folder, stored_path
from caprl_async.replay.events import Event, EventRow
from caprl_async.replay.reading import Judgement, Sample, SampleName, Story, Training
from caprl_async.reward.reward import TERMS, term_weights
from caprl_async.types import Caption, Question, Verdict

_VOID = "void"


@dataclass(frozen=True)
class Told:
    """Prints stories of one run, whose conf says what the numbers mean and where images lie."""

    config: Config  # of the run
    run_dir: Path
    console: Console

    def story(self, story: Story, name: SampleName) -> None:
        """All of a prompt, or of the attempt or the caption that `name` picks."""
        self._line(story.key, style="bold")
        self._image(story)
        self.console.print(_events(story))
        for judgement in story.judgements:
            if name.attempt in (None, judgement.row.attempt):
                self._judgement(story.key, judgement, name.caption)
        if story.waiting and name.attempt in (None, story.waiting_attempt):
            self._waiting(story, name.caption)

    def _image(self, story: Story) -> None:
        admitted = story.admitted()
        if admitted is None:
            self._line("the row of its admission is gone")
            return
        sha256 = admitted.detail["image"]
        self._line(f"row {admitted.detail['row_id']} of {self.config.data.train}")
        if not sha256:
            self._line("its image could not be read")
            return
        path = stored_path(image_folder(self.config, self.run_dir), sha256)
        self._line(f"image {sha256}")
        self._line(f"      {path}" + ("" if path.is_file() else " (not there)"))

    # ------------------------------------------------------------ an attempt

    def _judgement(self, key: str, judgement: Judgement, only: int | None) -> None:
        row = judgement.row
        ended = f"evicted: {row.detail['reason']}" if row.event is Event.EVICTED else "ready"
        void = f", {_VOID}: rolled back" if judgement.voided else ""
        head = (
            f"{key}@{row.attempt}, judged by {judgement.peer} (rotation {judgement.rotation}), {ended}{void}"
        )
        self.console.print()
        self._line(head, style="dim" if judgement.voided else "bold")
        for training in judgement.trainings:
            self._line(f"  {_trained(training)}")
        self.console.print(_questions(judgement, self.config.judge.prompt.abstain))
        for sample in judgement.samples:
            if only in (None, sample.position):
                self._caption(key, judgement, sample)

    def _caption(self, key: str, judgement: Judgement, sample: Sample) -> None:
        row = judgement.row
        self._line(f"{key}@{row.attempt}#{sample.position}: {self._reward(sample)}", style="bold")
        self._text(sample.text)
        self._line(f"  {_tokens(sample.spans, sample.tokens)}; finish: {sample.finish}")
        for training in judgement.trainings:
            advantage = training.advantages(judgement.samples).get(sample.position)
            if advantage is not None:
                void = f" ({_VOID})" if training.voided else ""
                self._line(f"  advantage {advantage:+.6g} in batch {training.cut.version}{void}")
        self.console.print(_verdicts(judgement.verdicts[sample.position]))

    def _reward(self, sample: Sample) -> str:
        terms = sample.terms
        asked = f"{terms['scored']} of {terms['asked']} questions scored"
        if sample.reward is None:
            return f"no reward: {asked} (reward.quorum={self.config.reward.quorum:g})"
        parts = [
            f"{weight:g} x {term} {terms[term]:.6g}"
            for term, weight in zip(TERMS, term_weights(self.config.reward), strict=True)
            if weight and terms[term] is not None
        ]
        kinds = [
            f"{what} {terms[kind]:.6g}"
            for kind, what in (("fact", "on what is there"), ("absent", "on what is absent"))
            if terms[kind] is not None
        ]
        return f"reward {sample.reward:.6g} = {' + '.join(parts)}; {', '.join([asked, *kinds])}"

    def _waiting(self, story: Story, only: int | None) -> None:
        self.console.print()
        self._line(f"{story.key}@{story.waiting_attempt}, waiting for a judge", style="bold")
        for position, caption in enumerate(story.waiting):
            if only in (None, position):
                self._line(f"{story.key}@{story.waiting_attempt}#{position}: not judged yet", style="bold")
                self._text(caption.text)
                self._line(
                    f"  {_tokens(_spans(caption), len(caption.token_ids))}; finish: {caption.finish.value}"
                )

    # ------------------------------------------------------------ lines

    def _text(self, text: str) -> None:
        self.console.print(Text("  " + printable(text), style="green"), soft_wrap=True)

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)


def printable(text: str) -> str:
    """What a model wrote, with signs that would move a terminal's cursor spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def clock(seconds: float) -> str:
    """A time of `time.time()` as people write it, to the millisecond."""
    whole, part = divmod(round(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(whole))}.{part:03d}"


# ---------------------------------------------------------------- events


def _events(story: Story) -> Table:
    table = _table("time", "after, s", "event", "attempt", "version", "by", "", "")
    peers = {judgement.row.seq: judgement.peer for judgement in story.judgements}
    start = story.rows[0].time
    for row in story.rows:
        void = row.seq in story.voided
        cells = (
            clock(row.time),
            f"{row.time - start:.3f}",
            "rollback" if row.event is Event.EPOCH else row.event.value,
            "" if row.attempt is None else str(row.attempt),
            str(row.version),
            peers.get(row.seq) or _by(row),
            _what(row),
            _VOID if void else "",
        )
        table.add_row(*map(Text, cells), style="dim" if void else "")
    return table


def _by(row: EventRow) -> str:
    if row.event in (Event.GENERATING, Event.JUDGING):
        return str(row.detail["peer"])
    return {Event.TRAINED: "learner", Event.EPOCH: "ring"}.get(row.event, "queue")


def _what(row: EventRow) -> str:
    detail = row.detail
    match row.event:
        case Event.GENERATING:
            return "its engine's weights are of that version"
        case Event.JUDGING:
            took = detail["finished"] - detail["started"]
            return f"{detail['tokens']} tokens in {took:.3f} s; the oldest is of that version"
        case Event.READY:
            return "its verdicts are there"
        case Event.CUT:
            return f"into the batch of that version; oldest token {detail['oldest']}"
        case Event.TRAINED:
            return f"in step {row.version.step + 1}"
        case Event.EVICTED:
            return str(detail["reason"])
        case Event.RETRIED:
            return f"{detail['reason']}: again as attempt {row.attempt}"
        case Event.EPOCH:
            return f"to step {row.version.step}"
    return ""


def _trained(training: Training) -> str:
    cut, step = training.cut, training.step
    text = f"batch {cut.version}, cut {clock(cut.time)}, oldest token {cut.detail['oldest']}"
    if training.trained is None:
        text += ": not trained on" + ("" if training.voided else " yet")
    else:
        text += f": learner step {cut.version.step + 1}"
    if step is not None:
        took = step.detail["finished"] - step.detail["started"]
        text += f", begun {clock(step.detail['started'])}, {took:.3f} s, makes weights {step.version}"
    return text + (f" ({_VOID}: rolled back)" if training.voided else "")


# ---------------------------------------------------------------- questions, verdicts, tokens


def _questions(judgement: Judgement, abstain: str) -> Table:
    blind = judgement.blind
    table = _table(
        "", "question", "options, * the right one", "about", "weight", *(["blind"] if blind else [])
    )
    for number, question in enumerate(judgement.questions):
        options = "\n".join(_options(question, abstain))
        cells = [f"q{number}", question.stem, options, question.kind.value, f"{question.weight:g}"]
        if blind:
            cells.append(_number(blind[number].score))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _options(question: Question, abstain: str) -> Iterator[str]:
    for place, choice in enumerate(question.choices):
        yield ("* " if place == question.answer else "  ") + choice
    yield ("* " if question.answer is None else "  ") + abstain


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    table = _table("", "score", "chose", "abstains", "off options", "draws", "outcome", "reason")
    for number, verdict in enumerate(verdicts):
        cells = (
            *(f"q{number}", _number(verdict.score), verdict.choice or "", _number(verdict.abstained)),
            *(_number(verdict.off_options), str(verdict.draws), verdict.outcome.value, verdict.reason or ""),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _spans(caption: Caption) -> list[tuple[str, int, int]]:
    return [(str(span.version), span.start, span.end) for span in caption.spans]


def _tokens(spans: Sequence[tuple[str, int, int]], count: int) -> str:
    made = ", ".join(f"{start} to {end - 1} by {version}" for version, start, end in spans)
    return f"{count} tokens: {made}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
