"""The benchmarks that are known: how a row of their files becomes items, and by which rule those count.

Two kinds of files are read: the TSV files of VLMEvalKit and the parquet files of Hugging Face data sets (as
lmms-eval takes them). Their columns differ in name only, so one function reads both. Which benchmark a file
is, the conf says; it is never guessed from a path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from caprl_async.benchmarks.items import Item, Rule
from caprl_async.benchmarks.reading import listed
from caprl_async.benchmarks.records import MissingColumn, Record, inline_options, unlettered
from caprl_async.data.rows import BadRow

_ALTERNATIVES = (Rule.EXACT, Rule.RELAXED, Rule.ANLS, Rule.CHART_PRO, Rule.OPEN)
"""Rules whose gold answer may be a list: of alternatives, or CHART_PRO's of parts."""

Build = Callable[[Record], Iterator[Item]]

IDS = ("index", "id", "question_id", "questionId", "pid", "sample_index", "key", "ID")

_LETTER = re.compile(r"\s*\(?([A-Z])\)?[.:]?\s*")
_PLACED = re.compile(r"<image\s*\d*>")


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark's files are read and its items are summed up."""

    title: str
    build: Build
    images: tuple[str, ...] = ("image",)  # columns that may hold them, in order: the first that does
    several: bool = False  # all of these columns are parts of a row's images
    macro: bool = False  # the mean over categories of their means, not over items
    prompted: Rule = Rule.EXACT  # of questions without options in Prism's form, which has no other columns
    ids: tuple[str, ...] = IDS  # columns that may hold a row's id, in order; none: its place in the file
    circle: Callable[[str], str] = str  # an id -> the circle it is part of: rows right only together


# ---------------------------------------------------------------- what many have


def _item(record: Record, question: str, golds: tuple[str, ...], rule: Rule, **more: Any) -> Item:
    hint = record.maybe_text("hint", "context")
    asked = _PLACED.sub(_named(record), f"{hint}\n{question}" if hint else question).strip()
    more.setdefault("category", record.maybe_text("category", "Category", "subfield", "subject", "type"))
    return Item(record.item_id, record.images, asked, golds, rule, **more)


def _named(record: Record) -> Callable[[re.Match[str]], str]:
    """`<image 2>` in a question becomes words if there are several images, nothing if there is one."""

    def words(match: re.Match[str]) -> str:
        return match[0].strip("<>") if len(record.images) > 1 else ""

    return words


def _letter(record: Record, options: tuple[str, ...], *names: str) -> str:
    """The gold answer as a letter, from a letter or an option's text.

    Raises:
        BadRow: it is none of these.
    """
    answer = record.text(*names)
    letter = _lettered(answer, options)
    if letter is None:
        raise BadRow("gold_not_an_option", f"{answer!r}, options {options}"[:300])
    return letter


def _lettered(answer: str, options: Sequence[str]) -> str | None:
    """A capital is a letter; so is a small one that is no option's text."""
    if match := _LETTER.fullmatch(answer):
        return match[1]
    if answer in options:
        return chr(ord("A") + options.index(answer))
    match = _LETTER.fullmatch(answer.upper())
    return match[1] if match else None


def _choice_or(record: Record, question: str, rule: Rule) -> Iterator[Item]:
    """A choice where a row has options. Those at a question's end count if the answer is one of them: what
    looks like options may be a part of the question.

    Raises:
        BadRow: the answer is none of the options in the row's columns.
    """
    options = _options(record)
    if options:
        yield _choice(record, question, options)
        return
    stem, options = inline_options(question)
    if options and _lettered(str(record.value("answer")), options):
        yield _choice(record, stem, options)
    elif rule is Rule.CHOICE:
        raise BadRow("no_choices", f"no options A, B, ... at the end of {question[-100:]!r}")
    elif rule in _ALTERNATIVES:
        yield _item(record, question, record.texts("answer"), rule)
    else:
        yield _item(record, question, (record.text("answer"),), rule)


def _choice(record: Record, question: str, options: tuple[str, ...], circle: str = "") -> Item:
    return _item(
        record,
        question,
        (_letter(record, options, "answer", "label"),),
        Rule.CHOICE,
        options=options,
        circle=circle,
    )


def _options(record: Record) -> tuple[str, ...]:
    """From columns A, B, ..., or choice_a ..., or a list; none if there are none."""
    lettered = record.lettered() or record.lettered("choice_")
    if lettered:
        return lettered
    if record.maybe("options", "choices", "multi-choice options") is None:
        return ()
    return unlettered(record.texts("options", "choices", "multi-choice options"))


