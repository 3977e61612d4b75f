"""How much noise does a judge token leave in the reward? `python tools/judge_variance.py --model JUDGE`.

The tiny policies caption held-out images, 8 captions each, and each way of judging scores them again and
again with other orders of the options, draws and seeds (`--rotations`). `sample` gets the draws that cost as
many tokens (prefilled, whole blocks of the prefix cache shared, and generated) as `expected` with 1, 2 and 4
orders, and the 8 of the released recipe.

- *truth* of a caption: the exact mean of `expected` over every order of the options, which is the mean of
  `sample` over infinitely many draws. Checked: a vLLM engine really samples some captions many times.
- *noise*: variance of a caption's reward over the rotations; *in the group*: of its difference to the group's
  mean, which is what GRPO sees (our `sample` gives all captions of a group the same draws; as released each
  has its own, and there the noise in the group is that of a caption alone).
- *signal/noise*: variance of the captions' means within a group, over the noise in the group.
- *corr. truth, corr. stated*: correlation within groups with the truth, and with the share of the questions
  that a program answers rightly from the caption's text alone.

Answers come from the judge's exact distribution of the first answer token, computed once per prompt with
transformers: in the tiny world a word is a token, so it decides what is read.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_judge import DRAWS, engine_config, number
from judge_exact import Exact
from judge_tokens import Ids, Tally, block_shared
from judge_work import GROUP, Group, caption_groups, stated
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from caprl_async.config import JudgeConfig, JudgeMode
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import Response
from caprl_async.judge.judge import Judge
from caprl_async.judge.modes import make_mode
from caprl_async.judge.verdicts import Asking
from caprl_async.tiny.judge_prompt import judge_prompt_config, prompter
from caprl_async.tiny.models import MODELS
from caprl_async.tiny.tokenizer import tokenizer
from caprl_async.types import Verdict

ORDERS = (1, 2, 4)
BLOCK, CHECKED = 32, 4  # tokens of a block; captions that are really sampled
ROUNDING = 1e-18
FIGURES = {
    "tokens": "tokens per caption",
    "noise": "noise",
    "noise_in_group": "noise in the group",
    "signal_to_noise": "signal/noise",
    "corr_truth": "corr. truth",
    "corr_stated": "corr. stated",
}


def all_orders(choices: int) -> tuple[Ids, ...]:
    """Every order of the choices, the abstain option last."""
    return tuple((*order, choices) for order in itertools.permutations(range(choices)))


def reward(verdicts: Iterable[Verdict]) -> float:
    """Mean score, each draw counting once."""
    scored = [(v.score, v.draws) for v in verdicts if v.score is not None]
    return sum(score * draws for score, draws in scored) / sum(draws for _, draws in scored)


# ---------------------------------------------------------------- ways to judge, and what they cost


async def rewards_of(
    exact: Exact, config: JudgeConfig, groups: Sequence[Group], rotations: int, written: float = 1.0
) -> tuple[np.ndarray, float]:
    """Rewards [rotation, caption], and tokens per caption where an answer has `written` tokens."""
    tally = Tally(exact)
    judge = Judge.on(tally, config, tokenizer())
    rewards, tokens = [], 0.0
    for rotation in range(rotations):
        row = []
        for group in groups:
            tally.prompts.clear()
            row += [reward(v) for v in await judge.judge(group.captions, group.questions, rotation)]
            tokens += block_shared(tally.prompts, BLOCK)[1] + written * len(tally.prompts)
        rewards.append(row)
    return np.array(rewards), tokens / (rotations * sum(len(group.captions) for group in groups))


async def truths(exact: Exact, config: JudgeConfig, groups: Sequence[Group]) -> tuple[np.ndarray, float]:
    """The exact mean reward of each caption, and the share of answers of which the judge is 99 % certain."""
    mode, abstain = make_mode(prompter(), config), config.prompt.abstain
    asked = []
    for group in groups:
        every = [Asking(q, (*q.choices, abstain), all_orders(len(q.choices))) for q in group.questions]
        asked += [
            [(asking, mode.requests(asking, caption)) for asking in every] for caption in group.captions
        ]
    flat = [request for mine in asked for _, requests in mine for request in requests]
    answers = iter(await exact.generate_many(flat))  # all at once: large batches
    rewards, best = [], []
    for mine in asked:
        verdicts = []
        for asking, requests in mine:
            responses = [r for r in itertools.islice(answers, len(requests)) if isinstance(r, Response)]
            best += [max(r.completions[0].chosen_logprobs.values()) for r in responses]
            verdicts.append(mode.verdict(asking, responses))
        rewards.append(reward(verdicts))
    return np.array(rewards), float(np.mean(np.array(best) > math.log(0.99)))


async def really_sampled(
    engine: Engine, base: JudgeConfig, group: Group, truth: Sequence[float], draws: int
) -> dict[str, Any]:
    """Means of many answers that a vLLM engine wrote, beside the truth; and how long answers are."""
    found, lengths = [], []
    for config in (replace(base, mode=JudgeMode.sample, draws=draws), replace(base, mode=JudgeMode.text)):
        tally = Tally(engine)
        judge = Judge.on(tally, config, tokenizer())
        verdicts = await judge.judge(group.captions[: len(truth)], group.questions)
        found.append([reward(v) for v in verdicts])
        lengths.append(tally.generated / len(tally.prompts))
    z = [z_value(mean, right, draws) for mean, right in zip(found[0], truth, strict=True)]
    return {"draws": draws, "sampled": found[0], "truth": truth, "z": z, "answer_tokens": lengths}


# ---------------------------------------------------------------- statistics


def z_value(mean: float, truth: float, draws: int) -> float:
    """Standard errors between a mean of so many hits or misses and its truth."""
    error = math.sqrt(max(truth * (1 - truth), 1e-12) / draws)
    return (mean - truth) / error


def statistics_of(rewards: np.ndarray, truth: np.ndarray, stated: np.ndarray, size: int) -> dict[str, float]:
    """Of rewards [rotation, caption], groups of `size` captions side by side; see the head of this file.

    Without orders, draws and seeds a reward varies by rounding only: that is no noise.
    """
    rotations = len(rewards)
    means = rewards.mean(axis=0)
    errors = (rewards - means).reshape(rotations, -1, size)
    apart = errors - errors.mean(axis=2, keepdims=True)
    noise_in_group = float((apart**2).sum() / ((rotations - 1) * errors.shape[1] * (size - 1)))
    noise = float(rewards.var(axis=0, ddof=1).mean())
    if noise < ROUNDING:
        noise = noise_in_group = 0.0
    between = float(means.reshape(-1, size).var(axis=1, ddof=1).mean())
    signal = max(0.0, between - noise_in_group / rotations)
    return {
        "noise": noise,
        "noise_in_group": noise_in_group,
        "signal": signal,
        "signal_to_noise": signal / noise_in_group if noise_in_group > ROUNDING else math.inf,
        "corr_truth": group_correlation(rewards, truth, size),
        "corr_stated": group_correlation(rewards, stated, size),
    }


def group_correlation(rewards: np.ndarray, other: np.ndarray, size: int) -> float:
    """Correlation with each group's mean taken off, pooled over groups and rotations; NaN if one is flat."""
    one = rewards.reshape(len(rewards), -1, size)
    one = one - one.mean(axis=2, keepdims=True)
    two = other.reshape(-1, size)
    two = two - two.mean(axis=1, keepdims=True)
    scale = math.sqrt(float((one**2).sum()) * float((two**2).sum()) * len(rewards))
    return float((one * two).sum()) / scale if scale > 0 else math.nan


