"""The whole ring on the tiny world for a few steps, and what its users rely on."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from process_kit import left_running

from caprl_async import conf, processes, types
from caprl_async.config import BandsConfig, Config
from caprl_async.ring.supervisor import Supervisor

STEPS = 6
GROUPS = 8


class Turned:
    """What a finished run of STEPS steps left behind."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics: list[dict[str, float]] = []
        self.results: list[Any] = []  # everything that Ray handed to the driver
        self.fingerprints: list[dict[str, str]] = []
        self.audit: dict[str, Any] = {}
        self.left: list[str] = []  # processes alive after stop
        self.config: Config


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Turned:
    run_dir = tmp_path_factory.mktemp("ring")
    config = conf.load(
        [
            *("conf=conf/demo.yaml", f"run_dir={run_dir}", f"steps={STEPS}", f"replay.batch_groups={GROUPS}"),
            *("evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.dense_policy="),
            # So narrow that the engine is what the others wait for: each update meets captions half-way.
            *("observe.samples_per_step=8", "rollout.engine.max_num_seqs=1"),
            *("replay.max_staleness=4",),
        ]
    )
    run = Turned(run_dir)
    run.config = config
    before = processes.descendants()
    ring = Supervisor(config)
    plain_get = ring.get_all

    def recording_get(refs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        results = plain_get(refs, *args, **kwargs)
        run.results.extend(results)
        return results

    ring.get_all = recording_get  # type: ignore[method-assign]
    try:
        ring.start()
        ring.open_admission()
        for _ in range(STEPS):
            run.metrics.append(ring.step())
        ring.finish()
        run.fingerprints = [
            ring.get(ring.learners[0].weights_fingerprint.remote()),
            ring.get(ring.rollouts[0].weights_fingerprint.remote()),
        ]
        run.audit = ring.audit()
    finally:
        ring.stop()
        from caprl_async.ring import cluster

        cluster.disconnect()
    run.left = left_running(before)
    return run


def test_every_step_trains_on_a_full_batch(turned: Turned) -> None:
    assert len(turned.metrics) == STEPS
    for metrics in turned.metrics:
        assert metrics["groups"] == GROUPS
        assert math.isfinite(metrics["loss"])
        assert metrics["grad_norm"] > 0


def test_engine_weights_equal_the_learners_after_a_sync(turned: Turned) -> None:
    learner, engine = turned.fingerprints
    assert set(learner) == set(engine)
    assert learner == engine


def test_log_probabilities_of_engine_and_learner_agree(turned: Turned) -> None:
    # float32 on both sides; what is left is the order of summation in two attention kernels.
    gaps = [m["logprob_gap_fresh_max"] for m in turned.metrics if not math.isnan(m["logprob_gap_fresh_max"])]
    assert gaps, "no step had tokens of the learner's own version"
    assert max(gaps) < 1e-3


def test_staleness_is_bounded_and_above_zero(turned: Turned) -> None:
    bound = turned.config.replay.max_staleness
    assert all(metrics["staleness_max"] <= bound for metrics in turned.metrics)
    assert sum(metrics["staleness_mean"] for metrics in turned.metrics) > 0


def test_some_captions_were_finished_under_two_versions(turned: Turned) -> None:
    assert any(metrics["mixed_version_share"] > 0 for metrics in turned.metrics)


def test_the_learner_trains_while_captions_are_made(turned: Turned) -> None:
    from caprl_async.observe.overlap import overlap_from_ledger

    assert overlap_from_ledger(turned.run_dir / "ledger.sqlite") >= 0.5


def test_every_band_watches_a_metric_that_a_step_has(turned: Turned) -> None:
    bands = {band.name for band in dataclasses.fields(BandsConfig)}
    assert all(bands <= set(metrics) for metrics in turned.metrics)


def test_ledger_has_every_prompt_once(turned: Turned) -> None:
    assert turned.audit["violations"] == []
    with sqlite3.connect(turned.run_dir / "ledger.sqlite") as ledger:
        trained = ledger.execute("select key from events where event = 'trained'").fetchall()
    assert len(trained) == len(set(trained)) == STEPS * GROUPS


def test_verdicts_are_the_judges_answer_about_that_caption(turned: Turned) -> None:
    """Recomputed in plain transformers from the sample file: caption, question and score belong together."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from caprl_async.judge.prompt import JudgePrompter

    config = turned.config
    tokenizer = AutoTokenizer.from_pretrained(config.judge.model)
    model = AutoModelForCausalLM.from_pretrained(config.judge.model, dtype=torch.float32).eval()
    prompter = JudgePrompter(tokenizer, config.judge.prompt)
    lines = (turned.run_dir / "samples.jsonl").read_text().splitlines()
    checked = 0
    for line in lines[:4]:
        sample = json.loads(line)
        for position, caption in enumerate(sample["captions"][:3]):
            head = prompter.head(caption["text"])
            for question in sample["questions"]:
                options = [*question["choices"], config.judge.prompt.abstain]
                gold = len(options) - 1 if question["answer"] is None else question["answer"]
                ids = [prompter.option_ids(option) for option in options]
                if any(len(tokens) != 1 for tokens in ids):
                    continue
                with torch.no_grad():
                    logits = model(torch.tensor([head + prompter.tail(question["stem"], None)])).logits
                scores = logits[0, -1].log_softmax(-1)[[tokens[0] for tokens in ids]]
                expected = (scores / config.judge.temperature).softmax(-1)[gold].item()
                assert question["scores"][position] == pytest.approx(expected, abs=2e-3)
                checked += 1
    assert checked > 20


def test_no_caption_verdict_or_batch_crosses_a_ray_call(turned: Turned) -> None:
    data_plane = (types.Prompt, types.CaptionGroup, types.Caption, types.Verdict, types.TrainBatch)

    def walk(value: Any) -> Iterator[Any]:
        yield value
        if isinstance(value, dict):
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list | tuple | set):
            for inner in value:
                yield from walk(inner)
        elif isinstance(value, msgspec.Struct):
            yield from walk(msgspec.structs.astuple(value))

    assert turned.results
    assert not any(isinstance(value, data_plane) for value in walk(turned.results))
    # Actors hold no handles of one another: only the supervisor makes Ray calls.
    package = Path(conf.__file__).parent
    for room in ("data", "engine", "rollout", "judge", "reward", "replay", "learner"):
        for module in (package / room).rglob("*.py"):
            assert ".remote(" not in module.read_text(), f"{module} makes a Ray call"


def test_a_stop_leaves_nothing_running(turned: Turned) -> None:
    assert turned.left == []
