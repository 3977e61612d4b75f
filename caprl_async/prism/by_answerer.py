"""A benchmark's questions, answered in writing from captions alone, and compared by rule or by a grader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from caprl_async.benchmarks.asking import BLIND, grade_text, prompt_text, read_grade
from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.reading import final_answer, read_choice
from caprl_async.benchmarks.scorers import score
from caprl_async.config import Config
from caprl_async.prism.captions import Captions, captions_of
from caprl_async.prism.passes import Passes
from caprl_async.prism.told import Told

ANSWERS = "answers"
GRADES = "grades"


def ask(
    items: Sequence[Item], captions: Captions, config: Config, passes: Passes, missing: list[str]
) -> dict[str, Told]:
    """Has `answerer` answer, and `grader` compare where no rule can; ids of items whose images have no
    caption are added to `missing`."""
    prism = config.prism
    prompts = {item.item_id: _prompts(item, captions, config) for item in items}
    missing += [item_id for item_id, texts in prompts.items() if not texts]
    asked = {item_id: texts for item_id, texts in prompts.items() if texts}
    answers = passes.answers(ANSWERS, "questions", config.answerer, "answerer", asked)
    scores = _scores([item for item in items if item.item_id in answers], answers, config, passes)
    return {
        item.item_id: _told(item, answers[item.item_id], scores.get(item.item_id), prism.blind)
        for item in items
        if item.item_id in answers
    }


def _prompts(item: Item, captions: Captions, config: Config) -> list[str]:
    """One for each caption (of several images, the nth captions of all), and the blind one."""
    told = [own for _, own in captions_of(item, captions)]
    prompts = [
        prompt_text(config.prism.template, [caption.text for caption in each], item)
        for each in zip(*told, strict=False)
    ]
    return [*prompts, prompt_text(BLIND, [""], item)] if prompts and config.prism.blind else prompts


def _scores(
    items: Sequence[Item], answers: Mapping[str, Sequence[str]], config: Config, passes: Passes
) -> dict[str, list[float | None]]:
    """item id -> the score of each answer; None where a grader gave none."""
    found: dict[str, list[float | None]] = {
        item.item_id: [score(text, item) for text in answers[item.item_id]]
        for item in items
        if item.rule is not Rule.GRADED
    }
    graded = {
        item.item_id: [grade_text(item, text) for text in answers[item.item_id]]
        for item in items
        if item.rule is Rule.GRADED
    }
    if graded:
        grades = passes.answers(GRADES, "answers to grade", config.grader, "grader", graded)
        found |= {item_id: list(map(read_grade, texts)) for item_id, texts in grades.items()}
    return found


def _told(item: Item, answers: Sequence[str], scores: Sequence[float | None] | None, blind: bool) -> Told:
    scores = scores or [None] * len(answers)
    own = len(answers) - blind
    said = [final_answer(text) for text in answers]
    return Told(
        answers=said[:own],
        scores=scores[:own],
        abstained=[_abstains(text, item) for text in said[:own]],
        blind=scores[-1] if blind else None,
    )


def _abstains(said: str, item: Item) -> float | None:
    """Whether an answer says that the caption does not tell; None if that was not offered."""
    return float(read_choice(said, item.options) == len(item.options) - 1) if item.abstain else None
