"""Train batches over the tiny world's real images, for the learner's tests."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as parquet
import torch
from sync_reference import Reference, Settings

import caprl_async
from caprl_async.config import Config
from caprl_async.data.processor import PolicyProcessor
from caprl_async.types import (
    Caption,
    CaptionGroup,
    Finish,
    ImageRef,
    RewardParts,
    ScoredGroup,
    TrainBatch,
    Version,
    VersionSpan,
)

TINY = Path(caprl_async.__file__).parent / "tiny"
POLICY = TINY / "models" / "policy"


def tiny_config(**learner: object) -> Config:
    """The demo's learner: float32, one thread, no GPU."""
    config = Config(steps=10)
    config.policy.model = str(POLICY)
    config.policy.min_pixels = config.policy.max_pixels = 12544
    for name, value in {"dtype": "float32", "device": "cpu", "threads": 1, "lr": 1e-3, **learner}.items():
        setattr(config.learner, name, value)
    return config


def plain_reference(config: Config) -> Reference:
    """The policy in plain transformers, with the run's optimizer."""
    learner = config.learner
    return Reference(
        Settings(
            model=config.policy.model,
            pixels=config.policy.max_pixels,
            steps=config.steps,
            lr=learner.lr,
            warmup_steps=learner.warmup_steps,
            min_lr_ratio=learner.min_lr_ratio,
            betas=(learner.betas[0], learner.betas[1]),
            grad_norm=learner.grad_norm,
            temperature=config.rollout.temperature,
            clip=learner.correction.trust_region.clip_high,
            importance_high=learner.correction.importance.high,
        )
    )


def plain_logprobs(reference: Reference, scored: ScoredGroup) -> list[list[float]]:
    """Of every token of the group's captions."""
    group: dict[str, Any] = msgspec.to_builtins(scored.group)
    with torch.no_grad():
        return [
            reference.logprobs(group, scored.image.path, caption.token_ids).tolist()
            for caption in scored.group.captions
        ]


def near_policy(batch: TrainBatch, reference: Reference) -> TrainBatch:
    """The batch as an engine would have sampled it: its log-probabilities are near the policy's."""
    groups = []
    for scored in batch.groups:
        captions = tuple(
            msgspec.structs.replace(c, logprobs=tuple(p + 0.3 * math.sin(7 * p) for p in policy))
            for c, policy in zip(scored.group.captions, plain_logprobs(reference, scored), strict=True)
        )
        group = msgspec.structs.replace(scored.group, captions=captions)
        groups.append(msgspec.structs.replace(scored, group=group))
    return msgspec.structs.replace(batch, groups=tuple(groups))


def join_alone() -> None:
    """Makes this process a learner group of one rank."""
    from caprl_async.learner.engine import join_group, prepare

    torch.set_num_threads(1)
    prepare("cpu")
    join_group(0, 1, "127.0.0.1", 0, device="cpu", listener=None, timeout_s=60)


def tiny_processor() -> PolicyProcessor:
    return PolicyProcessor(str(POLICY), 12544, 12544)


def images(folder: Path, count: int) -> list[ImageRef]:
    """The first images of the training set, as files."""
    rows = parquet.read_table(TINY / "data" / "train.parquet", columns=["image"]).slice(0, count).to_pylist()
    refs = []
    for row in rows:
        content = row["image"]["bytes"]
        sha256 = hashlib.sha256(content).hexdigest()
        path = folder / f"{sha256}.png"
        path.write_bytes(content)
        refs.append(ImageRef(sha256=sha256, path=str(path)))
    return refs


def make_batch(
    processor: PolicyProcessor,
    refs: list[ImageRef],
    n: int,
    *,
    seed: int = 0,
    lengths: tuple[int, int] = (3, 45),
    version: Version = Version(0, 0),  # noqa: B008
) -> TrainBatch:
    """One group per image: captions of random words and lengths, random rewards and log-probabilities."""
    draw = random.Random(seed)
    words = [i for i in range(processor.vocab_size) if i not in processor.banned_token_ids]
    prompt = list(processor.prompt_ids("describe the image ."))
    groups = []
    for number, ref in enumerate(refs):
        grid = processor.pixels(ref).grid
        at = prompt.index(processor.image_token_id)
        placeholders = [processor.image_token_id] * processor.image_tokens(grid)
        captions = []
        for _ in range(n):
            length = draw.randint(*lengths)
            captions.append(
                Caption(
                    text="",
                    token_ids=tuple(draw.choices(words, k=length)),
                    logprobs=tuple(-draw.random() * 8 for _ in range(length)),
                    spans=(VersionSpan(version, 0, length),),
                    finish=Finish.STOP,
                )
            )
        groups.append(
            ScoredGroup(
                group=CaptionGroup(
                    key=f"train/{number}",
                    attempt=0,
                    prompt_token_ids=(*prompt[:at], *placeholders, *prompt[at + 1 :]),
                    image_sha256=ref.sha256,
                    image_grid=(grid,),
                    captions=tuple(captions),
                    actor="rollout-0",
                    started=0.0,
                    finished=1.0,
                ),
                verdicts=((),) * n,
                rewards=tuple(
                    RewardParts(
                        total=draw.random(), accuracy=None, length=0, format=0, cost=0, scored=1, asked=1
                    )
                    for _ in range(n)
                ),
                weights=(),
                blind=(),
                index=number,
                row_id=str(number),
                image=ref,
            )
        )
    return TrainBatch(version=version, groups=tuple(groups), cut=2.0)
