"""Train batches over the tiny world's real images, for the learner's tests."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pyarrow.parquet as parquet

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
                    RewardParts(total=draw.random(), accuracy=None, length=0, format=0, scored=1, asked=1)
                    for _ in range(n)
                ),
                index=number,
                row_id=str(number),
                image=ref,
            )
        )
    return TrainBatch(version=version, groups=tuple(groups), cut=2.0)
