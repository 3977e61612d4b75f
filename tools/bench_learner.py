"""How fast, and in how much memory, are groups of captions learnt? `python tools/bench_learner.py`.

A Qwen2.5-VL of random weights; forward and backward of the policy loss, without the optimizer. In every cell,
one after the other, on the same captions:

- *shared*: the learner's way: image and prompt once per group, captions packed behind them;
- *tower shared*: the image once, but the prompt with each caption, packed without padding;
- *repeated*: a row for each caption, image and prompt anew in each (transformers' plain forward, as other
  trainers do). It takes the same captions at a time, so all three need the memory that they show.

*Bound* is the ratio of multiplications, repeated to shared; beside it the same without the vision tower. How
much of the work is the language model's matrices, attention, the tower and the output layer stands below.
`ratio` in the last line is repeated to shared time at P:R = 3:1, n = 8.

Then the output layer alone: log-probabilities in chunks against logits of all tokens, time and peak memory.

`--shape 3b` has the sizes of Qwen2.5-VL-3B; with `--device cuda --dtype bfloat16` it also says how much of
the card's measured matmul rate the learner's multiplications reach (MFU; recomputation is not counted).

`--updates 2` measures whole updates by the learner's own engine instead, DeepSpeed and AdamW included: of
`--micros` micro-batches of `--groups` groups each, of the first ratio and n. One rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_memory import Peak, matmul_rate, synchronise
from rich.console import Console
from rich.table import Table

from caprl_async.config import LearnerConfig, Prefix
from caprl_async.data.processor import Grid
from caprl_async.learner.batch import TrainSequence
from caprl_async.learner.head import ScoringHead
from caprl_async.learner.losses import policy_loss
from caprl_async.learner.model import Collate, PolicyModel, checkpoint_activations, collator
from caprl_async.learner.plan import Costs, costs_of
from caprl_async.learner.prefix import ATTENTION
from caprl_async.learner.tensors import MicroTensors
from caprl_async.types import ImageRef

IMAGE, VIDEO, START, END = 3, 4, 5, 6
BANNED = (IMAGE, VIDEO, START, END)
TEXT = 12  # prompt tokens beside the image
WAYS = ("shared", "tower shared", "repeated")

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    # A patch takes a quarter of a token's multiplications, as in the 3B.
    "small": {
        "text": {
            "vocab_size": 8192,
            "hidden_size": 384,
            "intermediate_size": 1280,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        "vision": {"depth": 4, "hidden_size": 224, "intermediate_size": 616, "num_heads": 4},
    },
    "3b": {
        "text": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        "vision": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    },
}


@dataclass(frozen=True)
class Cell:
    """What one pass over the same captions took."""

    prompt: int
    response: int
    n: int
    seconds: dict[str, float]  # by way, median
    peak: dict[str, int]  # bytes above what was held before
    work: dict[str, float]  # multiplications of a forward pass
    bound: dict[str, float]  # repeated / shared, whole and by part

    @property
    def ratio(self) -> float | None:
        """None if the repeated way was not asked for."""
        return self.seconds["repeated"] / self.seconds["shared"] if "repeated" in self.seconds else None


def random_policy(shape: str, dtype: torch.dtype, device: str, checkpointing: bool) -> Any:
    """A Qwen2.5-VL of the shape, made where it is to run."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes, tied = SHAPES[shape], shape == "3b"
    half = sizes["text"]["hidden_size"] // sizes["text"]["num_attention_heads"] // 2
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(
        text_config={**sizes["text"], "rope_parameters": rope, "tie_word_embeddings": tied, **ends},
        tie_word_embeddings=tied,
        vision_config={**sizes["vision"], "out_hidden_size": sizes["text"]["hidden_size"]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        dtype=dtype,
    )
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    if checkpointing:
        checkpoint_activations(model, LearnerConfig())
    return model.train(checkpointing)


def captions_of(groups: int, n: int, prompt: int, response: int, vocabulary: int) -> list[TrainSequence]:
    """`groups` images with n captions of `response` tokens each; `prompt` tokens, nearly all of the image."""
    draw = random.Random(0)
    words = range(END + 1, vocabulary)
    text = draw.choices(words, k=TEXT - 2)
    ids = (*text[: TEXT // 2], START, *[IMAGE] * (prompt - TEXT), END, *text[TEXT // 2 :])
    return [
        TrainSequence(
            name=f"{group}[{i}]",
            group=group,
            images=(ImageRef(sha256=str(group), path=""),),
            grids=(grid_of(prompt - TEXT),),
            prompt=ids,
            caption=tuple(draw.choices(words, k=response)),
            behaviour=(-5.0,) * response,
            staleness=(0,) * response,
            reward=0.0,
            advantage=draw.uniform(-1, 1),
            weight=1.0 / (groups * n * response),
        )
        for group in range(groups)
        for i in range(n)
    ]


def grid_of(tokens: int) -> Grid:
    """The squarest image of so many tokens, each of 2 x 2 patches."""
    rows = max(r for r in range(1, int(tokens**0.5) + 1) if tokens % r == 0)
    return (1, 2 * rows, 2 * tokens // rows)


# ---------------------------------------------------------------- a pass


def apart(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """The same captions as groups of one."""
    return [replace(s, group=i) for i, s in enumerate(sequences)]


def one_pass(policy: PolicyModel, make: Collate, sequences: Sequence[TrainSequence], device: str) -> float:
    """Seconds of collating, forward, loss and backward."""
    policy.zero_grad(set_to_none=True)
    synchronise(device)
    began = time.perf_counter()
    tensors = make(sequences).to(torch.device(device))
    loss_of(policy, tensors).backward()
    synchronise(device)
    return time.perf_counter() - began


def loss_of(policy: Callable[[MicroTensors], Any], tensors: MicroTensors) -> torch.Tensor:
    logprobs, entropy = policy(tensors)
    return policy_loss(logprobs, entropy, logprobs.detach(), tensors.loss_tokens, LearnerConfig())[0]


class Bench:
    """One model that attends in either way."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        dtype = getattr(torch, args.dtype)
        self.hf = random_policy(args.shape, dtype, args.device, args.checkpointing)
        self.vocabulary = self.hf.config.get_text_config().vocab_size
        self.plain = self.hf.model.language_model.config._attn_implementation
        self.costs = {prefix: costs_of(self.hf, prefix) for prefix in Prefix}
        self.policy = PolicyModel(self.hf, BANNED, 1.0, args.chunk, Prefix.shared)
        self.pixels: dict[str, torch.Tensor] = {}

    def _pixels(self, image: ImageRef, grid: Grid) -> torch.Tensor:
        key = f"{image.sha256} {grid}"
        if key not in self.pixels:
            self.pixels[key] = torch.randn(grid[1] * grid[2], 3 * 2 * 14 * 14)
        return self.pixels[key]

    def collate(self, prefix: Prefix) -> Collate:
        return collator(self.hf, IMAGE, self._pixels, prefix)

    def run(self, way: str, sequences: list[TrainSequence]) -> float:
        prefix = Prefix.repeated if way == "repeated" else Prefix.shared
        make = self.collate(prefix)
        attention = self.plain if prefix is Prefix.repeated else ATTENTION
        self.hf.model.language_model.set_attn_implementation(attention)
        given = apart(sequences) if way == "tower shared" else sequences
        return one_pass(self.policy, make, given, self.args.device)

    def cell(self, ratio: int, n: int) -> Cell:
        """Times of all ways in turn, after one pass of each that counts for memory alone."""
        prompt, response = ratio * self.args.response, self.args.response
        sequences = captions_of(self.args.groups, n, prompt, response, self.vocabulary)
        peaks: dict[str, int] = {}
        for way in self.args.ways:
            self.run(way, sequences)
            self.hf.zero_grad(set_to_none=True)
            gc.collect()
            with Peak(self.args.device) as peak:
                self.run(way, sequences)
            peaks[way] = peak.bytes
        seconds: dict[str, list[float]] = {way: [] for way in self.args.ways}
        for _ in range(self.args.rounds):
            for way in self.args.ways:
                seconds[way].append(self.run(way, sequences))
        works = {
            "shared": self.costs[Prefix.shared].work(tuple(sequences)),
            "repeated": self.costs[Prefix.repeated].work(tuple(sequences)),
        }
        return Cell(
            prompt=prompt,
            response=response,
            n=n,
            seconds={way: statistics.median(times) for way, times in seconds.items()},
            peak=peaks,
            work={way: work * self.costs[Prefix.shared].unit for way, work in works.items()},
            bound=bounds(self.costs, tuple(sequences)),
        )


def bounds(costs: dict[Prefix, Costs], captions: tuple[TrainSequence, ...]) -> dict[str, float]:
    """Work repeated over work shared, of everything and of each part alone."""

    def without(part: Callable[[Costs], Costs]) -> float:
        return part(costs[Prefix.repeated]).work(captions) / part(costs[Prefix.shared]).work(captions)

    return {
        "all": without(lambda c: c),
        "language model": without(lambda c: replace(c, patch=0.0)),
        "its matrices": without(lambda c: replace(c, patch=0.0, pair=0.0, scored=0.0)),
    }


def shares(costs: Costs, captions: tuple[TrainSequence, ...]) -> dict[str, float]:
    """Share of each part in the work of a pass."""
    whole = costs.work(captions)
    parts = {"tower": {"patch": 0.0}, "attention": {"pair": 0.0}, "output": {"scored": 0.0}}
    found = {
        name: 1 - replace(costs, **without).work(captions) / whole  # type: ignore[arg-type]
        for name, without in parts.items()
    }
    return {"matrices": 1 - sum(found.values()), **found}


# ---------------------------------------------------------------- the output layer


def head_pass(kind: str, head: ScoringHead, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if kind == "chunks":
        return head(states, targets)[0]
    banned = torch.zeros(head.weight.shape[0], dtype=torch.bool, device=states.device)
    banned[0] = True
    logits = (states @ head.weight.T).float().masked_fill(banned, -torch.inf)
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def head_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward of the output layer, in chunks and whole, for growing tokens and vocabularies."""
    rows = []
    dtype = getattr(torch, args.dtype)
    for vocabulary, tokens in args.head:
        weight = torch.nn.Parameter(torch.randn(vocabulary, args.head_width, device=args.device, dtype=dtype))
        head = ScoringHead(weight, (0,), 1.0, args.chunk).to(args.device)
        states = torch.randn(tokens, args.head_width, device=args.device, dtype=dtype, requires_grad=True)
        targets = torch.randint(1, vocabulary, (tokens,), device=args.device)
        row: dict[str, Any] = {"vocabulary": vocabulary, "tokens": tokens}
        for kind in ("chunks", "whole"):
            for measured in (False, True):
                weight.grad = states.grad = None
                gc.collect()
                with Peak(args.device) as peak:
                    began = time.perf_counter()
                    head_pass(kind, head, states, targets).sum().backward()
                    synchronise(args.device)
                if measured:
                    row |= {f"{kind}_s": time.perf_counter() - began, f"{kind}_bytes": peak.bytes}
        rows.append(row)
    return rows


# ---------------------------------------------------------------- whole updates


def run_updates(args: argparse.Namespace) -> None:
    """Prints a line for each update; the first compiles, allocates and makes the optimizer's state."""
    from caprl_async.learner import engine

    learner = LearnerConfig(
        device=args.device,
        dtype=args.dtype,
        gradient_checkpointing=args.checkpointing,
        logprob_chunk=args.chunk,
    )
    engine.prepare(args.device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine.join_group(0, 1, "127.0.0.1", port, device=args.device, listener=None, timeout_s=60)
    rate = matmul_rate(args.device, getattr(torch, args.dtype))
    bench = Bench(args)
    train = engine.TrainEngine(bench.policy, learner)
    response, n = args.response, args.ns[0]
    captions = captions_of(args.groups, n, args.ratios[0] * response, response, bench.vocabulary)
    costs = bench.costs[Prefix.shared]
    work = costs.work(tuple(captions)) * costs.unit * args.micros
    make = bench.collate(Prefix.shared)
    tokens = costs.tokens(tuple(captions))
    print(f"{args.micros} micro-batches of {tokens} tokens; matmul rate {rate / 1e12:.3g} TFLOP/s")
    for update in range(args.updates):
        with Peak(args.device) as peak:
            began = time.perf_counter()
            for i in range(args.micros):
                loss = loss_of(train.forward, make(captions).to(train.device))
                train.backward(loss, last=i == args.micros - 1)
            synchronise(args.device)
            passes = time.perf_counter() - began
            train.step(learner.lr)
            synchronise(args.device)
            whole = time.perf_counter() - began
        print(
            f"update {update}: {whole:.3f} s, of it the optimizer {whole - passes:.3f} s; "
            f"{args.micros * len(captions) * response / whole:.0f} caption tokens/s, "
            f"MFU {6 * work / whole / rate:.0%}; peak {peak.whole / 2**30:.1f} GiB in all"
        )
    train.close()


# ---------------------------------------------------------------- output


def show(bench: Bench, cells: Sequence[Cell], heads: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    console = Console(width=150)
    ways = bench.args.ways
    table = Table("P:R", "n", *[f"{way}, s" for way in ways], "ratio", "bound", "of it without tower")
    for column in ("tokens/s", "MFU", *[f"{way}, GiB" for way in ways]):
        table.add_column(column)
    figures = []
    for cell in cells:
        tokens = bench.args.groups * cell.n * cell.response
        # Backward takes twice the forward's multiplications; a multiplication and an addition are 2 FLOP.
        mfu = 6 * cell.work["shared"] / cell.seconds["shared"] / rate
        table.add_row(
            f"{cell.prompt // cell.response}:1",
            str(cell.n),
            *[f"{cell.seconds[way]:.3g}" for way in ways],
            "-" if cell.ratio is None else f"{cell.ratio:.2f}",
            f"{cell.bound['all']:.2f}",
            f"{cell.bound['language model']:.2f}",
            f"{tokens / cell.seconds['shared']:.0f}",
            f"{mfu:.0%}",
            *[f"{cell.peak[way] / 2**30:.2f}" for way in ways],
        )
        figures.append({**vars(cell), "ratio": cell.ratio, "mfu": mfu, "caption_tokens": tokens})
    console.print(table)
    inner = Table("vocabulary", "tokens", "chunks, s", "whole, s", "chunks, GiB", "whole, GiB")
    for row in heads:
        inner.add_row(
            str(row["vocabulary"]),
            str(row["tokens"]),
            f"{row['chunks_s']:.3g}",
            f"{row['whole_s']:.3g}",
            f"{row['chunks_bytes'] / 2**30:.2f}",
            f"{row['whole_bytes'] / 2**30:.2f}",
        )
    console.print(inner)
    goal = next((c for c in cells if (c.prompt // c.response, c.n) == (3, 8)), cells[0])
    sequences = captions_of(bench.args.groups, goal.n, goal.prompt, goal.response, bench.vocabulary)
    parts = {p.value: shares(bench.costs[p], tuple(sequences)) for p in Prefix}
    for name, found in parts.items():
        listed = ", ".join(f"{part} {share:.0%}" for part, share in found.items())
        console.print(f"work of one pass at {goal.prompt // goal.response}:1, n = {goal.n}, {name}: {listed}")
    console.print(f"matmul rate {rate / 1e12:.3g} TFLOP/s ({bench.args.dtype}, {bench.args.device})")
    return {"ratio": goal.ratio, "cells": figures, "head": heads, "shares": parts, "matmul_flops": rate}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--groups", type=int, default=2, help="groups computed at one time")
    parser.add_argument("--response", type=int, default=64, help="tokens of a caption")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 3, 6], help="P:R")
    parser.add_argument("--ns", type=int, nargs="+", default=[4, 8, 16], help="captions per group")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="`shared` must be among them")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many passes")
    parser.add_argument("--chunk", type=int, default=512, help="learner.logprob_chunk")
    parser.add_argument("--updates", type=int, default=0, help="instead: so many updates; see above")
    parser.add_argument("--micros", type=int, default=4, help="micro-batches of an update")
    parser.add_argument("--checkpointing", action="store_true", help="learner.gradient_checkpointing")
    parser.add_argument(
        "--head-width", type=int, default=512, help="width of the states before the output layer"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU: threads of torch; 0: torch decides")
    parser.set_defaults(head=[(8192, 1024), (32768, 1024), (131072, 1024), (32768, 4096)])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.updates:
        run_updates(args)
        return
    rate = matmul_rate(args.device, getattr(torch, args.dtype))
    bench = Bench(args)
    console = Console(stderr=True)
    cells = []
    for ratio in args.ratios:
        for n in args.ns:
            cells.append(bench.cell(ratio, n))
            took = ", ".join(f"{way} {seconds:.3g} s" for way, seconds in cells[-1].seconds.items())
            console.print(f"P:R {ratio}:1, n = {n}: {took}; bound {cells[-1].bound['all']:.2f}")
    figures = show(bench, cells, head_rows(args), rate)
    about = {"shape": args.shape, "device": args.device, "dtype": args.dtype, "groups": args.groups}
    if args.device == "cuda":
        about["card"] = torch.cuda.get_device_name()
    print(json.dumps({**about, **figures}))


if __name__ == "__main__":
    main()
