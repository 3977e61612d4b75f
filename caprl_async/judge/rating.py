"""A model that sees the image, or the frames of a video, and says how good a caption is: a baseline.

It stands for the questions: every question of a caption gets the caption's rating as its score. CapRL++
(arXiv 2606.09393) holds its reward against such a judge; the weights of the four criteria are its own, the
wording and the scale of 1 to 5 are ours. A caption can talk a rater into liking it, which no caption can do
to a reader that has to answer questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from caprl_async.config import Config, JudgeConfig, JudgeMode, WriterConfig
from caprl_async.engine.types import EngineDied, EngineStats
from caprl_async.judge.cache import VerdictCache
from caprl_async.judge.prompt import without_marks
from caprl_async.types import ImageRef, Outcome, Question, Verdict
from caprl_async.writer.types import Ask, Unwritten, Written
from caprl_async.writer.writer import Writer, load_writer

WEIGHTS = {"factuality": 0.30, "temporal": 0.25, "coverage": 0.25, "no_hallucination": 0.20}
"""Of the criteria; images have no `temporal`, and the others then share its weight."""

_MEANS = {
    "factuality": "what the caption says is true of what you see",
    "temporal": "what happens is told in its order and at its times",
    "coverage": "everything that is to be seen is told",
    "no_hallucination": "nothing is told that is not to be seen",
}
_LOWEST, _HIGHEST = 1.0, 5.0
_FORM = re.compile(r"\(?\b1\s*(?:to|-|–)\s*5\b\)?")
MAX_TOKENS = 64
"""Of an answer."""


def weights_of(image: ImageRef) -> dict[str, float]:
    """The criteria that a caption of this is rated by, with weights that add up to 1."""
    named = {name: w for name, w in WEIGHTS.items() if image.frames or name != "temporal"}
    return {name: weight / sum(named.values()) for name, weight in named.items()}


def rating_prompt(caption: str, weights: Mapping[str, float]) -> str:
    """What a rater reads behind the image; the caption is data and cannot end its block."""
    lines = "\n".join(f"{name}: {_MEANS[name]}" for name in weights)
    form = "\n".join(f"{name}: (1 to 5)" for name in weights)
    shown = without_marks(caption, ("<<<", ">>>"), "<>")
    return (
        "Rate the caption below by each of these, from 1 (not at all) to 5 (entirely):\n"
        f"{lines}\n\nCaption:\n<<<\n{shown}\n>>>\n\nAnswer with these lines and nothing else:\n{form}"
    )


def parse_rating(text: str, weights: Mapping[str, float]) -> float | None:
    """The weighted mean of the ratings as 0..1; None if one is missing, named twice or out of range."""
    text = _FORM.sub("", text)  # who repeats it rates nothing by it
    total = 0.0
    for name, weight in weights.items():
        found = re.findall(rf"\b{name}\b\W{{1,6}}(\d+(?:\.\d+)?)(?!\d)", text, re.IGNORECASE)
        if len(found) != 1 or not _LOWEST <= float(found[0]) <= _HIGHEST:
            return None
        total += weight * (float(found[0]) - _LOWEST) / (_HIGHEST - _LOWEST)
    return total


class Rater:
    """Rates captions; in a judge actor it takes the place of a `Judge`."""

    mode = JudgeMode.rate
    note = ""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.cache = VerdictCache(0)  # ratings are drawn: nothing is kept

    @classmethod
    def load(cls, judge: JudgeConfig, config: Config) -> Rater:
        """Starts an engine for `judge.model`, or finds `judge.endpoint`; images as the policy sees them.

        Raises:
            WriterError: model or endpoint cannot be used.
            EngineDied: vLLM cannot load the model.
        """
        writer = WriterConfig(
            model=judge.model,
            endpoint=judge.endpoint,
            min_pixels=config.policy.min_pixels,
            max_pixels=config.policy.max_pixels,
            temperature=judge.temperature,
            max_tokens=MAX_TOKENS,
            engine=judge.engine,
        )
        return cls(load_writer(writer, "judge", config.seed, pictures=max(1, config.data.frames)))

    @property
    def died(self) -> EngineDied | None:
        """Why nothing can be rated any more, or None."""
        return self._writer.died

    def stats(self) -> EngineStats:
        """Counters since the start."""
        return self._writer.stats()

    async def rate(
        self, captions: Sequence[str], questions: Sequence[Question], image: ImageRef | None
    ) -> tuple[tuple[Verdict, ...], ...]:
        """Verdicts [caption][question], the same on all questions of a caption; no failure becomes a score.

        Raises:
            EngineDied: nothing can be rated any more.
        """
        if image is None:
            gone = Verdict(question_id="", outcome=Outcome.UNSCORABLE, reason="there is no image to rate by")
            return tuple(_on_all(gone, questions) for _ in captions)
        weights = weights_of(image)
        different = list(dict.fromkeys(captions))
        answers = await self._writer.write(
            [Ask(rating_prompt(caption, weights), image) for caption in different]
        )
        found = {
            caption: _verdict(answer, weights) for caption, answer in zip(different, answers, strict=True)
        }
        return tuple(_on_all(found[caption], questions) for caption in captions)

    def close(self) -> None:
        """Ends the engine, or the connection to the endpoint."""
        self._writer.close()


def _on_all(verdict: Verdict, questions: Sequence[Question]) -> tuple[Verdict, ...]:
    return tuple(replace(verdict, question_id=question.question_id) for question in questions)


def _verdict(answer: Written, weights: Mapping[str, float]) -> Verdict:
    if isinstance(answer, Unwritten):
        outcome = Outcome.JUDGE_DOWN if answer.again else Outcome.UNSCORABLE
        return Verdict(question_id="", outcome=outcome, reason=answer.reason)
    score = parse_rating(answer[0].text, weights)
    if score is None:
        return Verdict(
            question_id="", outcome=Outcome.UNSCORABLE, reason=f"no rating: {answer[0].text[:100]!r}"
        )
    return Verdict(question_id="", outcome=Outcome.SCORED, score=score)