# ---------------------------------------------------------------- all ways at one temperature


async def compare(
    exact: Exact, engine: Engine, groups: Sequence[Group], base: JudgeConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of each way of judging, the check of the truth, and how certain the judge is."""
    truth, certain = await truths(exact, base, groups)
    said = np.array([stated(caption, group.questions) for group in groups for caption in group.captions])
    checked = await really_sampled(engine, base, groups[0], truth[:CHECKED].tolist(), args.check_draws)
    letter, text = checked["answer_tokens"]
    ways: dict[str, dict[str, float]] = {}

    async def judged(name: str, config: JudgeConfig, answer: float = 1.0) -> float:
        rewards, tokens = await rewards_of(exact, config, groups, args.rotations, answer)
        ways[name] = {"tokens": tokens, **statistics_of(rewards, truth, said, GROUP)}
        return tokens

    sample = replace(base, mode=JudgeMode.sample)
    for orders in ORDERS:
        cost = await judged(f"expected x{orders}", replace(base, permutations=orders))
        trial = orders * len(groups[0].questions)
        _, tried = await rewards_of(exact, replace(sample, draws=trial), groups, 1, letter)
        same = max(1, round(trial * cost / tried))
        await judged(f"sample x{same}", replace(sample, draws=same), letter)
    await judged(f"sample x{DRAWS}", replace(sample, draws=DRAWS), letter)
    await judged("likelihood", replace(base, mode=JudgeMode.likelihood))
    await judged("text", replace(base, mode=JudgeMode.text), text)
    return {
        "temperature": base.temperature,
        "certain_share": certain,
        "truth_mean": float(truth.mean()),
        "truth_against_stated": group_correlation(truth[None], said, GROUP),
        "checked": checked,
        "ways": ways,
    }


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Noise in the group and correlation with the truth against tokens; a column each temperature."""
    rows = {"noise_in_group": "noise in the group", "corr_truth": "correlation with the truth"}
    figure = Figure(figsize=(4 * len(results), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results), sharex=True, sharey="row", squeeze=False)
    for column, result in enumerate(results):
        for axis, (key, label) in zip(axes[:, column], rows.items(), strict=True):
            for kind, style in (("expected", "o-"), ("sample", "s--")):
                found = sorted((w["tokens"], w[key]) for n, w in result["ways"].items() if n.startswith(kind))
                axis.plot(*zip(*found, strict=True), style, label=kind)
            axis.grid(alpha=0.3, which="both")
            axes[0, column].set_yscale("log")
            axes[0, column].set_title(f"temperature {result['temperature']:g}")
            axes[1, column].set_xlabel("tokens per caption")
            if column == 0:
                axis.set_ylabel(label)
    axes[0, 0].legend()
    figure.savefig(path, metadata={"Date": None})


def _finite(value: Any) -> Any:
    """JSON knows no infinity (the noise is 0) and no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(results: Sequence[dict[str, Any]]) -> None:
    """A table each temperature, and the check of its truth."""
    console = Console(width=120)
    for result in results:
        sure = f"the judge is 99 % certain of {100 * result['certain_share']:.0f} % of its answers"
        shown = Table("", *FIGURES.values(), title=f"temperature {result['temperature']:g}; {sure}")
        for way, values in result["ways"].items():
            shown.add_row(way, *(number(values[key]) for key in FIGURES))
        console.print(shown)
        checked = result["checked"]
        for mean, right, z in zip(checked["sampled"], checked["truth"], checked["z"], strict=True):
            console.print(f"truth {right:.4f}, mean of {checked['draws']} draws {mean:.4f}: {z:+.1f} errors")


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All temperatures on the same captions."""
    groups, exact = caption_groups(args.images, args.policies), Exact(args.model)
    base = JudgeConfig(model=args.model, prompt=judge_prompt_config(), cache_size=0)
    base.engine = engine_config(block_size=BLOCK, kv_gib=0.25)
    engine = Engine(args.model, base.engine, seed=0)
    try:
        return [
            await compare(exact, engine, groups, replace(base, temperature=temperature), args)
            for temperature in args.temperature
        ]
    finally:
        await asyncio.to_thread(engine.close)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(MODELS / "judge_letters"), help="a tiny judge that reads letters"
    )
    parser.add_argument("--policies", nargs="+", default=["policy", "policy_dense"])
    parser.add_argument("--images", type=int, default=8, help="of each policy")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.6, 1.0, 2.0], help="the judge's")
    parser.add_argument("--rotations", type=int, default=32)
    parser.add_argument("--check-draws", type=int, default=256, help="really sampled answers per caption")
    parser.add_argument("--out", type=Path, help="folder for variance.json and variance.svg, as docs/judge")
    args = parser.parse_args()
    results = asyncio.run(run(args))
    show(results)
    made = {key: value for key, value in vars(args).items() if key not in ("out", "model")}
    found = {"model": Path(args.model).name, **made, "results": results}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "variance.json").write_text(json.dumps(_finite(found), indent=1) + "\n")
        plot(results, args.out / "variance.svg")
    print(json.dumps(_finite(found)))


if __name__ == "__main__":
    main()
