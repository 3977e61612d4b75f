"""How fast are captions judged, beside the way released with CapRL? `python tools/bench_judge.py`.

The same model on the same engine, prefix cache on, the same captions and questions:

- *released*: for each caption 8 questions are drawn with replacement, the options of each draw shuffled
  anew, and one answer is sampled (temperature 0.6, top_p 1, at most 10 tokens) by a request of its own.
  Requests go out in the order in which they arise, each to the next of `--replicas` engines (the recipe has 8
  judge GPUs; how it hands requests to them is not published): captions of many images finish interleaved,
  `--in-flight` of them are open at a time, the next request is the next draw of a random one of them, a
  caption that has sent its last makes way for the next. No HTTP and no seeds, which would slow it.
- *released, one engine*: the same with a single engine, which meets all draws of a caption.
- *released, by caption*: one engine, and the draws of a caption one after the other: the kindest order.
- *ours*: `expected`, one order of the options. Each question of a caption once, the 8 captions of an image
  together on one engine, `judge.max_requests_in_flight_per_actor` images at a time; the score is read off the
  letters' probabilities, nothing is written. No verdict cache.

Replicas take turns on the one engine here, each with an empty prefix cache; seconds are engine-seconds.

A question is scored if a caption has met it: *questions scored* counts each question of a caption once,
*draws* counts the 8 draws, which meet 3.6 of 4 questions. Either makes one reward, so captions/s compares
what rewards cost. `ratio` in the last line is of questions scored per second, ours to *released*.

`--shape real`: lengths as the paper's, random words and, without `--model`, a Qwen2 of random weights. It
ends no answer, so `--answer-tokens` (4 there: ` B) red` and its end) stands for the 10. `--shape tiny`: the
demo's world and judge.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from judge_tokens import REASONS, Ids, Tally, decompose
from judge_work import GROUP, Draw, Group, draw, interleave, random_judge, real_work, tiny_work
from rich.console import Console
from rich.table import Table

from caprl_async.config import EngineConfig, JudgeConfig
from caprl_async.data.chat import load_tokenizer
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import Request, Response
from caprl_async.judge.judge import Judge
from caprl_async.judge.letters import read_letter
from caprl_async.judge.prompt import JudgePrompter
from caprl_async.judge.verdicts import SAMPLE_TOKENS
from caprl_async.tiny.models import MODELS

T = TypeVar("T")
DRAWS, TEMPERATURE = 8, 0.6  # as released
WAYS = ("ours", "released", "released, one engine", "released, by caption")


@dataclass(frozen=True)
class Run:
    """What one engine's share of one pass over the workload cost."""

    turn: int
    seconds: float
    draws: int  # answers that were scored
    met: frozenset[tuple[str, str]]  # (caption, question) that have a score
    score: float  # mean
    prompts: list[Ids]
    cached: int
    generated: int


# ---------------------------------------------------------------- the ways