def _letters(record: Record) -> Iterator[Item]:
    """A question with its options in columns, in a list, or at the question's end."""
    question, options = record.text("question"), _options(record)
    if not options:
        question, options = inline_options(question)
    if not options:
        raise MissingColumn(["A, B, ...", "options"], list(record.values))
    yield _choice(record, question, options)


# ---------------------------------------------------------------- one by one


def _ai2d(record: Record) -> Iterator[Item]:
    """The answer is a letter, or an index from 0 even where options are numbers."""
    options, answer = _options(record), record.text("answer")
    if answer.isascii() and answer.isdigit():
        if int(answer) >= len(options):
            raise BadRow("gold_not_an_option", f"{answer!r}, options {options}"[:300])
        letter = chr(ord("A") + int(answer))
    else:
        letter = _letter(record, options, "answer")
    yield _item(record, record.text("question"), (letter,), Rule.CHOICE, options=options)


def _mmmu(record: Record) -> Iterator[Item]:
    """Multiple choice, or an open question where there is no option."""
    options = _options(record)
    if options and record.maybe_text("question_type") != "open":
        yield _choice(record, record.text("question"), options)
    else:
        yield _item(record, record.text("question"), record.texts("answer"), Rule.OPEN)


def _chartqa(record: Record) -> Iterator[Item]:
    yield _item(record, record.text("question", "query"), record.texts("answer", "label"), Rule.RELAXED,
                category=record.maybe_text("split", "type", "human_or_machine"))  # fmt: skip


def _document(record: Record) -> Iterator[Item]:
    yield _item(record, record.text("question"), record.texts("answers", "answer"), Rule.ANLS)


def _charxiv(record: Record) -> Iterator[Item]:
    """Reasoning questions, and descriptive ones if written out: of those the data set keeps numbers only."""
    if record.maybe("question") is not None:
        yield _item(record, record.text("question"), record.texts("answer"), Rule.GRADED)
        return
    yield _item(
        record, record.text("reasoning_q"), (record.text("reasoning_a"),), Rule.GRADED, category="reasoning"
    )


def _chartqapro(record: Record) -> Iterator[Item]:
    """The last turn of a conversation, with the turns before it."""
    questions = record.texts("question", "Question")
    answers, kind = record.texts("answer", "Answer"), record.text("question_type", "Question Type")
    flags = record.texts("year", "Year") if record.maybe("year", "Year") is not None else ()
    years = tuple(flag.upper() == "YES" for flag in flags)
    paragraph = record.maybe_text("paragraph", "Paragraph")
    before = [f"{q}\n{a}" for q, a in zip(questions[:-1], answers, strict=False)]
    golds = tuple(listed(answers[-1]) or answers[-1:])
    if kind.casefold() == "conversational":
        years = years[-1:]
    question = "\n".join(part for part in (paragraph, *before, questions[-1]) if part)
    yield _item(record, question, golds, Rule.CHART_PRO, kind=kind, category=kind, years=years)


def _mathvista(record: Record) -> Iterator[Item]:
    question, kind = record.text("question"), record.maybe_text("answer_type") or "text"
    unit = record.maybe_text("unit")
    options = _options(record)
    if options:
        answer = record.text("answer")  # an option's text, even where the texts are letters
        letter = (
            chr(ord("A") + options.index(answer)) if answer in options else _letter(record, options, "answer")
        )
        yield _item(record, question, (letter,), Rule.CHOICE, options=options)
        return
    told = record.maybe_text("precision") or "2"
    try:
        precision = int(float(told))
    except (ValueError, OverflowError) as error:
        raise BadRow("malformed_precision", told[:100]) from error
    asked = f"{question} (Unit: {unit})" if unit else question
    yield _item(record, asked, (record.text("answer"),), Rule.TYPED, kind=kind, precision=precision)


def _mathverse(record: Record) -> Iterator[Item]:
    """Options stand at the end of the question; without them the answer is a number or an expression."""
    question, options = inline_options(record.text("question", "query_wo"))
    category = record.maybe_text("problem_version")
    if options and _LETTER.fullmatch(record.text("answer")):
        gold = (_letter(record, options, "answer"),)
        yield _item(record, question, gold, Rule.CHOICE, options=options, category=category)
    else:
        yield _item(
            record,
            record.text("question", "query_wo"),
            (record.text("answer"),),
            Rule.MATH,
            category=category,
        )


