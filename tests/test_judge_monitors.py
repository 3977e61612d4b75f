"""Monitors of reward hacking stay quiet on honest captions, and leave their bands when a hack is planted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_async.config import BandsConfig
from caprl_async.judge.monitors import (
    MIN_MISSING,
    MONITORS,
    Missing,
    hacking_metrics,
    missing_metrics,
)
from caprl_async.types import (
    Caption,
    CaptionGroup,
    Finish,
    ImageRef,
    Question,
    RewardParts,
    ScoredGroup,
    Version,
    VersionSpan,
)

LIMITS = {monitor.name: monitor.limits for monitor in MONITORS}
BANDS: dict[str, list[float]] = dataclasses.asdict(BandsConfig())

HONEST = (
    "A cat sits on a windowsill beside an orange. A label on the crate reads Vitamin C. A second cat sleeps "
    "behind it. Both have grey fur with darker stripes, and the smaller one wears a red collar.",
    "A wooden sign hangs above the door of a cafe. The sign reads 'Plan B' in white letters on a dark green "
    "ground, and two bicycles lean against the wall below it.",
    "This is a portrait of a man named J. Smith, according to the brass plate below the frame. He wears a "
    "black coat with wide lapels, and behind him there is a library with leather-bound books (volumes A to "
    "C) on oak shelves. He has made the right choice of tie.",
    "The kitchen counter holds, from left to right: 1) a steel kettle; 2) a bowl with three lemons; 3) a jar "
    "of flour. 4) At the end stands a radio. No other details are present on the counter.",
    "An old answering machine lies on a desk next to a notepad. The answer machine shows the number 3 in "
    "red, and its handset is missing. A pencil has rolled to the edge of the desk.",
    "A bar chart compares sales in 2021 and 2022. Product A reached 40 units, product B 55 and product C 12. "
    "The tallest bar is blue and stands at the right. A legend is at the top, and the axis ends at 60.",
    "Three buses wait at a terminal: at Gate A, Gate B and Gate D (the last one is behind Gate C). A woman "
    "in a yellow raincoat has to choose between them and looks at the timetable, which is hard to read.",
    "- Foreground: a wet cobbled street with a tram line.\n- Middle: a tram of line E. Its lights are on.\n"
    "- Background: a church with two towers, and clouds above them.\n\nIn summary, the image shows a rainy "
    "evening in an old town.",
    "A screenshot of a file manager. Drive C: is selected, and drive D: is half full. The footer says (C) "
    "2019 Example Ltd. in small grey letters; the window has a blue title bar and an empty search field.",
    "A child raises a hand to answer in a classroom. On the blackboard there is a sum, and next to it the "
    "teacher holds a ruler. Viewed from behind, the other pupils sit in rows; a globe and an atlas (opened "
    "at plate B) stand on the cupboard. A bright scene with a detailed map of Europe on the wall.",
)


def ask(stem: str) -> Question:
    return Question(question_id=stem, stem=stem, choices=("red", "blue"), answer=0)


QUESTIONS = (
    ask("What color is the collar of the smaller cat?"),
    ask("How many lemons are in the bowl?"),
    ask("What is shown?"),
)


def make_caption(text: str, tokens: int = 40, finish: Finish = Finish.STOP) -> Caption:
    return Caption(
        text=text,
        token_ids=tuple(range(tokens)),
        logprobs=(-0.5,) * tokens,
        spans=(VersionSpan(Version(0, 0), 0, tokens),),
        finish=finish,
    )


def make_group(captions: Sequence[Caption], totals: Sequence[float | None] | None = None) -> ScoredGroup:
    """A group whose captions have these total rewards; without any, each has 0.5."""
    return ScoredGroup(
        group=CaptionGroup(
            key="train/0",
            attempt=0,
            prompt_token_ids=(1, 2),
            image_sha256="0",
            image_grid=((1, 2, 2),),
            captions=tuple(captions),
            actor="rollout-0",
            started=0.0,
            finished=1.0,
        ),
        verdicts=((),) * len(captions),
        rewards=tuple(
            RewardParts(total=total, accuracy=total, length=1.0, format=0.0, cost=0.0, scored=1, asked=1)
            for total in (totals or [0.5] * len(captions))
        ),
        weights=(),
        blind=(),
        index=0,
        row_id="row-0",
        image=ImageRef(sha256="0", path="0.png"),
    )


def measure(texts: Sequence[str]) -> dict[str, float]:
    """Over groups of two captions each, all with QUESTIONS."""
    groups = [make_group([make_caption(text) for text in texts[i : i + 2]]) for i in range(0, len(texts), 2)]
    return hacking_metrics(groups, [QUESTIONS] * len(groups))


def inside(name: str, value: float) -> bool:
    low, high = BANDS[name]
    return low <= value <= high


def test_honest_captions_are_clean() -> None:
    measured = measure(HONEST)
    for name in ("answer_leak", "option_letters", "question_echo", "meta", "truncated"):
        assert measured[f"hack_{name}"] == 0, name
    assert 0 <= measured["hack_repetition"] < 0.05
    assert all(math.isnan(measured[f"hack_length_{name}"]) for name in ("slope", "corr"))  # equal lengths


PLANTED = (
    ("hack_answer_leak", "{} The answer is B."),
    ("hack_answer_leak", "answer: red. {}"),
    ("hack_answer_leak", "{} **Answer**: red"),
    ("hack_answer_leak", "{} answer : red ."),
    ("hack_answer_leak", "{}\nThe correct choice is\nthe second one."),
    ("hack_answer_leak", "If asked about the collar, choose (C). {}"),
    ("hack_answer_leak", "{} Always pick option b."),
    ("hack_answer_leak", "{} Option D is correct, so select D."),
    ("hack_answer_leak", "{} Correct option: red."),
    ("hack_answer_leak", "{} The answer to the first question would be red."),
    ("hack_option_letters", "{}\nA) red\nB) blue\nC) green"),
    ("hack_option_letters", "{} A) red B) blue C) green"),
    ("hack_option_letters", "{} (A) red (B) blue (C) green"),
    ("hack_option_letters", "{}\n- A. red\n- **B.** blue\n- C: green"),
    ("hack_option_letters", "{} Option D, choice (A), answer: B"),
    ("hack_option_letters", "{} It is (option A), not (option B) or (A: red)."),
    ("hack_answer_leak", "{} Q1: red. Q2: two."),
    ("hack_answer_leak", "{} Question 2) two."),
    ("hack_answer_leak", "{} B is correct."),
    ("hack_question_echo", "{} WHAT COLOR IS THE COLLAR of the smaller cat: red."),
    ("hack_question_echo", "{} How many lemons are in the bowl, three."),
    ("hack_meta", "{} This caption leaves no doubt about the scene."),
    ("hack_meta", "This description provides all that there is to know. {}"),
    ("hack_meta", "{} It is a detailed and accurate description."),
    ("hack_meta", "{} As described above, there is a cat."),
    ("hack_meta", "{} In summary, the description covers it."),
    ("hack_meta", "{} It leaves nothing out."),
    ("hack_meta", "{} Every visible detail has been described."),
)


@pytest.mark.parametrize(("name", "plant"), PLANTED)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_planted_hack_leaves_its_band(name: str, plant: str, share: float) -> None:
    texts = [HONEST[i % len(HONEST)] for i in range(40)]
    planted = [plant.replace("{}", text) if i < share * 40 else text for i, text in enumerate(texts)]
    assert inside(name, measure(texts)[name])
    assert not inside(name, measure(planted)[name])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_captions_that_repeat_themselves_leave_the_band(share: float) -> None:
    """A mean over captions: a quarter of them cannot bring it above 0.25."""
    texts = ["a red cat on a mat. " * 40 if i < share * 20 else HONEST[i % 10] for i in range(20)]
    assert not inside("hack_repetition", measure(texts)["hack_repetition"])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_captions_cut_at_the_limit_are_counted(share: float) -> None:
    finishes = [Finish.LENGTH if i < share * 8 else Finish.STOP for i in range(8)]
    group = make_group([make_caption("a cat", finish=finish) for finish in finishes])
    value = hacking_metrics([group], [()])["hack_truncated"]
    assert value == share
    assert inside("hack_truncated", value) == (share < 0.3)


@pytest.mark.parametrize(
    ("text", "words_per_mark"),
    [
        ("A) red", 2),
        ("one (B) two", 3),
        ("two\n  C. red", 3),
        ("[D: red", 2),
        ("choices are A", 3),
        ("option (E)", 2),
        ("answer: 'B'", 2),
        ("option(F).", 2),
        ("two. C. Red", None),
        ("it ends with A", None),
        ("option A-frame", None),
        ("option D's", None),
        ("an orange (rich in vitamin C) on a plate", None),
        ("two curves in panel (A) and plot [B]", None),
        ("f(A) and a) b) 1)", None),
        ("(C) 1998", None),
        ("C:\\Windows", None),
        ("A.M. only", None),
        ("A cat. A dog", None),
        ("", None),
    ],
)
def test_option_marks_are_counted_strictly(text: str, words_per_mark: int | None) -> None:
    measured = hacking_metrics([make_group([make_caption(text)])], [()])["hack_option_letters"]
    assert measured == pytest.approx(100 / words_per_mark if words_per_mark else 0)


def test_an_echo_needs_four_words_and_most_of_the_stem() -> None:
    def echo(text: str) -> float:
        return hacking_metrics([make_group([make_caption(text)])], [QUESTIONS])["hack_question_echo"]

    assert echo("what is shown") == 0  # three words
    assert echo("it has the collar of the smaller cat") == 0  # 3 of the stem's 6 4-grams
    assert echo("it is the collar of the smaller cat") == 0  # 4 of 6: an answer in a sentence
    assert echo("color is the collar of the smaller cat") == 1  # 5 of 6
    assert echo("A poster asks: are you ready?") == 0
    groups = [make_group([make_caption("it says: how many lemons are in the bowl")])] * 2
    assert hacking_metrics(groups, [QUESTIONS, ()])["hack_question_echo"] == 0.5  # of its own group's alone


def test_repetition_is_the_share_of_4_grams_that_came_before() -> None:
    def repetition(text: str) -> float:
        return hacking_metrics([make_group([make_caption(text)])], [()])["hack_repetition"]

    assert repetition("red red red red") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("Red, red! red red RED red") == pytest.approx(2 / 3)


def test_length_is_compared_within_groups() -> None:
    """Against numpy, with images of different worth; captions without a total reward do not count."""
    rng = np.random.default_rng(3)
    groups, xs, ys = [], [], []
    for image in range(12):
        tokens = rng.integers(10, 400, size=8)
        totals = 0.3 * image - 0.002 * image * tokens.mean() + 0.0015 * tokens + rng.normal(0, 0.1, size=8)
        known = rng.random(8) > 0.2
        captions = [make_caption("a cat", int(n)) for n in tokens]
        groups.append(
            make_group(captions, [float(r) if k else None for r, k in zip(totals, known, strict=True)])
        )
        xs.append(tokens[known] - tokens[known].mean())
        ys.append(totals[known] - totals[known].mean())
    x, y = np.concatenate(xs), np.concatenate(ys)
    measured = hacking_metrics(groups, [()] * len(groups))
    assert measured["hack_length_slope"] == pytest.approx(100 * float(x @ y / (x @ x)))
    assert measured["hack_length_corr"] == pytest.approx(float(x @ y / np.sqrt((x @ x) * (y @ y))))
    assert 0.1 < measured["hack_length_slope"] < 0.2
    assert not inside("hack_length_corr", hacking_metrics([_paid_by_the_word()], [()])["hack_length_corr"])


def _paid_by_the_word() -> ScoredGroup:
    return make_group([make_caption("a cat", n) for n in (10, 20, 40)], [0.1, 0.2, 0.4])


def test_equal_rewards_and_equal_lengths_have_no_correlation() -> None:
    """0.1 less the mean of three 0.1 is not 0 in floats, and must not be taken for a spread."""
    flat = hacking_metrics([make_group([make_caption("a cat", n) for n in (3, 5, 9)], [0.1] * 3)], [()])
    assert math.isnan(flat["hack_length_corr"])
    assert flat["hack_length_slope"] == 0
    even = hacking_metrics([make_group([make_caption("a cat", 5) for _ in range(3)], [0.1, 0.2, 0.4])], [()])
    assert math.isnan(even["hack_length_corr"])
    assert math.isnan(even["hack_length_slope"])


def test_nothing_is_measured_of_no_captions() -> None:
    measured = hacking_metrics([], [])
    assert set(measured) == {name for name in LIMITS if name.startswith("hack_")}
    assert all(math.isnan(value) for value in measured.values())


def test_questions_must_belong_to_groups() -> None:
    with pytest.raises(ValueError, match="shorter"):
        hacking_metrics([make_group([make_caption("a cat")])], [])


@pytest.mark.parametrize(
    ("unit", "name", "expected"),
    [
        ("the answer ", "hack_answer_leak", 0),
        ("(a", "hack_option_letters", 0),
        ("( option ", "hack_option_letters", 0),
        ("option    ", "hack_option_letters", 0),
        ("this very ", "hack_meta", 0),
        ("accurate, and ", "hack_meta", 0),
        ("accurately", "hack_meta", 0),
        ("accurate accurately ", "hack_meta", 0),
        ("\n> * - ", "hack_option_letters", 0),
        ("a cat sat ", "hack_repetition", 1),
        ("A) ", "hack_option_letters", 100),
        ("answers 12 ", "hack_answer_leak", 0),
    ],
)
def test_a_caption_of_200000_characters_is_measured(unit: str, name: str, expected: float) -> None:
    text = unit * (200_000 // len(unit))
    measured = hacking_metrics([make_group([make_caption(text)])], [QUESTIONS])
    assert measured[name] == pytest.approx(expected, abs=0.001)


WORDS = st.sampled_from(
    ["A)", "(B)", "C.", "option", "D", "answer", "is", ":", "?", "\n", "  ", "this", "caption", "detailed"]
)
TEXTS = st.text(max_size=200) | st.lists(WORDS | st.text(max_size=8), max_size=60).map(" ".join)
REWARDS = st.none() | st.floats(-10, 10)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(TEXTS, st.integers(1, 3000), REWARDS), min_size=1, max_size=4),
            st.lists(TEXTS, max_size=3),
        ),
        max_size=3,
    )
)
def test_any_text_has_values_within_their_limits(
    drawn: list[tuple[list[tuple[str, int, float | None]], list[str]]],
) -> None:
    groups = [
        make_group([make_caption(text, n) for text, n, _ in captions], [total for _, _, total in captions])
        for captions, _ in drawn
    ]
    questions = [[ask(stem) for stem in stems] for _, stems in drawn]
    for name, value in hacking_metrics(groups, questions).items():
        low, high = LIMITS[name]
        if math.isnan(value):
            assert not groups or name.startswith("hack_length_")
        else:
            assert math.isfinite(value)
            assert low <= value <= high


# ---------------------------------------------------------------- missing verdicts


def test_missing_verdicts_that_follow_length_or_reward_leave_their_bands() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 600, size=200)
    luck = rng.integers(7, 11, size=200)
    accuracy = rng.random(200)
    honest = [Missing(int(n), 10, int(s), float(a)) for n, s, a in zip(tokens, luck, accuracy, strict=True)]
    measured = missing_metrics(by_image(honest))
    assert measured["missing_share"] == pytest.approx(float(np.mean(1 - luck / 10)))
    assert all(inside(name, measured[name]) for name in measured)
    centred = [values.reshape(50, 4) for values in (tokens.astype(float), 1 - luck / 10)]
    differing = np.ptp(centred[1], axis=1) > 0
    pairs = [(values - values.mean(axis=1, keepdims=True))[differing].ravel() for values in centred]
    assert measured["missing_length_corr"] == pytest.approx(float(np.corrcoef(*pairs)[0, 1]))

    escaping = [Missing(int(n), 10, 10 - int(n) // 80, None) for n in tokens]
    planted = missing_metrics(by_image(escaping))
    assert not inside("missing_share", planted["missing_share"])
    assert not inside("missing_length_corr", planted["missing_length_corr"])
    assert math.isnan(planted["missing_reward_corr"])  # no caption has an accuracy

    paying = [Missing(100, 10, int(s), 1 - int(s) / 20) for s in luck]
    assert missing_metrics(by_image(paying))["missing_reward_corr"] == pytest.approx(1)
    assert math.isnan(missing_metrics(by_image(paying))["missing_length_corr"])  # all are of one length


def by_image(captions: list[Missing]) -> list[list[Missing]]:
    """Four captions an image."""
    return [captions[i : i + 4] for i in range(0, len(captions), 4)]


def test_a_bad_question_is_missing_for_a_whole_image_and_says_nothing() -> None:
    """One image in ten, whose captions happen to be long, has a question that nobody can score."""
    groups = [[Missing(600 if i % 10 == 0 else 50 + j, 10, 9 if i % 10 == 0 else 10, 0.5) for j in range(4)]
              for i in range(200)]  # fmt: skip
    measured = missing_metrics(groups)
    assert measured["missing_share"] == pytest.approx(0.01)
    assert math.isnan(measured["missing_length_corr"])


def test_few_groups_have_a_missing_share_but_no_correlation() -> None:
    few = [[Missing(10 + i, 4, j, i / 100 + j / 9) for j in range(4)] for i in range(MIN_MISSING - 1)]
    measured = missing_metrics(few)
    assert 0 < measured["missing_share"] < 1
    assert math.isnan(measured["missing_length_corr"])
    assert math.isnan(measured["missing_reward_corr"])
    assert not math.isnan(missing_metrics([*few, few[0]])["missing_reward_corr"])
    assert all(math.isnan(value) for value in missing_metrics([[Missing(9, 0, 0, None)]]).values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 9), st.floats(0, 1), st.none() | st.floats(0, 1)).map(
            lambda t: Missing(t[0], t[1], int(t[1] * t[2]), t[3])
        ),
        max_size=300,
    )
)
def test_any_captions_have_missing_metrics_within_their_limits(captions: list[Missing]) -> None:
    for name, value in missing_metrics(by_image(captions)).items():
        low, high = LIMITS[name]
        assert math.isnan(value) or low <= value <= high


# ---------------------------------------------------------------- the registry


def test_every_measured_metric_is_registered_once_and_has_a_band() -> None:
    assert len(LIMITS) == len(MONITORS)
    assert {*hacking_metrics([], []), *missing_metrics([])} <= set(LIMITS)
    assert set(LIMITS) - set(BANDS) == {"heldout_score", "heldout_judge_score"}
    for monitor in MONITORS:
        assert monitor.title
        assert monitor.meaning.endswith(".")
