"""The learner side of a recorded run, executed again: the same ranks, fed from files instead of the hub."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeAlias

import torch
from msgspec.structs import replace
from safetensors import safe_open
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from caprl_async.config import Config
from caprl_async.data.images import stored_path
from caprl_async.data.processor import PolicyProcessor
from caprl_async.learner.engine import join_group, prepare
from caprl_async.learner.snapshot import checkpoint_tensors
from caprl_async.learner.trainer import Trainer
from caprl_async.replay.samples import recorded_batch
from caprl_async.types import ImageRef, TrainBatch

_HOST = "127.0.0.1"
_LOOK_S = 1.0  # between looks at ranks that say nothing


class RerunFailed(RuntimeError):
    """A rank could not go on; the message says why."""


@dataclass(frozen=True)
class Rerun:
    """What to execute. All files are the run's."""

    config: Config
    batches: tuple[Path, ...]  # in order
    images: Path  # its image store, where that lies now
    compare: Mapping[int, Path]  # step -> folder of safetensors with the parameters after it
    start: Path | None = None  # what `LearnerActor.save` wrote; None: the policy's own weights


@dataclass(frozen=True)
class Stepped:
    """A batch has been trained on."""

    step: int  # now
    metrics: dict[str, float]
    advantages: dict[str, float]  # by caption


@dataclass(frozen=True)
class Compared:
    """The parameters beside the run's own."""

    step: int
    tensors: int = 0
    values: int = 0
    apart: dict[str, float] = field(default_factory=dict)  # largest difference of those not equal bit by bit

    @property
    def equal(self) -> bool:
        return self.tensors > 0 and not self.apart


@dataclass(frozen=True)
class _Failed:
    text: str


Message: TypeAlias = Stepped | Compared


def rerun(order: Rerun) -> Iterator[Message]:
    """Trains in processes of its own, one per rank, and tells what happens; they end with the iterator.

    Raises:
        RerunFailed: a rank could not go on.
    """
    _as_in_ray(order.config)
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    world = order.config.learner.num_ranks
    with socket.create_server((_HOST, 0)) as listener:
        port = listener.getsockname()[1]
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, world, port, listener if rank == 0 else None, order, messages),
                daemon=True,
            )
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
    try:
        while (message := _next(messages, ranks)) is not None:
            yield message
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _as_in_ray(config: Config) -> None:
    """Sums depend on the number of threads, and Ray lets torch decide on as many as an actor has cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(config.ring.cpus_per_actor))))


def _next(messages: Any, ranks: Sequence[Any]) -> Message | None:
    """What a rank says next; None when all has been done.

    Raises:
        RerunFailed: a rank says so, or died.
    """
    while True:
        try:
            message = messages.get(timeout=_LOOK_S)
        except queue.Empty:
            dead = [(number, r.exitcode) for number, r in enumerate(ranks) if r.exitcode]
            if not dead:
                continue
            try:  # it may have said why, just before
                message = messages.get(timeout=_LOOK_S)
            except queue.Empty:
                number, code = dead[0]
                raise RerunFailed(f"rank {number} died with exit code {code}") from None
        if isinstance(message, _Failed):
            raise RerunFailed(message.text)
        found: Message | None = message
        return found


# ---------------------------------------------------------------- in the process of a rank


def _rank(
    rank: int, world: int, port: int, listener: socket.socket | None, order: Rerun, messages: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    _end_with_parent()
    try:
        if order.config.learner.device == "cuda":
            _take_gpu(rank)
        _run(rank, world, port, listener, order, messages)
    except (ValueError, FloatingPointError, OSError) as error:  # data, models, files
        messages.put(_Failed(f"rank {rank}: {error}"))
    except Exception as error:
        traceback.print_exc()
        messages.put(_Failed(f"rank {rank}: {type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _take_gpu(rank: int) -> None:
    """As Ray does it: a rank sees its own GPU and no other."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[rank] if seen else str(rank)


def _run(
    rank: int, world: int, port: int, listener: socket.socket | None, order: Rerun, messages: Any
) -> None:
    config = order.config
    learner, policy = config.learner, config.policy
    if (learner.device == "cpu" or learner.offload_optimizer) and learner.threads > 0:
        torch.set_num_threads(learner.threads)
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # torch's, to DeepSpeed
    prepare(learner.device)
    join_group(
        rank,
        world,
        _HOST,
        port,
        device=learner.device,
        listener=listener.detach() if listener is not None else None,
        timeout_s=config.ring.start_timeout_s,
    )
    processor = PolicyProcessor(policy.model, policy.min_pixels, policy.max_pixels)
    trainer = Trainer(config, processor, rank, world)
    if order.start is not None:
        trainer.engine.load(order.start / "trainer")
    for path in order.batches:
        batch = at_home(recorded_batch(path), order.images)
        metrics = trainer.train(batch)
        step = batch.version.step + 1
        if rank == 0:
            messages.put(Stepped(step, metrics, trainer.advantages))
        if step in order.compare:
            tensors = trainer.engine.gather(trainer.hf)
            if tensors is not None:
                found = compared(step, checkpoint_tensors(trainer.hf, tensors), order.compare[step])
                messages.put(found)
    if rank == 0:
        messages.put(None)


def at_home(batch: TrainBatch, images: Path) -> TrainBatch:
    """The batch with its images where they lie now, if the run's folder has been moved."""
    groups = [replace(scored, image=_at_home(scored.image, images)) for scored in batch.groups]
    return replace(batch, groups=tuple(groups))


def _at_home(image: ImageRef, images: Path) -> ImageRef:
    first = image.pictures[0].sha256
    if not stored_path(images, first).is_file():
        return image
    frames = tuple(replace(one, path=str(stored_path(images, one.sha256))) for one in image.frames)
    return replace(image, path=str(stored_path(images, first)), frames=frames)


def compared(step: int, tensors: Mapping[str, Tensor], folder: Path) -> Compared:
    """The tensors beside those of a checkpoint; one that only one of them has is infinitely far apart."""
    apart: dict[str, float] = {}
    kept: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name in names & tensors.keys():
                difference = _difference(tensors[name], file.get_tensor(name))
                if difference is not None:
                    apart[name] = difference
        kept |= names
    apart |= dict.fromkeys(sorted(kept ^ tensors.keys()), float("inf"))
    return Compared(step, len(tensors), sum(t.numel() for t in tensors.values()), apart)


def _difference(one: Tensor, other: Tensor) -> float | None:
    """The largest difference of two tensors; None if they are equal bit by bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    if torch.equal(*bits):
        return None
    return (one.double() - other.double()).abs().max().item()
