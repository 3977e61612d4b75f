"""Scorers of benchmarks: against their papers' definitions, and the ways in which released ones go wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.benchmarks.items import BadGold, Item, Rule
from caprl_async.benchmarks.reading import final_answer, number, numbers_in, read_choice
from caprl_async.benchmarks.scorers import check, score

CITIES = ("Paris", "Rome", "New York", "A town in Spain")


def item(rule: Rule, *golds: str, **more: object) -> Item:
    return Item("1", (), "?", golds, rule, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{Paris}}", "Paris"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{cut off", ""),
        ("Because of that, the answer is: B.", "B"),
        ("Answer: 5\nbecause", "5"),
        ("**Answer:** red", "red"),
        (" 7 ", "7"),
        ("", ""),
    ],
)
def test_the_final_answer(text: str, found: str) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B) Rome", 1),
        ("B: the eternal city", 1),
        ("option C", 2),
        ("rome", 1),
        ("The answer is Rome.", 1),
        ("A town in Spain", 3),  # no letter A
        ("B) Paris", None),  # which of them?
        ("b", 1),
        ("B, as it says", 1),
        ("B because of that", 1),
        ("B\n\nBecause the caption says so", 1),
        ("A, B and C", 0),
        ("E", None),
        ("According to the caption", None),
        ("Based on it", None),
        ("I cannot say", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, index: int | None) -> None:
    assert read_choice(answer, CITIES) == index


def test_options_that_are_alike_but_for_their_edges() -> None:
    options = ("[2,3]", "(2,3)", "[2,3)")
    assert read_choice("B) (2,3)", options) == 1
    assert read_choice("B", options) == 1
    assert read_choice("B) the dog", ("a dog", "the dog")) == 1


def test_numbers() -> None:
    assert number("1,234.5") == 1234.5
    assert number("-.5") == -0.5
    assert number("2e3") == 2000.0
    for none in ("", "1,23", "nan", "inf", "1 2", "about 3", "1e999", "-", "."):
        assert number(none) is None
    assert numbers_in("3.5cm 1.2e3 1,234kg .5 1.2.3 2nd 4.") == [3.5, 1200.0, 1234.0, 0.5, 4.0]
    assert numbers_in("from $1,200 to -3.5% in 2019") == [1200.0, -3.5, 2019.0]


@given(st.text())
def test_reading_never_fails(text: str) -> None:
    read_choice(final_answer(text), CITIES)
    number(text)
    numbers_in(text)


# ---------------------------------------------------------------- rules


def test_choice() -> None:
    one = item(Rule.CHOICE, "B", options=CITIES)
    assert score(r"It is in Italy: \boxed{B}", one) == 1
    assert score("Rome", one) == 1
    assert score("A", one) == 0


@pytest.mark.parametrize(
    ("answer", "gold", "rule"),
    [
        ("$975.00", "$975.00", Rule.ANLS),
        (r"\$975.00", "$975.00", Rule.ANLS),
        ("$5", "$5", Rule.ANLS),
        ("$5", "$5", Rule.RELAXED),
        ("$5$", "5", Rule.RELAXED),
        (r"5\%", "5%", Rule.RELAXED),
        (r"5\%", "5%", Rule.ANLS),
        ("U.S.", "U.S.", Rule.ANLS),
        ("U.S.", "U.S", Rule.ANLS),
        (r"1{,}000", "1000", Rule.RELAXED),
        (r"R\&D", "R&D", Rule.EXACT),
        ("3.5cm", "3.5", Rule.OPEN),
    ],
)
def test_what_latex_does_to_an_answer_costs_nothing(answer: str, gold: str, rule: Rule) -> None:
    assert score(rf"\boxed{{{answer}}}", item(rule, gold)) == 1


@pytest.mark.parametrize("rule", [Rule.EXACT, Rule.RELAXED, Rule.ANLS, Rule.CHART_PRO])
@pytest.mark.parametrize("gold", ["!", "...", "%"])
def test_to_say_nothing_is_never_right(gold: str, rule: Rule) -> None:
    for nothing in ("", r"\boxed{}", r"\boxed{?}"):
        assert score(nothing, item(rule, gold)) == 0
    assert score(rf"\boxed{{{gold}}}", item(rule, gold)) == 1


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("100", "105", 1),
        ("100", "105.1", 0),
        ("100", "95", 1),
        ("95", "100", 0),  # 5.3 % of the gold one, though 5 % of what is said
        ("0", "0.0", 1),
        ("0", "0.001", 0),
        ("50%", "0.5", 1),
        ("50%", "50", 0),
        ("0.5", "50", 0),
        ("-10", "-10.4", 1),
        ("Yes", "yes.", 1),
        ("North America", "north america", 1),
        ("[1, 2]", "[1, 2]", 1),
        ("12 cats", "12", 0),
    ],
)
def test_relaxed(gold: str, answer: str, value: float) -> None:
    assert score(rf"\boxed{{{answer}}}", item(Rule.RELAXED, gold)) == value


@given(
    st.floats(-1e6, 1e6).filter(lambda gold: abs(gold) > 1e-3),
    st.floats(-0.2, 0.2).filter(lambda d: abs(abs(d) - 0.05) > 1e-6),
)
def test_relaxed_is_five_percent_of_the_gold_number(gold: float, off: float) -> None:
    answer = gold * (1 + off)
    assert score(rf"\boxed{{{answer:.12f}}}", item(Rule.RELAXED, f"{gold:.12f}")) == (abs(off) <= 0.05)


def edits(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@given(st.text("abc", min_size=1, max_size=12), st.text("abc", min_size=1, max_size=12))
def test_anls_is_its_definition(said: str, gold: str) -> None:
    similarity = 1 - edits(said, gold) / max(len(said), len(gold))
    expected = similarity if similarity >= 0.5 else 0.0
    assert score(rf"\boxed{{{said}}}", item(Rule.ANLS, gold)) == pytest.approx(expected)


def test_anls_takes_the_nearest_of_several_golds() -> None:
    assert score(r"\boxed{3 Dogs}", item(Rule.ANLS, "cats", "3 dogs")) == 1


def test_chartqapro() -> None:
    def pro(answer: str, *golds: str, kind: str = "Factoid", years: tuple[bool, ...] = ()) -> float:
        return score(rf"\boxed{{{answer}}}", item(Rule.CHART_PRO, *golds, kind=kind, years=years))

    assert pro("52", "50") == 1
    assert pro("52%", "50%") == 1
    assert pro("[52]", "50") == 1
    assert pro("[50, 60]", "50") == 0.5
    assert pro("[]", "50") == 0
    assert pro("2019", "2018", years=(True,)) == 0
    assert pro("2019", "2018", years=(False,)) == 1
    assert pro("[2018, 51]", "2018", "50", years=(True, False)) == 1
    assert pro("[2018]", "2018", "50", years=(True, False)) == 0.5
    assert pro("[2018, 50, 7]", "2018", "50", years=(True, False)) == pytest.approx(2 / 3)
    assert pro("Untied States", "United States") == pytest.approx(1 - 2 / 13)
    assert pro("truth", "true", kind="Fact Checking") == 0  # near by letters, and not the same
    assert pro("TRUE", "true", kind="Fact Checking") == 1
    assert pro("b", "B", kind="Multi Choice") == 1


def test_open_questions() -> None:
    assert score(r"\boxed{120 mA}", item(Rule.OPEN, "120")) == 1
    assert score(r"\boxed{0.333}", item(Rule.OPEN, "0.33")) == 1
    assert score(r"\boxed{between 1 and 120}", item(Rule.OPEN, "120")) == 0
    assert score(r"\boxed{The Nile}", item(Rule.OPEN, "Amazon", "the nile")) == 1


def test_typed() -> None:
    assert score("4", item(Rule.TYPED, "4", kind="integer")) == 1
    assert score("4.6", item(Rule.TYPED, "4", kind="integer")) == 0
    assert score("1.449 cm", item(Rule.TYPED, "1.4", kind="float", precision=1)) == 1
    assert score("1.46", item(Rule.TYPED, "1.4", kind="float", precision=1)) == 0
    assert score("[1, 2.0]", item(Rule.TYPED, "[1, 2]", kind="list")) == 1
    assert score("[2, 1]", item(Rule.TYPED, "[1, 2]", kind="list")) == 0
    assert score("Yes", item(Rule.TYPED, "yes", kind="text")) == 1


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("0.5", r"\frac{1}{2}", 1),
        ("2\\sqrt{3}", r"\sqrt{12}", 1),
        ("10", "10", 1),
        ("10", "11", 0),
        ("x^2+2x+1", "(x+1)^2", 1),
        ("\\frac{\\pi}{4}", "45", 0),
        ("65^\\circ", "65", 1),
    ],
)
def test_math(gold: str, answer: str, value: float) -> None:
    assert score(rf"\boxed{{{answer}}}", item(Rule.MATH, gold)) == value


# ---------------------------------------------------------------- gold answers


@pytest.mark.parametrize(
    "bad",
    [
        item(Rule.EXACT),
        item(Rule.EXACT, " "),
        item(Rule.CHOICE, "E", options=CITIES),
        item(Rule.CHOICE, "A", options=("one",)),
        item(Rule.TYPED, "many", kind="integer"),
        item(Rule.TYPED, "many", kind="list"),
        item(Rule.MATH, "???"),
    ],
)
def test_a_gold_answer_that_cannot_be_read_is_no_item(bad: Item) -> None:
    with pytest.raises(BadGold):
        check(bad)


def test_sound_gold_answers_pass() -> None:
    check(item(Rule.CHOICE, "D", options=CITIES))
    check(item(Rule.MATH, r"\frac{1}{2}"))
    check(item(Rule.TYPED, "1.5", kind="float"))
