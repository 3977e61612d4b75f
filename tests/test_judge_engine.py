"""The judge on the real engine gives the scores of plain transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from judge_kit import CAPTION, ReferenceEngine, judge_config, question, save_random_judge

from caprl_async.config import EngineConfig, JudgeConfig, JudgeMode
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import Request, Response
from caprl_async.judge.judge import Judge
from caprl_async.tiny.judge_prompt import judge_prompt_config
from caprl_async.tiny.models import MODELS
from caprl_async.types import Outcome

CAPTIONS = [CAPTION, "bottomleft blue star . " * 8]
QUESTIONS = [
    question(["red", "blue", "green"], 1, "color"),
    question(["red circle", "red star", "blue"], 0, "both", "what is topleft ?"),
    question(["black", "white"], None, "absent", "what color is topright ?"),
]
ENGINE = EngineConfig(
    max_model_len=512,
    max_num_seqs=32,
    max_num_batched_tokens=1024,
    block_size=32,
    kv_cache_gib=0.1,
    dtype="float32",
    enforce_eager=True,
    in_process=True,
    threads=1,
)


@pytest.mark.slow
def test_real_engine_and_transformers_agree(tmp_path: Path) -> None:
    """float32 both; the tolerance covers another order of summation."""
    folder = save_random_judge(tmp_path / "judge")
    engine = Engine(str(folder), ENGINE, seed=0)
    try:
        for mode in (JudgeMode.expected, JudgeMode.likelihood):
            config = judge_config(folder, mode, permutations=2)
            mine = asyncio.run(Judge.on(engine, config).judge(CAPTIONS, QUESTIONS, 5))
            reference = asyncio.run(Judge.on(ReferenceEngine(folder), config).judge(CAPTIONS, QUESTIONS, 5))
            for got, right in zip(sum(mine, ()), sum(reference, ()), strict=True):
                assert got.outcome is Outcome.SCORED
                assert got.choice == right.choice
                for name in ("score", "abstained", "off_options"):
                    assert getattr(got, name) == pytest.approx(getattr(right, name), abs=2e-4)
        config = judge_config(folder, JudgeMode.sample, draws=40)
        sampled = [asyncio.run(Judge.on(engine, config).judge(CAPTIONS, QUESTIONS)) for _ in range(2)]
        assert sampled[0] == sampled[1]  # seeded
        assert engine.stats().cached_tokens > 0  # questions of a long caption share its prefill
    finally:
        engine.close()


@pytest.mark.slow
def test_more_seeded_prompts_than_a_step_holds_are_answered_alike_each_time(tmp_path: Path) -> None:
    """Were one prefilled in parts, its generator would have to be rewound, which the CPU's cannot."""
    engine = Engine(str(save_random_judge(tmp_path / "judge")), ENGINE, seed=0)
    requests = [
        Request(tuple(10 + (7 * i + j) % 100 for j in range(300)), temperature=1.0, max_tokens=4, seed=i)
        for i in range(12)
    ]
    assert sum(len(request.prompt_token_ids) for request in requests) > ENGINE.max_num_batched_tokens
    try:
        first, again = (asyncio.run(engine.generate_many(requests)) for _ in range(2))
        tokens = [[c.token_ids for c in r.completions] for r in first if isinstance(r, Response)]
        assert len(tokens) == len(requests)
        assert tokens == [[c.token_ids for c in r.completions] for r in again if isinstance(r, Response)]
    finally:
        engine.close()


@pytest.mark.slow
def test_the_judge_alone_reads_captions_and_abstains_where_they_are_silent() -> None:
    """As docs/judge.md shows it, with the tiny judge that reads letters."""
    questions = [
        question(["red", "blue", "green", "black"], 0, "color"),
        question(["circle", "star", "square", "cross"], 0, "shape", "what shape is topleft ?"),
        question(["black", "white", "red", "blue"], None, "absent", "what color is topright ?"),
    ]
    config = JudgeConfig(model=str(MODELS / "judge_letters"), prompt=judge_prompt_config(), engine=ENGINE)
    with Judge.load(config) as judge:
        full, silent = judge.ask([CAPTION, "bottomleft blue star ."], questions)
        assert judge.ask([CAPTION], questions) == (full,)
    assert [verdict.choice for verdict in full] == ["red", "circle", "unknown"]
    assert all((verdict.score or 0) > 0.5 for verdict in full), full
    assert [verdict.choice for verdict in silent] == ["unknown"] * 3
    assert [(verdict.score or 0) > 0.5 for verdict in silent] == [False, False, True]