async def _limited(tasks: Sequence[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """Results of all, begun in order, at most `at_once` under way."""
    places = asyncio.Semaphore(at_once)

    async def one(task: Coroutine[Any, Any, T]) -> T:
        async with places:
            return await task

    return await asyncio.gather(*map(one, tasks))


async def ours(engine: Engine, config: JudgeConfig, groups: Sequence[Group], turn: int, rotation: int) -> Run:
    """Our judge, fed as the ring feeds it."""
    tally, begun = Tally(engine), time.monotonic()
    judge = Judge.on(tally, config)
    tasks = [judge.judge(group.captions, group.questions, rotation) for group in groups]
    judged = await _limited(tasks, config.max_requests_in_flight_per_actor)
    seconds = time.monotonic() - begun
    scores: dict[tuple[str, str], float] = {}  # equal captions of a group are asked about once
    for group, verdicts in zip(groups, judged, strict=True):
        for caption, mine in zip(group.captions, verdicts, strict=True):
            for verdict in mine:
                if verdict.score is None:
                    raise SystemExit(f"{verdict.question_id} got no score: {verdict.reason}")
                scores[caption, verdict.question_id] = verdict.score
    mean = sum(scores.values()) / len(scores)
    met = frozenset(scores)
    return Run(turn, seconds, len(scores), met, mean, tally.prompts, tally.cached, tally.generated)


async def released(
    engine: Engine, config: JudgeConfig, draws: Sequence[Draw], turn: int, at_once: int, longest: int
) -> Run:
    """The draws in this order, each a request of its own."""
    tally, begun = Tally(engine), time.monotonic()
    prompter = JudgePrompter(load_tokenizer(config.model), config.prompt)

    async def score(drawn: Draw) -> bool:
        options = (*drawn.question.choices, config.prompt.abstain)
        tail = prompter.tail(drawn.question.stem, [options[index] for index in drawn.order])
        prompt = (*prompter.head(drawn.caption), *tail)
        request = Request(prompt, temperature=config.temperature, max_tokens=longest)
        (answer,) = await tally.generate_many([request])
        assert isinstance(answer, Response)
        letter = read_letter(prompter.decode(answer.completions[0].token_ids), len(options))
        gold = len(options) - 1 if drawn.question.answer is None else drawn.question.answer
        return letter is not None and drawn.order[letter] == gold

    scores = await _limited([score(drawn) for drawn in draws], at_once)
    seconds = time.monotonic() - begun
    met = frozenset((drawn.caption, drawn.question.question_id) for drawn in draws)
    mean = sum(scores) / len(scores)
    return Run(turn, seconds, len(draws), met, mean, tally.prompts, tally.cached, tally.generated)


async def measure(
    engine: Engine, config: JudgeConfig, groups: Sequence[Group], args: argparse.Namespace
) -> dict[str, list[Run]]:
    """All ways in turn, `rounds` times, the prefix cache empty before each; first a short turn to warm up."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    for turn in range(args.rounds + 1):
        some = groups if turn else groups[:2]
        rng = random.Random(args.seed + turn)
        queues = [queue for group in some for queue in draw(group, DRAWS, rng)]
        arrival = interleave(queues, args.in_flight, rng)
        by_caption = [drawn for queue in queues for drawn in queue]
        pool = range(args.replicas)
        shares = {
            WAYS[1]: [arrival[i :: args.replicas] for i in pool],
            WAYS[2]: [arrival],
            WAYS[3]: [by_caption],
        }
        for way in WAYS:
            if way == WAYS[0]:
                for mine in (some[i :: args.replicas] for i in pool):
                    await _forget(engine)
                    if mine:
                        runs[way].append(await ours(engine, config, mine, turn, args.seed + turn))
                continue
            for share in shares[way]:
                await _forget(engine)
                at_once = DRAWS * args.in_flight // len(shares[way])
                runs[way].append(await released(engine, config, share, turn, at_once, args.answer_tokens))
    return {way: [run for run in mine if run.turn] for way, mine in runs.items()}


async def _forget(engine: Engine) -> None:
    await engine.call(lambda llm: llm.reset_prefix_cache())


# ---------------------------------------------------------------- what it shows

_FIGURES = {
    "questions_per_s": "questions scored/s",
    "draws_per_s": "draws/s",
    "captions_per_s": "captions/s",
    "prefilled": "tokens prefilled per question scored",
    "prefilled_per_draw": "tokens prefilled per draw",
    "generated": "tokens generated per draw",
    "computed": "tokens prefilled and generated per caption",
    "cached_share": "share of prompt tokens from the prefix cache",
    "score": "mean score",
}


def figures(runs: Sequence[Run], captions: int) -> dict[str, float]:
    """Over all rounds and engines; `captions` were judged in each round."""
    seconds, draws = sum(run.seconds for run in runs), sum(run.draws for run in runs)
    tokens, cached = sum(len(p) for run in runs for p in run.prompts), sum(run.cached for run in runs)
    generated = sum(run.generated for run in runs)
    scored = len({(run.turn, *pair) for run in runs for pair in run.met})
    judged = captions * len({run.turn for run in runs})
    return {
        "questions_per_s": scored / seconds,
        "draws_per_s": draws / seconds,
        "captions_per_s": judged / seconds,
        "prefilled": (tokens - cached) / scored,
        "prefilled_per_draw": (tokens - cached) / draws,
        "generated": generated / draws,
        "computed": (tokens - cached + generated) / judged,
        "cached_share": cached / tokens,
        "score": sum(run.score * run.draws for run in runs) / draws,
    }


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def table(title: str, names: dict[str, str], columns: dict[str, dict[str, float]]) -> Table:
    """A row a figure, a column a way."""
    shown = Table("", *columns, title=title, title_justify="left")
    for key, name in names.items():
        shown.add_row(name, *(number(values[key]) for values in columns.values()))
    return shown


def by_reason(runs: Sequence[Run], heads: dict[str, Ids], block: int) -> dict[str, float]:
    """Tokens prefilled per question scored, by reason; each engine has a prefix cache of its own."""
    scored = len({(run.turn, *pair) for run in runs for pair in run.met})
    parts = [
        decompose(
            [heads[caption] for caption in {caption for caption, _ in run.met}],
            run.prompts,
            block,
            sum(map(len, run.prompts)) - run.cached,
        )
        for run in runs
    ]
    return {key: sum(part[key] for part in parts) / scored for key in REASONS}


def report(
    args: argparse.Namespace, runs: dict[str, list[Run]], heads: dict[str, Ids], block: int
) -> dict[str, Any]:
    """Prints the tables; returns the figures."""
    found = {way: figures(mine, args.captions) for way, mine in runs.items()}
    reasons = {way: by_reason(mine, heads, block) for way, mine in runs.items()}
    console = Console(width=120)
    longest = f"{args.answer_tokens} tokens the longest answer of released; blocks of {block}"
    title = f"{args.shape}, {args.captions} captions, {args.replicas} replicas, {longest}"
    console.print(table(title, _FIGURES, found))
    console.print(table("tokens prefilled per question scored, by reason", REASONS, reasons))
    for way, mine in runs.items():
        turns = sorted({run.turn for run in mine})
        rounds = [figures([run for run in mine if run.turn == turn], args.captions) for turn in turns]
        speeds = ", ".join(number(one["questions_per_s"]) for one in rounds)
        console.print(f"{way}: questions scored/s of each round {speeds}")
    us, them, single, kind = (found[way] for way in WAYS)
    return {
        **vars(args),
        "block_size": block,
        "ways": found,
        "prefilled_by_reason": reasons,
        "ratio": us["questions_per_s"] / them["questions_per_s"],
        "ratio_one_engine": us["questions_per_s"] / single["questions_per_s"],
        "ratio_by_caption": us["questions_per_s"] / kind["questions_per_s"],
        "ratio_draws": us["draws_per_s"] / them["draws_per_s"],
        "ratio_captions": us["captions_per_s"] / them["captions_per_s"],
        "ratio_prefilled": them["prefilled"] / us["prefilled"],
    }


def engine_config(
    dtype: str | None = None, block_size: int | None = None, kv_gib: float | None = None
) -> EngineConfig:
    """The ring's settings for the device at hand."""
    config = EngineConfig(max_model_len=2048, block_size=block_size, kv_cache_gib=kv_gib)
    if not torch.cuda.is_available():
        config.dtype, config.block_size = "float32", block_size or 32  # the CPU's smallest block
        config.enforce_eager = config.in_process = True
    config.dtype = dtype or config.dtype
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("real", "tiny"), default="real")
    parser.add_argument("--model", help="a judge's folder; else one of random weights, or the tiny judge")
    parser.add_argument("--captions", type=int, default=64, help=f"in all, {GROUP} of each image")
    parser.add_argument("--questions", type=int, default=4, help="of each image, real (tiny has 8)")
    parser.add_argument("--replicas", type=int, default=8, help="engines that share the work")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=32, help="released: captions open at one time")
    parser.add_argument("--answer-tokens", type=int, help="released: longest answer; see above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="float32 on CPU, bfloat16 on GPU")
    parser.add_argument("--block-size", type=int, help="tokens that the prefix cache shares as one")
    parser.add_argument(
        "--kv-gib", type=float, help="memory for keys and values, as an engine's kv_cache_gib"
    )
    args = parser.parse_args()
    images = max(1, args.captions // GROUP)
    args.captions = images * GROUP
    real, made = args.shape == "real", args.shape == "real" and args.model is None
    args.answer_tokens = args.answer_tokens or (4 if made else SAMPLE_TOKENS)
    prompt, groups = real_work(images, args.questions, args.seed) if real else tiny_work(images, args.seed)
    settings = engine_config(args.dtype, args.block_size, args.kv_gib)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(MODELS / "judge_letters")
        if made:
            model = random_judge(Path(folder) / "judge")
        config = JudgeConfig(
            model=model, temperature=TEMPERATURE, cache_size=0, prompt=prompt, engine=settings
        )
        engine = Engine(model, settings, seed=args.seed)
        try:
            block = asyncio.run(engine.call(lambda llm: int(llm.vllm_config.cache_config.block_size or 16)))
            runs = asyncio.run(measure(engine, config, groups, args))
        finally:
            engine.close()
        prompter = JudgePrompter(load_tokenizer(model), prompt)
    heads = {caption: tuple(prompter.head(caption)) for group in groups for caption in group.captions}
    print(json.dumps(report(args, runs, heads, block)))


if __name__ == "__main__":
    main()
