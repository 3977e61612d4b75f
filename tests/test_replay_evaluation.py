"""Evaluations on the hub, beside training."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from replay_kit import StubJudge, StubRollout, connected, make_config, run, running, shuffled, write_data

from caprl_async.choices import JudgeMode
from caprl_async.observe.table import Row
from caprl_async.replay.eval_spec import EvalError, EvalSpec
from caprl_async.types import Version


def test_evaluation_asks_every_judge_about_the_same_captions(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.evaluate.heldout_judge.model = "some/folder"
        alt = write_data(tmp_path / "alt.parquet", 5, stem="name its color")
        config.evaluate.heldout_judge.data = str(alt)
        rollout, judge = StubRollout(), StubJudge()
        rollout.delay = shuffled(3, 0.02)
        heldout = StubJudge("heldout-judge-0", "heldout")
        async with running(config, tmp_path) as (queue, address):
            async with connected(address, rollout, judge, heldout):
                await queue.open_admission()  # training and evaluation side by side
                spec = EvalSpec(name="start", images=4, judges=("judge", "heldout"))
                result = await queue.evaluate(spec)
                assert result["images"] == 4
                assert result["length"] == 2
                assert result["judges"]["heldout"]["n"] == 8
                assert result["judges"]["judge"]["accuracy"] == 1.0
                assert set(result["judges"]["judge"]["kinds"]) == {"fact", "absent"}
                json.dumps(result)
                asked = {lease.captions[0] for lease in heldout.seen}
                assert len(asked) == 4
                assert asked <= {text for lease in judge.seen for text in lease.captions}
                assert {lease.questions[0].stem for lease in heldout.seen} == {"name its color"}
                blind = await queue.evaluate(EvalSpec(name="blind", source="blind"))
                assert blind["length"] is None
                assert sum(lease.captions == ("",) for lease in judge.seen) == 5
                await queue.evaluate(EvalSpec(name="ceiling", source="reference", images=2))
                texts = {lease.captions[0] for lease in judge.seen}
                assert {"reference 0", "reference 1"} <= texts
                with pytest.raises(EvalError, match="plain file name"):
                    await queue.evaluate(EvalSpec(name="../up"))
            audit = await queue.audit()
            assert audit["admitted"] <= 12  # the capacity of training: no held-out image is among them
        lines = [json.loads(line) for line in (tmp_path / "evals" / "start.jsonl").read_text().splitlines()]
        assert len(lines) == 4
        assert lines[0]["questions"]["judge"][1]["answer"] == "unknown"
        assert lines[0]["finish"] == "stop"

    run(whole())


def only_of_the_first(caption: str, facts: str) -> SimpleNamespace:
    """An `evaluate.program` that cannot read most captions."""
    if "/0 " not in caption:
        raise ZeroDivisionError("division by zero")
    return SimpleNamespace(stated=2, correct=1, total=4)


def test_a_program_that_fails_at_one_caption_costs_the_others_nothing(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.evaluate.program = "test_replay_evaluation:only_of_the_first"
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, StubRollout(), StubJudge()),
        ):
            result = await queue.evaluate(EvalSpec(name="start", images=4))
            assert result["program_faults"] == 3
            assert result["program_fault"] == "evaluate.program: ZeroDivisionError: division by zero"
            assert result["facts"] == {"precision": 0.5, "recall": 0.25, "stated_mean": 2.0}
            assert result["judges"]["judge"]["n"] == 8
            errors = [error["error"] for error in (await queue.status())["errors"]]
            assert errors == ["evaluate.program: ZeroDivisionError: division by zero"] * 3

    run(whole())


def test_an_evaluation_of_given_weights_waits_for_them(tmp_path: Path) -> None:
    async def whole() -> None:
        rollout = StubRollout()
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            asked = asyncio.create_task(
                queue.evaluate(EvalSpec(name="foreign", version=Version(-1, 0), images=2))
            )
            await asyncio.sleep(0.7)
            assert not asked.done()
            rollout.version = Version(-1, 0)
            assert (await asked)["images"] == 2

    run(whole())


def test_an_evaluation_that_is_asked_for_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """As after the death of a learner, whose weights the first would wait for without end."""

    async def whole() -> None:
        rollout = StubRollout()
        async with (
            running(make_config(tmp_path), tmp_path) as (queue, address),
            connected(address, rollout, StubJudge()),
        ):
            first = asyncio.create_task(queue.evaluate(EvalSpec(name="now", version=Version(0, 7), images=2)))
            await asyncio.sleep(0.3)
            assert not first.done()
            again = asyncio.create_task(queue.evaluate(EvalSpec(name="now", version=Version(1, 3), images=2)))
            with pytest.raises(EvalError, match="asked for again"):
                await first
            rollout.version = Version(1, 3)
            assert (await again)["images"] == 2
            assert (await queue.status())["evaluations"] == {}

    run(whole())


def test_a_rating_is_no_accuracy(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        config.judge.mode = JudgeMode.rate
        async with (
            running(config, tmp_path) as (queue, address),
            connected(address, StubRollout(), StubJudge()),
        ):
            result = await queue.evaluate(EvalSpec(name="start", images=2))
            assert math.isnan(result["judges"]["judge"]["accuracy"])
            assert 0 <= result["judges"]["judge"]["score"] <= 1
            assert Row.of(result).judge is None

    run(whole())
