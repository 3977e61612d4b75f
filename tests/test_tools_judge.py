"""The judge's benchmarks: what they draw, in which order, how they count tokens, and their statistics."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_kit import CAPTION, ReferenceEngine, judge_config, question, save_random_judge

from caprl_async.config import JudgeMode
from caprl_async.engine.types import Request, Response
from caprl_async.judge.judge import Judge
from caprl_async.judge.prompt import JudgePrompter
from caprl_async.tiny.tokenizer import tokenizer

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.append(str(TOOLS))

from judge_exact import Exact  # noqa: E402
from judge_tokens import block_shared, decompose, distinct_prefixes  # noqa: E402
from judge_variance import (  # noqa: E402
    all_orders,
    group_correlation,
    reward,
    statistics_of,
    truths,
    z_value,
)
from judge_work import GROUP, Group, draw, interleave, real_work, stated  # noqa: E402

QUESTIONS = (question(["red", "blue", "green"], 1, "a"), question(["circle", "star"], None, "b"))
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=8)


def test_each_caption_draws_its_own_questions_with_replacement() -> None:
    group = Group(("one", "two"), QUESTIONS)
    drawn = draw(group, 40, random.Random(0))
    assert [len(mine) for mine in drawn] == [40, 40]
    assert [d.caption for d in drawn[1]] == ["two"] * 40
    places = [[(d.question.question_id, d.order) for d in mine] for mine in drawn]
    assert places[0] != places[1]
    assert len(set(places[0])) == 3 * 2 * 1 + 2  # every order of each question
    assert all(d.order[-1] == len(d.question.choices) == max(d.order) for mine in drawn for d in mine)
    assert drawn == draw(group, 40, random.Random(0))


@given(sizes=st.lists(st.integers(0, 6), max_size=8), at_once=st.integers(1, 4), seed=st.integers(0, 99))
def test_open_captions_are_interleaved_and_each_keeps_its_order(
    sizes: list[int], at_once: int, seed: int
) -> None:
    queues = [[(name, i) for i in range(size)] for name, size in enumerate(sizes)]
    order = interleave(queues, at_once, random.Random(seed))
    assert sorted(order) == [item for queue in queues for item in queue]
    assert all([item for item in order if item[0] == name] == queue for name, queue in enumerate(queues))
    for place in range(len(order)):
        begun = {name for name, _ in order[: place + 1]}
        still = {name for name, _ in order[place:]}
        assert len(begun & still) <= at_once


def test_interleaving_really_mixes() -> None:
    order = interleave([[name] * 8 for name in "abcd"], 4, random.Random(0))
    assert sum(one != other for one, other in itertools.pairwise(order)) > 15


@given(PROMPTS)
def test_the_bound_counts_every_prefix_once(prompts: list[tuple[int, ...]]) -> None:
    assert distinct_prefixes(prompts) == len({p[:i] for p in prompts for i in range(1, len(p) + 1)})


@given(prompts=PROMPTS, block=st.integers(1, 4))
def test_whole_blocks_are_computed_once_and_ends_each_time(
    prompts: list[tuple[int, ...]], block: int
) -> None:
    known: set[tuple[int, ...]] = set()
    ideal = real = 0
    for prompt in prompts:
        hits = [end for end in range(block, len(prompt) + 1, block) if prompt[:end] in known]
        known |= {prompt[:end] for end in range(block, len(prompt) + 1, block)}
        ideal += len(prompt) - max(hits, default=0)
        real += len(prompt) - max([end for end in hits if end < len(prompt)], default=0)
    assert block_shared(prompts, block) == (ideal, real)
    assert real >= ideal >= distinct_prefixes(prompts)


def test_the_reasons_add_up() -> None:
    heads = [(1, 2, 3, 4, *caption) for caption in ((5, 5, 5), (6, 6, 6))]
    prompts = [(*head, *tail) for head in heads for tail in ((7, 8), (9, 9))]
    parts = decompose(heads, prompts, block=4, measured=30)
    assert parts == {
        "opening": 4,
        "captions": 6,
        "tails": 8,
        "bound": 18,
        "part_blocks": 2 * 3 + 2 * 0,  # the first block of 4 is shared by all, 3 of each caption's by none
        "last_blocks": 0,
        "missed": 6,
        "measured": 30,
    }
    whole = decompose([(1, 2)], [(1, 2, 3, 4)] * 2, block=4, measured=8)
    assert whole["last_blocks"] == 4
    assert whole["missed"] == 0


def test_the_real_shape_has_the_papers_lengths() -> None:
    prompt, groups = real_work(images=2, questions=4, seed=0)
    prompter = JudgePrompter(tokenizer(), prompt)
    words = [len(tokenizer()(c)["input_ids"]) for g in groups for c in g.captions]
    assert words == [400] * 2 * GROUP
    assert 250 <= len(prompter.head("")) <= 350
    options = (*groups[0].questions[0].choices, prompt.abstain)
    assert 35 <= len(prompter.tail(groups[0].questions[0].stem, options)) <= 75
    assert len({c for g in groups for c in g.captions}) == 2 * GROUP
    assert real_work(images=2, questions=4, seed=0) == (prompt, groups)


def test_a_program_says_what_a_caption_answers() -> None:
    asked = (
        question(["red", "blue"], 0, "a", "what color is topleft ?"),
        question(["topleft", "topright"], 0, "b", "where is red ?"),
        question(["circle", "star"], 1, "c", "what shape is red ?"),
        question(["circle", "star"], None, "d", "what shape is topright ?"),
    )
    assert stated("topleft red star .", asked) == 1.0
    assert stated("topleft red .", asked) == 0.75
    assert stated("", asked) == 0.25  # it rightly says nothing of the top right


def test_orders_are_all_and_keep_the_abstain_option_last() -> None:
    assert len(set(all_orders(3))) == 6
    assert {order[-1] for order in all_orders(3)} == {3}


def test_noise_that_a_group_shares_is_none_within_it() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(40)
    own = rng.normal(0, 0.1, (500, 40))
    shared = np.repeat(rng.normal(0, 0.1, (500, 10)), 4, axis=1)
    found = statistics_of(truth + own, truth, truth, size=4)
    assert found["noise"] == pytest.approx(0.01, rel=0.05)
    assert found["noise_in_group"] == pytest.approx(0.01, rel=0.05)
    signal = truth.reshape(10, 4).var(axis=1, ddof=1).mean()
    assert found["signal_to_noise"] == pytest.approx(signal / 0.01, rel=0.1)
    share = signal / (signal + 0.01)
    assert found["corr_truth"] == pytest.approx(math.sqrt(share), rel=0.02)
    found = statistics_of(truth + shared, truth, truth, size=4)
    assert found["noise"] == pytest.approx(0.01, rel=0.15)
    assert math.isinf(found["signal_to_noise"])
    assert found["corr_truth"] == pytest.approx(1.0)


def test_a_flat_reward_has_no_noise_and_no_correlation() -> None:
    rounding = np.random.default_rng(0).normal(0.5, 1e-16, (20, 4))
    assert statistics_of(rounding, np.arange(4.0), np.arange(4.0), 2)["noise"] == 0.0
    assert math.isnan(group_correlation(np.full((2, 4), 0.5), np.arange(4.0), 2))


def test_errors_of_a_share() -> None:
    assert z_value(0.6, 0.5, 100) == pytest.approx(2.0)
    assert z_value(0.0, 0.0, 100) == 0.0


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_judge(tmp_path_factory.mktemp("judge") / "judge")


def test_the_stand_in_answers_as_the_model(judge_folder: Path) -> None:
    exact, reference = Exact(str(judge_folder)), ReferenceEngine(judge_folder)
    ids = tuple(range(20, 40))
    (answer,) = asyncio.run(exact.generate_many([Request(ids, temperature=0.7, logprob_token_ids=(30, 31))]))
    assert isinstance(answer, Response)
    right = reference.logprobs(ids, 0.7)
    chosen = answer.completions[0].chosen_logprobs
    assert chosen == pytest.approx({30: right[30], 31: right[31]}, abs=1e-4)
    requests = [Request(ids, temperature=0.7, max_tokens=4, seed=seed) for seed in range(4000)]
    answers = asyncio.run(exact.generate_many(requests))
    drawn = [a.completions[0].token_ids[0] for a in answers if isinstance(a, Response)]
    best = int(right.argmax())
    share = math.exp(right[best])
    assert drawn.count(best) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_the_truth_is_the_limit_of_expected_and_of_sample(judge_folder: Path) -> None:
    exact = Exact(str(judge_folder))
    group = Group((CAPTION, "bottomleft blue star ."), QUESTIONS)
    config = judge_config(judge_folder, temperature=1.0)
    truth, certain = asyncio.run(truths(exact, config, [group]))
    assert 0 <= certain <= 1
    judge = Judge.on(exact, judge_config(judge_folder, permutations=3, temperature=1.0), tokenizer())
    means = [asyncio.run(judge.judge(group.captions, group.questions, rotation)) for rotation in range(100)]
    for caption, right in enumerate(truth):
        assert np.mean([reward(verdicts[caption]) for verdicts in means]) == pytest.approx(right, rel=0.1)
    config = judge_config(judge_folder, JudgeMode.sample, draws=4000, temperature=1.0)
    sampled = asyncio.run(Judge.on(exact, config, tokenizer()).judge(group.captions, group.questions))
    for verdicts, right in zip(sampled, truth, strict=True):
        assert abs(z_value(reward(verdicts), right, 4000)) < 4


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    command = [sys.executable, str(TOOLS / "bench_judge.py"), "--captions", "8", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio"] > 0
    for parts in found["prefilled_by_reason"].values():
        reasons = [parts[key] for key in parts if key not in ("opening", "captions", "tails", "measured")]
        assert sum(reasons) == pytest.approx(parts["measured"])
        assert parts["missed"] == 0  # requests of one step share blocks, and the cache holds all
    ours, released = found["ways"]["ours"], found["ways"]["released"]
    assert ours["generated"] == 1
    assert ours["questions_per_s"] == ours["draws_per_s"]
    assert released["questions_per_s"] < released["draws_per_s"]