def _mathvision(record: Record) -> Iterator[Item]:
    options = _options(record)
    if options:
        yield _choice(record, record.text("question"), options)
    else:
        yield _item(record, record.text("question"), (record.text("answer"),), Rule.MATH)


def _wemath(record: Record) -> Iterator[Item]:
    options = record.lettered()
    if not options:
        _, options = inline_options(record.text("option"))
    yield _choice(record, record.text("question"), options)


def _visulogic(record: Record) -> Iterator[Item]:
    """Four options, which are in the image or the question."""
    yield _choice(record, record.text("question"), ("A", "B", "C", "D"))


def _realworldqa(record: Record) -> Iterator[Item]:
    """Options where there are some, else a short answer."""
    yield from _choice_or(record, record.text("question"), Rule.EXACT)


def _gqa(record: Record) -> Iterator[Item]:
    yield _item(record, record.text("question"), (record.text("answer"),), Rule.EXACT)


def _mmbench(record: Record) -> Iterator[Item]:
    """Rows whose indices differ by a multiple of 1e6 are one question with its options turned round."""
    yield _choice(record, record.text("question"), _options(record), _circle(record.item_id))


def _circle(index: str) -> str:
    return str(int(index) % 1_000_000) if index.isdigit() else index


def prompted(record: Record, rule: Rule) -> Iterator[Item]:
    """A row of Prism's form: the question, with its options if it has some, is the prompt.

    Raises:
        BadRow: the benchmark's questions have options, and none are found in the prompt.
    """
    yield from _choice_or(record, record.text("prompt", "question"), rule)


def _mmvet(record: Record) -> Iterator[Item]:
    yield _item(record, record.text("question"), (record.text("answer"),), Rule.GRADED,
                category=record.maybe_text("capability", "category"))  # fmt: skip


_SEVEN = ("image", *(f"image_{number}" for number in range(1, 8)))

BENCHMARKS: dict[str, Benchmark] = {
    "ai2d": Benchmark("AI2D", _ai2d, prompted=Rule.CHOICE),
    "mmstar": Benchmark("MMStar", _letters, prompted=Rule.CHOICE),
    "mmmu": Benchmark("MMMU", _mmmu, _SEVEN, several=True, prompted=Rule.OPEN),
    "mmmu_pro": Benchmark("MMMU-Pro", _mmmu, _SEVEN, several=True, prompted=Rule.OPEN),
    "seed2plus": Benchmark("SEED-Bench-2-Plus", _letters, prompted=Rule.CHOICE),
    "seed": Benchmark("SEED-Bench", _letters, prompted=Rule.CHOICE),
    "chartqa": Benchmark("ChartQA", _chartqa, prompted=Rule.RELAXED),
    "infovqa": Benchmark("InfographicVQA", _document, prompted=Rule.ANLS),
    "docvqa": Benchmark("DocVQA", _document, prompted=Rule.ANLS),
    "charxiv": Benchmark("CharXiv", _charxiv, prompted=Rule.GRADED),
    "chartqapro": Benchmark("ChartQAPro", _chartqapro, prompted=Rule.CHART_PRO),
    "mathvista": Benchmark("MathVista", _mathvista, ("decoded_image", "image"), prompted=Rule.MATH),
    "mathverse": Benchmark("MathVerse", _mathverse, prompted=Rule.MATH),
    "mathvision": Benchmark("MathVision", _mathvision, ("decoded_image", "image"), prompted=Rule.MATH),
    "wemath": Benchmark("We-Math", _wemath, ("image", "image_path"), prompted=Rule.CHOICE, ids=()),
    "visulogic": Benchmark("VisuLogic", _visulogic, ("image", "image_path")),
    "custom": Benchmark("own questions", _realworldqa),
    "realworldqa": Benchmark("RealWorldQA", _realworldqa),
    "gqa": Benchmark("GQA", _gqa, ("image", "imageId")),
    "mmbench": Benchmark("MMBench", _mmbench, prompted=Rule.CHOICE, circle=_circle),
    "mmvet": Benchmark("MM-Vet", _mmvet, prompted=Rule.GRADED),
    "mme_realworld": Benchmark("MME-RealWorld", _letters, macro=True, prompted=Rule.CHOICE),
}
"""By the name that `prism.benchmark` takes."""

CAPRL_QA = "caprl_qa"
"""`prism.benchmark` of CapRL-QA data (as data.train), whose questions the judge answers."""

GRADED = ("charxiv", "mmvet")
"""Those whose answers no rule can compare: they need a grader."""
