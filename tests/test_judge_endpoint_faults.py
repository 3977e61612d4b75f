"""No failure of a judge's server becomes a score, and a server that recovers is asked again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from endpoint_kit import (
    QUESTIONS,
    FakeServer,
    ask,
    by_text,
    config_for,
    cut_off,
    drip,
    gives,
    hang,
    says,
    serving,
)

from caprl_async.config import JudgeMode
from caprl_async.judge.judge import Judge
from caprl_async.judge.verdicts import JudgeConfigError
from caprl_async.types import Outcome

ANSWER = {"message": {"content": "A"}}
NO_NUMBERS = b'{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": %s}]}}]}'
LACKS = "lacks log-probabilities"
FAULTS: dict[str, tuple[Any, Outcome, str]] = {
    "server error": (says(500, "out of\nmemory"), Outcome.JUDGE_DOWN, "status 500: out of memory"),
    "overload": (says(429), Outcome.JUDGE_DOWN, "status 429"),
    "key revoked": (says(401), Outcome.JUDGE_DOWN, "status 401"),
    "model gone": (says(404), Outcome.JUDGE_DOWN, "status 404"),
    "too long": (says(400, "context length"), Outcome.UNSCORABLE, "refused the prompt: status 400: context"),
    "too large": (says(413), Outcome.UNSCORABLE, "413"),
    "not valid": (says(422, "x" * 1000), Outcome.UNSCORABLE, "xxx"),
    "hangs": (hang, Outcome.JUDGE_DOWN, "timed out|within"),
    "drips": (drip, Outcome.JUDGE_DOWN, "timed out|within"),
    "cut off": (cut_off, Outcome.JUDGE_DOWN, "Connection error"),
    "truncated": (gives(b'{"choices": [{"mess'), Outcome.JUDGE_DOWN, "cannot be read"),
    "empty": (gives(b""), Outcome.JUDGE_DOWN, "cannot be read"),
    "a page": (gives(b"<html>Gateway</html>"), Outcome.JUDGE_DOWN, "cannot be read"),
    "a list": (gives(b"[]"), Outcome.JUDGE_DOWN, "cannot be read"),
    "no text": (gives(b"\xff\xfe"), Outcome.JUDGE_DOWN, "cannot be read"),
    "no choices": (gives({"choices": []}), Outcome.JUDGE_DOWN, "no choices"),
    "no logprobs": (gives({"choices": [ANSWER]}), Outcome.JUDGE_DOWN, LACKS),
    "null logprobs": (gives({"choices": [{**ANSWER, "logprobs": None}]}), Outcome.JUDGE_DOWN, LACKS),
    "empty logprobs": (
        gives({"choices": [{**ANSWER, "logprobs": {"content": []}}]}),
        Outcome.JUDGE_DOWN,
        LACKS,
    ),
    "no tokens": (gives(NO_NUMBERS % b"[]"), Outcome.JUDGE_DOWN, LACKS),
    "nan": (gives(NO_NUMBERS % b'[{"token": "A", "logprob": NaN}]'), Outcome.JUDGE_DOWN, "cannot be read"),
    "null": (gives(NO_NUMBERS % b'[{"token": "A", "logprob": null}]'), Outcome.JUDGE_DOWN, "cannot be read"),
    "logits": (gives(NO_NUMBERS % b'[{"token": "A", "logprob": 7.5}]'), Outcome.JUDGE_DOWN, LACKS),
    "above 1": (
        gives(NO_NUMBERS % b'[{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -0.1}]'),
        Outcome.JUDGE_DOWN,
        LACKS,
    ),
    "filtered": (
        gives({"choices": [{**ANSWER, "finish_reason": "content_filter"}]}),
        Outcome.UNSCORABLE,
        "filter",
    ),
}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(by_text) as fake:
        yield fake


@pytest.mark.parametrize("name", list(FAULTS))
def test_no_failure_becomes_a_score(server: FakeServer, name: str) -> None:
    fault, outcome, reason = FAULTS[name]
    # On a busy machine half a second may run out before any other fault is seen.
    timeout_s = 0.5 if outcome is Outcome.JUDGE_DOWN and "within" in reason else 30
    judge = Judge.load(config_for(server, endpoint={"timeout_s": timeout_s}))
    server.always = fault
    for verdict in ask(judge)[0]:
        assert (verdict.outcome, verdict.score) == (outcome, None)
        assert re.search(reason, verdict.reason or "")
        assert len(verdict.reason or "") < 400
    server.always = None
    assert {verdict.outcome for verdict in ask(judge)[0]} == {Outcome.SCORED}  # and none was kept


def test_one_failure_does_not_touch_the_others_and_a_draw_too_few_is_no_score(server: FakeServer) -> None:
    judge = Judge.load(config_for(server, endpoint={"max_in_flight": 1}))
    server.faults = [says(503)]
    outcomes = [verdict.outcome for verdict in ask(judge)[0]]
    assert outcomes == [Outcome.JUDGE_DOWN, Outcome.SCORED, Outcome.SCORED]
    sampling = Judge.load(config_for(server, JudgeMode.sample, draws=5))
    for fault, outcome in ((says(503), Outcome.JUDGE_DOWN), (says(400), Outcome.UNSCORABLE)):
        server.faults = [fault]
        verdict = ask(sampling, QUESTIONS[:1])[0][0]
        assert (verdict.outcome, verdict.score) == (outcome, None)
    server.faults = [gives({"choices": [{"message": {"content": None}}]})]
    assert ask(sampling, QUESTIONS[:1])[0][0].outcome is Outcome.JUDGE_DOWN
    server.always = gives({"choices": [{"message": {"content": "According to the caption"}}]})
    verdict = ask(sampling, QUESTIONS[:1])[0][0]
    assert (verdict.score, verdict.off_options, verdict.choice) == (0.0, 1.0, None)


def test_a_server_that_recovers_is_asked_again(server: FakeServer) -> None:
    judge = Judge.load(config_for(server, endpoint={"retries": 2}))
    del server.bodies[:], server.times[:]
    server.faults = [says(500), cut_off]
    assert ask(judge, QUESTIONS[:1])[0][0].outcome is Outcome.SCORED
    assert len(server.bodies) == 3
    server.faults = [says(429, Retry_After="1")]
    assert ask(judge, QUESTIONS[1:2])[0][0].outcome is Outcome.SCORED
    assert server.times[-1] - server.times[-2] >= 0.9  # the client's own first pause is 0.5 s


NO_ANSWER: dict[str, Any] = {
    "blank": {"choices": [{"message": {"content": " \n"}, "finish_reason": "stop"}]},
    "empty": {"choices": [{"message": {"content": ""}, "finish_reason": "length"}]},
    "null": {"choices": [{"message": {"content": None}}]},
    "ended by an error": {"choices": [{**ANSWER, "finish_reason": "error"}]},
}


@pytest.mark.parametrize("mode", [JudgeMode.sample, JudgeMode.text])
@pytest.mark.parametrize("name", list(NO_ANSWER))
def test_no_answer_is_no_wrong_answer(server: FakeServer, name: str, mode: JudgeMode) -> None:
    """Where answers are read as text, nothing written is a failure, not an option that was missed."""
    judge = Judge.load(config_for(server, mode))
    server.always = gives(NO_ANSWER[name])
    verdicts = [v for v in ask(judge, QUESTIONS[:1])[0] if v.outcome is not Outcome.NOT_ASKED]
    assert [(v.outcome, v.score) for v in verdicts] == [(Outcome.JUDGE_DOWN, None)]
    assert len(judge.cache) == 0


def test_one_refusal_of_all_captions_is_not_about_the_captions(server: FakeServer) -> None:
    judge = Judge.load(config_for(server))
    server.always = says(400, "Billing hard limit has been reached")
    rows = ask(judge, QUESTIONS[:2], captions=["one", "two"])
    assert {v.outcome for row in rows for v in row} == {Outcome.JUDGE_DOWN}
    assert {v.outcome for v in ask(judge, QUESTIONS[:2], captions=["one"])[0]} == {Outcome.UNSCORABLE}


def test_a_garbled_trial_answer_changes_no_way_of_scoring(server: FakeServer) -> None:
    server.faults = [gives(b"<html>Gateway</html>")]
    with pytest.raises(JudgeConfigError, match="cannot be read"):
        Judge.load(config_for(server, endpoint={"model": "tiny"}))


def test_a_model_that_thinks_first_is_noticed_at_the_start(server: FakeServer) -> None:
    server.tokens = lambda prompt: {"<think>": 0.999, "A": 0.001}
    assert "thinks first" in Judge.load(config_for(server)).note
