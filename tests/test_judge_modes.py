"""Scores mean what they say: `expected` is the mean of `sample`, `likelihood` is a plain forward pass."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from judge_kit import CAPTION, PROMPT, ReferenceEngine, judge_config, question, save_random_judge

from caprl_async.config import JudgeMode
from caprl_async.data.chat import load_tokenizer
from caprl_async.engine.types import Completion, EngineDied, Request, RequestFailed, Response
from caprl_async.judge.judge import Judge
from caprl_async.judge.prompt import JudgePrompter
from caprl_async.judge.verdicts import JudgeConfigError
from caprl_async.types import Finish, Outcome, Question, Verdict

QUESTIONS = (
    question(["red", "blue"], 0, "color"),
    question(["circle", "star"], 1, "shape", "what shape is topleft ?"),
    question(["green", "black"], None, "absent", "what color is topright ?"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_judge(tmp_path_factory.mktemp("judge") / "judge")


@pytest.fixture(scope="module")
def engine(folder: Path) -> ReferenceEngine:
    return ReferenceEngine(folder)


def _ask(
    judge: Judge, questions: Sequence[Question], captions: Sequence[str] = (CAPTION,), rotation: int = 0
) -> tuple[tuple[Verdict, ...], ...]:
    return asyncio.run(judge.judge(captions, questions, rotation))


def test_expected_is_the_mean_of_sample(folder: Path, engine: ReferenceEngine) -> None:
    """10,000 draws against the exact value, 4.5 standard errors: about one wrong alarm in 10,000 runs."""
    exact = _ask(Judge.on(engine, judge_config(folder, permutations=2)), QUESTIONS)[0]
    draws = 10_000
    sampled = _ask(Judge.on(engine, judge_config(folder, JudgeMode.sample, draws=draws)), QUESTIONS)[0]
    assert sum(verdict.draws for verdict in sampled) == draws
    for expected, got in zip(exact, sampled, strict=True):
        for name in ("score", "abstained", "off_options"):
            p = getattr(expected, name)
            assert abs(getattr(got, name) - p) < 4.5 * math.sqrt(p * (1 - p) / got.draws), (got, expected)
    mean = sum(verdict.score * verdict.draws for verdict in sampled) / draws
    exact_mean = sum(verdict.score for verdict in exact) / len(exact)
    assert abs(mean - exact_mean) < 4.5 * 0.5 / math.sqrt(draws)
    assert max(verdict.off_options for verdict in exact) > 0.05  # the check covers mass off the options


def test_expected_keeps_off_mass_in_the_denominator(folder: Path, engine: ReferenceEngine) -> None:
    verdict = _ask(Judge.on(engine, judge_config(folder)), [QUESTIONS[0]])[0][0]
    request = engine.requests[-1]
    letters = engine.logprobs(request.prompt_token_ids, 0.6)[list(request.logprob_token_ids)]
    assert request.temperature == 0.6
    assert math.isclose(1 - verdict.off_options, sum(map(math.exp, letters)), abs_tol=1e-9)
    assert verdict.score in [pytest.approx(math.exp(value)) for value in letters[:2]]


def test_likelihood_equals_a_plain_forward_pass(folder: Path, engine: ReferenceEngine) -> None:
    choices = ["red circle", "red star", "blue", "topleft red circle"]
    asked = question(choices, 1)
    config = judge_config(folder, JudgeMode.likelihood)
    before = len(engine.requests)
    verdict = _ask(Judge.on(engine, config), [asked])[0][0]

    words = load_tokenizer(folder)
    prompter = JudgePrompter(words, PROMPT)
    prompt = prompter.head(CAPTION) + prompter.tail(asked.stem, None)
    scores, firsts = [], set()
    for option in (*choices, PROMPT.abstain):
        ids = words(option)["input_ids"]
        firsts.add(ids[0])
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        scores.append(float(logprobs[range(len(ids)), ids].mean()) / config.temperature)
        first = logprobs[0].exp()
    expected = torch.tensor(scores).double().softmax(0)
    assert verdict.score == pytest.approx(float(expected[1]), rel=1e-4)
    assert verdict.abstained == pytest.approx(float(expected[-1]), rel=1e-4)
    assert verdict.off_options == pytest.approx(1 - float(first[sorted(firsts)].sum()), rel=1e-4)
    # The root, "red", "topleft", "topleft red": options that begin alike share their requests.
    assert len(engine.requests) - before == 4
    assert all(request.max_tokens == 1 for request in engine.requests[before:])


def test_single_token_options_cost_one_request(folder: Path, engine: ReferenceEngine) -> None:
    before = len(engine.requests)
    _ask(Judge.on(engine, judge_config(folder, JudgeMode.likelihood)), QUESTIONS)
    assert len(engine.requests) - before == len(QUESTIONS)


BAD = {
    "two options read": question(["red", "blue", "red "], 1),
    "two options read 'unknown'": question(["red", "unknown"], 0),
    "cannot tell": question(["zzz", "yyy", "red"], 2),  # both are the unknown word
    "none of the 2 choices": question(["red", "blue"], 2),
    "no choices": question([], None),
    "empty": question(["red", " "], 0),
}


@pytest.mark.parametrize("mode", [mode for mode in JudgeMode if mode is not JudgeMode.rate])
@pytest.mark.parametrize("reason", list(BAD))
def test_bad_questions_are_unscorable_with_a_reason(
    folder: Path, engine: ReferenceEngine, mode: JudgeMode, reason: str
) -> None:
    before = len(engine.requests)
    verdict = _ask(Judge.on(engine, judge_config(folder, mode)), [BAD[reason]])[0][0]
    assert verdict.outcome is Outcome.UNSCORABLE
    assert verdict.score is None
    assert reason in (verdict.reason or "")
    assert len(engine.requests) == before


def test_one_bad_question_does_not_touch_the_others(folder: Path, engine: ReferenceEngine) -> None:
    judge = Judge.on(engine, judge_config(folder))
    alone = _ask(judge, QUESTIONS)[0]
    mixed = _ask(judge, [BAD["empty"], *QUESTIONS])[0]
    assert mixed[0].outcome is Outcome.UNSCORABLE
    assert mixed[1:] == alone


def test_more_options_than_letters_are_unscorable_only_with_letters(
    folder: Path, engine: ReferenceEngine
) -> None:
    many = question(load_tokenizer(folder).convert_ids_to_tokens(list(range(60, 90))), 0)
    assert _ask(Judge.on(engine, judge_config(folder)), [many])[0][0].outcome is Outcome.UNSCORABLE
    likely = Judge.on(engine, judge_config(folder, JudgeMode.likelihood))
    assert _ask(likely, [many])[0][0].outcome is Outcome.SCORED


def test_unknown_words_are_unscorable_in_likelihood_mode(folder: Path, engine: ReferenceEngine) -> None:
    judge = Judge.on(engine, judge_config(folder, JudgeMode.likelihood))
    assert "vocabulary" in (_ask(judge, [question(["zzz", "red"], 0)])[0][0].reason or "")


def test_a_caption_longer_than_the_model_is_unscorable(folder: Path, engine: ReferenceEngine) -> None:
    rows = _ask(Judge.on(engine, judge_config(folder)), QUESTIONS, [CAPTION * 200, CAPTION])
    assert {verdict.outcome for verdict in rows[0]} == {Outcome.UNSCORABLE}
    assert "max_model_len" in (rows[0][0].reason or "")
    assert {verdict.outcome for verdict in rows[1]} == {Outcome.SCORED}


def test_questions_that_were_not_drawn_leave_the_mean(folder: Path, engine: ReferenceEngine) -> None:
    row = _ask(Judge.on(engine, judge_config(folder, JudgeMode.sample, draws=1)), QUESTIONS)[0]
    assert sorted(verdict.draws for verdict in row) == [0, 0, 1]
    for verdict in row:
        assert (verdict.outcome is Outcome.SCORED) == (verdict.draws == 1)
        assert verdict.outcome in (Outcome.SCORED, Outcome.NOT_ASKED)


def test_captions_of_a_group_meet_the_same_orders(folder: Path) -> None:
    for mode in (JudgeMode.expected, JudgeMode.sample):
        engine = ReferenceEngine(folder)
        judge = Judge.on(engine, judge_config(folder, mode, permutations=2))
        _ask(judge, QUESTIONS, [CAPTION, "bottomleft blue star ."], rotation=3)
        half = len(engine.requests) // 2
        tails = [request.prompt_token_ids[9:] for request in engine.requests]
        assert half > 0
        assert tails[:half] == tails[half:]
        heads = {request.prompt_token_ids[:9] for request in engine.requests[:half]}
        assert len(heads) == 1  # the caption comes first and is shared


def test_verdicts_are_kept_by_content(folder: Path) -> None:
    engine = ReferenceEngine(folder)
    judge = Judge.on(engine, judge_config(folder))
    first = _ask(judge, QUESTIONS, [CAPTION, CAPTION])
    assert len(engine.requests) == len(QUESTIONS)  # equal captions are asked about once
    assert first[0] == first[1]
    assert _ask(judge, QUESTIONS) == first[:1]
    assert len(engine.requests) == len(QUESTIONS)
    _ask(judge, QUESTIONS, [CAPTION + " "], rotation=1)
    assert len(engine.requests) == 2 * len(QUESTIONS)


def test_the_cache_keeps_the_newest(folder: Path) -> None:
    engine = ReferenceEngine(folder)
    judge = Judge.on(engine, judge_config(folder, cache_size=2))
    _ask(judge, QUESTIONS)
    assert len(judge.cache) == 2
    off = Judge.on(engine, judge_config(folder, cache_size=0))
    assert _ask(off, QUESTIONS) == _ask(off, QUESTIONS)
    assert len(off.cache) == 0


def test_another_checkpoint_is_another_judge(folder: Path, tmp_path: Path) -> None:
    from caprl_async.judge.cache import judge_revision

    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert judge_revision(judge_config(folder)) != judge_revision(judge_config(tmp_path))
    assert judge_revision(judge_config(folder)) != judge_revision(judge_config(folder, JudgeMode.likelihood))
    with pytest.raises(FileNotFoundError, match=r"judge\.model"):
        judge_revision(judge_config(tmp_path / "nowhere"))


class _Faulty:
    """Fails the first request, answers the others with what is no number; or dies."""

    def __init__(self, dies: bool, *, again: bool = False) -> None:
        self.dies = dies
        self.again = again

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]:
        if self.dies:
            raise EngineDied("gone")
        nothing = Completion("", (5,), Finish.STOP, (), chosen_logprobs=dict.fromkeys(range(200), math.nan))
        answers: list[Response | RequestFailed] = [
            Response(request.prompt_token_ids, (nothing,), 0) for request in requests
        ]
        return [RequestFailed("too long", again=self.again), *answers[1:]]

    def stats(self) -> object:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_no_failure_becomes_a_score(folder: Path) -> None:
    row = _ask(Judge.on(_Faulty(dies=False), judge_config(folder)), QUESTIONS)[0]
    assert "refused" in (row[0].reason or "")
    assert "no numbers" in (row[1].reason or "")
    assert all(verdict.score is None for verdict in row)
    assert {verdict.outcome for verdict in row} == {Outcome.UNSCORABLE}
    aborted = _ask(Judge.on(_Faulty(dies=False, again=True), judge_config(folder)), QUESTIONS)[0][0]
    assert (aborted.outcome, aborted.score) == (Outcome.JUDGE_DOWN, None)
    with pytest.raises(EngineDied):
        _ask(Judge.on(_Faulty(dies=True), judge_config(folder)), QUESTIONS)


def test_a_temperature_of_zero_is_refused_where_it_means_nothing(
    folder: Path, engine: ReferenceEngine
) -> None:
    for mode in (JudgeMode.expected, JudgeMode.likelihood):
        with pytest.raises(JudgeConfigError, match=r"judge\.temperature"):
            Judge.on(engine, judge_config(folder, mode, temperature=0.0))


class _Says:
    """Writes the same answer to everything."""

    def __init__(self, folder: Path, text: str) -> None:
        self.ids = tuple(load_tokenizer(folder)(text)["input_ids"])
        self.requests: list[Request] = []

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]:
        self.requests += requests
        said = Completion("", self.ids, Finish.STOP, ())
        return [Response(request.prompt_token_ids, (said,), 0) for request in requests]

    def stats(self) -> object:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("said", "scores", "choice"),
    [
        ("red <|im_end|>", (1.0, 0.0), "red"),
        ("unknown . <|im_end|>", (0.0, 1.0), "unknown"),
        ("red or blue", (0.0, 0.0), "red or blue"),
    ],
)
def test_text_mode_reads_an_answer_in_own_words(
    folder: Path, said: str, scores: tuple[float, float], choice: str
) -> None:
    engine = _Says(folder, said)
    judge = Judge.on(engine, judge_config(folder, JudgeMode.text, text_tokens=7))
    row = _ask(judge, [QUESTIONS[0], QUESTIONS[2]])[0]
    assert tuple(verdict.score for verdict in row) == scores
    assert {verdict.choice for verdict in row} == {choice}
    assert row[0].off_options == float(choice == "red or blue")
    letters = load_tokenizer(folder).convert_tokens_to_ids(["A", "B"])
    assert all(request.max_tokens == 7 for request in engine.requests)
    assert not any(set(letters) & set(request.prompt_token_ids) for request in engine.requests)
