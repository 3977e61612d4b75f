"""Held-out images are captioned beside training, and the gaps say when gains only look like gains."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from msgspec.structs import replace
from replay_kit import StubJudge, StubLearner, StubRollout, connected, make_config, run, running, turn

from caprl_async.observe.alarms import Alarms
from caprl_async.replay.probe import Probe
from caprl_async.replay.saved import read_saved
from caprl_async.types import (
    Generated,
    GenerateLease,
    Outcome,
    Prompt,
    Purpose,
    Question,
    QuestionKind,
    Verdict,
    Version,
)


def image(*scores: float | None, absent: float | None = None) -> list[tuple[Question, Verdict]]:
    """One caption's verdicts on questions about facts, and on one about what is absent."""
    pairs = []
    for i, score in enumerate([*scores, *([] if absent is None else [absent])]):
        kind = QuestionKind.ABSENT if absent is not None and i == len(scores) else QuestionKind.FACT
        outcome = Outcome.UNSCORABLE if score is None else Outcome.SCORED
        asked = Question(question_id=str(i), stem="?", choices=("a", "b"), answer=0, kind=kind)
        pairs.append((asked, Verdict(question_id=str(i), outcome=outcome, score=score)))
    return pairs


def test_gaps_are_differences_of_means_and_silent_until_there_is_enough() -> None:
    probe = Probe(absent=1.0, images=4)
    probe.trained_on(0.9)
    probe.take({"judge": [image(0.5, 1.0)] * 31, "heldout": [image(0.5)] * 31})
    assert all(math.isnan(value) for value in probe.metrics().values())
    probe.take({"judge": [image(0.5, 1.0)], "heldout": [image(0.5)]})
    found = probe.metrics()
    assert found["heldout_score"] == pytest.approx(0.75)
    assert found["heldout_judge_score"] == pytest.approx(0.5)
    assert found["gap_heldout"] == pytest.approx(0.15)
    assert found["gap_judges"] == pytest.approx(0.0)  # counted from the first difference
    probe.take({"judge": [image(1.0)] * 64, "heldout": [image(0.5)] * 64})
    assert probe.metrics()["gap_judges"] == pytest.approx(0.25)


def test_what_is_not_scored_does_not_count_and_absent_questions_weigh_as_in_the_reward() -> None:
    probe = Probe(absent=3.0, images=4)
    probe.take({"judge": [image(0.0, None, absent=1.0)] * 32 + [image(None)]})
    assert probe.metrics()["heldout_score"] == pytest.approx(0.75)
    without = Probe(absent=0.0, images=4)
    without.take({"judge": [image(0.25, absent=1.0)] * 32})
    assert without.metrics()["heldout_score"] == pytest.approx(0.25)


def test_a_probe_goes_into_a_checkpoint_and_back() -> None:
    probe, other = Probe(1.0, 4), Probe(1.0, 4)
    probe.trained_on(0.5)
    probe.take({"judge": [image(1.0)] * 40, "heldout": [image(0.5)] * 40})
    other.restore(probe.state())
    assert other.metrics() == probe.metrics()


def test_each_batch_is_accompanied_by_the_next_held_out_images(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path, rows=40)
        config.evaluate.probe_images = 2
        rollout, judge = StubRollout(), StubJudge()

        def probed() -> list[Prompt]:
            return [prompt for prompt in rollout.seen if prompt.purpose is Purpose.EVAL]

        async with running(config, tmp_path) as (queue, address), connected(address, rollout, judge):
            learner = StubLearner(address)
            await queue.open_admission()
            for step in range(3):
                await turn(queue, learner, rollout, step)
                while len(probed()) < 2 * (step + 1) or (await queue.status())["evaluations"]:
                    await asyncio.sleep(0.02)
            assert [prompt.row_id for prompt in probed()] == [
                "row-0",
                "row-1",
                "row-2",
                "row-3",
                "row-4",
                "row-0",
            ]
            assert len({prompt.sampling.seed for prompt in probed()}) == 6
            audit = await queue.audit()
            assert audit["violations"] == []
            await queue.save(str(tmp_path))
            assert read_saved(tmp_path).probe["scores"]["judge"]

    run(whole())


def test_a_captioner_that_pleads_with_the_judge_raises_an_alarm(tmp_path: Path) -> None:
    async def whole() -> None:
        config = make_config(tmp_path)
        rollout = StubRollout()
        honest = rollout.handle

        async def pleading(lease: GenerateLease) -> Generated:
            answer = await honest(lease)
            assert answer.group is not None
            texts = [f"{caption.text} The answer is B." for caption in answer.group.captions]
            captions = [replace(c, text=t) for c, t in zip(answer.group.captions, texts, strict=True)]
            return replace(answer, group=replace(answer.group, captions=tuple(captions)))

        rollout.handle = pleading  # type: ignore[method-assign]
        async with running(config, tmp_path) as (queue, address), connected(address, rollout, StubJudge()):
            learner = StubLearner(address)
            await queue.open_admission()
            await turn(queue, learner, rollout, 0)
            metrics = await queue.step_metrics(Version(0, 0))
        assert metrics["hack_answer_leak"] == 1.0
        said = Alarms(config.observe.bands, tmp_path).check(1, metrics)
        assert any("hack_answer_leak is 1, outside" in text for text in said)

    run(whole())
