"""A learner rank as an actor: takes batches from the hub, trains, keeps the newest weights for the engines.

Thin: the work is in `trainer`. Threads, not asyncio: one sends a snapshot while another trains.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from caprl_async.config import Config
from caprl_async.files import Digests
from caprl_async.learner.batch import NotFinite, caption_name
from caprl_async.learner.engine import join_group, prepare, same_on_all_ranks
from caprl_async.learner.lora import adapter_weights, save_adapter
from caprl_async.learner.model import load_policy
from caprl_async.learner.offenders import save_offenders
from caprl_async.learner.saving import BackgroundWriter, Export
from caprl_async.learner.snapshot import Snapshot, check_same_shape, checkpoint_tensors, export
from caprl_async.learner.trainer import Trainer
from caprl_async.process import call_me, doing, whereabouts
from caprl_async.types import FOREIGN, Hello, Role, TrainBatch, Version
from caprl_async.weights.digest import digest

if TYPE_CHECKING:
    from caprl_async.data.processor import PolicyProcessor
    from caprl_async.replay.peer import HubAddress, LearnerPeer
    from caprl_async.weights.sender import WeightSender

_STOP_S = 3.0  # a waiting step notices within a second


class RanksDisagree(RuntimeError):
    """The hub gave the ranks different batches, which must not be mixed; go on from the last checkpoint."""


class NoSnapshot(RuntimeError):
    """Weights were asked that the actor has not: before `setup`, of another rank or of an old version."""


class LearnerStopped(RuntimeError):
    """`stop` was called while the actor waited for a batch."""


@dataclass(frozen=True)
class StepReport:
    """What one `train_step` did. Times are wall times of the computation, without the wait for the batch."""

    version: Version  # now
    started: float
    finished: float
    wait_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    advantages: tuple[tuple[float, ...], ...] = ()  # [group][caption] of the batch
    done: bool = False  # the hub has no more batches; nothing was trained


class LearnerActor:
    """One rank. `train_step`, `save` and `load` are collective: the supervisor calls them on all ranks."""

    def __init__(self, rank: int, config: Config, hub: HubAddress) -> None:
        self.rank = rank
        self.config = config
        self._hub = hub
        self._listener: socket.socket | None = None
        self._trainer: Trainer | None = None
        self._peer: LearnerPeer | None = None
        self._sender: WeightSender | None = None
        self._own: Snapshot | None = None
        self._shown: Snapshot | None = None  # what the engines are to have: own, or foreign
        self._before: Snapshot | None = None
        self._writer = BackgroundWriter()
        self._stopping = threading.Event()
        self._stepping = threading.Lock()  # held by a train_step
        self._version = Version(0, 0)

    def __repr__(self) -> str:
        return f"learner-{self.rank}"

    def hub_moved(self, address: HubAddress) -> None:
        """The queue has come up elsewhere."""
        self._hub = address
        if self._peer is not None:
            self._peer.move(address)

    # ------------------------------------------------------------ start and stop

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0: the address at which the ranks meet, held open until `setup`; loopback on a single node."""
        if self.config.ring.address == "local":
            host = "127.0.0.1"
        else:
            import ray

            host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return host, self._listener.getsockname()[1]

    def setup(self, world: int, master_addr: str, master_port: int) -> dict[str, Any]:
        """Joins the other ranks, loads the model, makes the first snapshot, registers with the hub."""
        call_me(repr(self))
        self._use_threads()
        prepare(self.config.learner.device)
        # The store closes what it is given, so it gets a descriptor of its own.
        listener = self._listener.detach() if self._listener is not None else None
        self._listener = None
        join_group(
            self.rank,
            world,
            master_addr,
            master_port,
            device=self.config.learner.device,
            listener=listener,
            timeout_s=self.config.ring.start_timeout_s,
        )
        from caprl_async.data.processor import PolicyProcessor

        policy = self.config.policy
        processor = PolicyProcessor(policy.model, policy.min_pixels, policy.max_pixels)
        self._trainer = self._make_trainer(processor, world)
        self._take_snapshot(self._version)
        parameters = sum(p.numel() for p in self._own.tensors.values()) if self._own else 0
        return {
            "rank": self.rank,
            "device": str(self._trainer.device),
            "parameters": parameters,
            "note": self._trainer.notice if self.rank == 0 else "",
        }

    def _make_trainer(self, processor: PolicyProcessor, world: int) -> Trainer:
        from caprl_async.replay.peer import LearnerPeer

        hello = Hello(role=Role.LEARNER, name=repr(self), incarnation=uuid.uuid4().hex)
        self._peer = LearnerPeer(self._hub, hello)
        return Trainer(self.config, processor, self.rank, world)

    def stop(self) -> None:
        """Leaves the hub, the weight group and the process group; safe to call twice.

        A step that waits for its batch gives up; one that computes is left to whoever ends the process.
        """
        self._stopping.set()
        if self._sender is not None:
            self._sender.close()
        if not self._stepping.acquire(timeout=_STOP_S):
            return
        try:
            if self._peer is not None:
                self._peer.close()
                self._peer = None
            self._trainer = None
            if dist.is_initialized():
                dist.destroy_process_group()
        finally:
            self._stepping.release()

    def health(self) -> dict[str, Any]:
        """A sign of life; a rank without `setup` is not ready."""
        return {
            "name": repr(self),
            "started": self._trainer is not None,
            "version": str(self._version),
            **whereabouts(),
        }

    # ------------------------------------------------------------ training

    def train_step(self, version: Version) -> StepReport:
        """Waits for the batch that leads on from `version`, trains on it and takes the new snapshot.

        Raises:
            RanksDisagree: the ranks did not get the same batch.
            LearnerStopped: while waiting.
            BadBatch, PixelsDiffer, NotFinite: from the trainer. The captions of a NotFinite are in
                `run_dir/not_finite/`.
        """
        with self._stepping:
            return self._step(version)

    def _step(self, version: Version) -> StepReport:
        trainer = self._ready()
        self._use_threads()
        asked = time.time()
        assert self._peer is not None
        batch = self._peer.request_batch(version, on_wait=self._check_stop)
        started = time.time()
        if not same_on_all_ranks(_fingerprint(batch), trainer.device):
            raise RanksDisagree(f"{self!r} at {version}: {_describe(batch)}; another rank has other groups")
        if batch is None:
            return StepReport(version, started, time.time(), started - asked, done=True)
        try:
            with doing(f"training {version}"):
                metrics = trainer.train(batch)
        except NotFinite as error:
            path = Path(self.config.run_dir) / "not_finite" / f"{version}-rank-{self.rank}.json"
            save_offenders(path, batch, error)
            raise NotFinite(f"{error}; these captions are in {path}", error.captions) from error
        after = Version(version.epoch, version.step + 1)
        metrics["snapshot_s"] = self._take_snapshot(after)
        advantages = tuple(_advantages(batch, trainer.advantages))
        return StepReport(after, started, time.time(), started - asked, metrics, advantages)

    def _take_snapshot(self, version: Version) -> float:
        """All ranks gather; rank 0 keeps this and the last one, which may still wait to be sent. Seconds."""
        began = time.perf_counter()
        trainer = self._ready()
        tensors = trainer.engine.gather(trainer.hf)
        if tensors is not None:
            self._before = self._own
            self._own = self._shown = Snapshot(version, checkpoint_tensors(trainer.hf, tensors))
        self._version = version
        return time.perf_counter() - began

    # ------------------------------------------------------------ weights for the engines

    def snapshot(self) -> tuple[Version, Mapping[str, Tensor]]:
        """Rank 0: version and tensors (CPU, checkpoint names) that the engines are to have; read-only.

        Raises:
            NoSnapshot: see there.
        """
        if self._shown is None:
            raise NoSnapshot(f"{self!r} has no snapshot; call `setup`, and ask rank 0")
        return self._shown.version, self._shown.tensors

    def open_weight_group(self, **info: Any) -> list[dict[str, Any]]:
        """Rank 0 opens a transfer group for the engines; arguments and answer are `WeightSender.open`'s."""
        from caprl_async.weights.sender import WeightSender

        if self._sender is None:
            self._sender = WeightSender(self._ready().device)
        return self._sender.open(**info)

    def send_weights(self, version: Version) -> float:
        """Rank 0 sends the snapshot of `version` to the open group, beside training. Seconds taken.

        Raises:
            NoSnapshot: that version is neither the one shown nor the last or the last but one of the run.
            TransferFailed: not every engine has it.
        """
        held = [s for s in (self._shown, self._own, self._before) if s is not None]
        wanted = next((s for s in held if s.version == version), None)
        if wanted is None or self._sender is None:
            have = ", ".join(str(s.version) for s in held) or "none"
            raise NoSnapshot(f"{self!r} cannot send {version}: it holds {have}; is the weight group open?")
        with doing(f"sending {version}"):
            return self._sender.send(wanted.version, wanted.tensors)

    def load_foreign(self, path: str) -> None:
        """Rank 0: shows another checkpoint of the same architecture to the engines; training is not touched.

        Raises:
            ForeignModelDiffers: it has other tensors than the policy.
        """
        own = self._own
        if own is None:
            raise NoSnapshot(f"{self!r} has no snapshot; call `setup`, and ask rank 0")
        model = load_policy(path, self.config.learner.dtype)
        tensors = checkpoint_tensors(model, {name: p.detach() for name, p in model.named_parameters()})
        check_same_shape(own.tensors, tensors, path)
        self._shown = Snapshot(FOREIGN, tensors)

    def restore_snapshot(self) -> None:
        """Back to the run's own newest weights."""
        self._shown = self._own

    def weights_fingerprint(self) -> dict[str, str]:
        """Rank 0: digest of each tensor of the snapshot by checkpoint name, to compare with an engine's."""
        _, tensors = self.snapshot()
        return {name: digest(tensor) for name, tensor in tensors.items()}

    # ------------------------------------------------------------ checkpoints

    def save(self, path: str) -> None:
        """Copies this rank's state and begins to write it below `path`, a folder that all nodes share.

        `path/trainer` (all ranks) is what `load` reads, `path/hf` (rank 0) a checkpoint for transformers;
        with LoRA `hf` is merged, and `path/adapter` holds the adapter alone.
        """
        trainer = self._ready()
        root = Path(path)
        with doing("copying its state"):
            (root / "trainer").mkdir(parents=True, exist_ok=True)
            dist.barrier()
            copied = trainer.engine.save(root / "trainer")
            adapter = trainer.engine.gather_weights(adapter_weights(trainer.hf))
        self._writer.write(root, copied, self._export(root, adapter))

    def _export(self, root: Path, adapter: dict[str, Tensor] | None) -> list[Export]:
        """What only rank 0 writes: folders, and who fills them."""
        exports: list[Export] = []
        trainer, own = self._ready(), self._own
        if own is not None:
            source = Path(self.config.policy.model)
            exports.append((root / "hf", lambda folder: export(trainer.hf, own, source, folder)))
        if adapter:
            exports.append((root / "adapter", lambda folder: save_adapter(trainer.hf, adapter, folder)))
        return exports

    def saved(self) -> Digests:
        """Waits until what the last `save` began is on the disk; size and sha256 of each file.

        Raises:
            OSError: it could not be written.
        """
        return self._writer.wait()

    def load(self, path: str, version: Version) -> None:
        """Goes back to what `save` wrote; the weights count as `version` from now on.

        Raises:
            FileNotFoundError: `path/trainer` has no state for this rank.
        """
        self._use_threads()
        self._ready().engine.load(Path(path) / "trainer")
        self._take_snapshot(version)

    def begin_again(self, version: Version) -> None:
        """The first weights, which a rank without any training has, count as `version` from now on."""
        self._take_snapshot(version)

    # ------------------------------------------------------------ inside

    def _ready(self) -> Trainer:
        if self._trainer is None:
            raise NoSnapshot(f"{self!r} is not set up; call `setup` first")
        return self._trainer

    def _check_stop(self) -> None:
        if self._stopping.is_set():
            raise LearnerStopped(f"{self!r} was stopped while it waited for a batch")

    def _use_threads(self) -> None:
        # OpenMP keeps the number per calling thread, and the actor runs each call in any of several.
        learner = self.config.learner
        if (learner.device == "cpu" or learner.offload_optimizer) and learner.threads > 0:
            torch.set_num_threads(learner.threads)


def _advantages(batch: TrainBatch, known: Mapping[str, float]) -> Iterator[tuple[float, ...]]:
    """Of every caption of every group; one that was left out has none to learn from: 0."""
    for scored in batch.groups:
        names = (caption_name(scored.group, i) for i in range(len(scored.group.captions)))
        yield tuple(known.get(name, 0.0) for name in names)


def _fingerprint(batch: TrainBatch | None) -> int:
    return zlib.crc32(_describe(batch).encode())


def _describe(batch: TrainBatch | None) -> str:
    if batch is None:
        return "no batch"
    return f"{batch.version} " + " ".join(f"{g.group.key}@{g.group.attempt}" for g in batch.groups)
