"""What does one weight sync cost, beside a plain copy of the same bytes? `python tools/bench_weights.py`.

The real path: a learner actor's snapshot, `WeightSync`, the backend, a vLLM engine in a rollout actor that
stages, checks and loads. The learner trains nothing and the engine has no requests. Measured for the tiny
policy and for a larger one of random weights (`--width`, `--layers`). *Plain copy* is of the same tensors, in
the learner's process: into memory that is there (`ratio` in the last line is the sync's seconds over these,
of the last model), and into fresh memory.

Other backends by name, on a machine with GPUs: `--backend nccl --device cuda --gpus 1`, and, engine and
learner on one GPU, `--backend ipc --device cuda --gpus 0.4`.

`--ipc-processes` measures the way of the ipc backend alone, between two processes and without vLLM or Ray:
one packs tensors into a buffer that the other has mapped, the other copies them into tensors of its own,
chunk after chunk. It needs nothing but torch: `--ipc-processes --parameters 3e9 --device cuda` on one GPU
(about 20 GB of its memory); on the CPU the buffer is shared memory, and each process has one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from caprl_async.config import Config

Figures = dict[str, float]


def timed(work: Callable[[], Any], settle: Callable[[], Any] = lambda: None) -> float:
    """Seconds; `settle` waits for what the device still has to do."""
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def means(rounds: Sequence[Figures]) -> Figures:
    """Of each figure, over the rounds."""
    return {key: statistics.fmean(one[key] for one in rounds) for key in rounds[0]}


# ---------------------------------------------------------------- the real path


def actors() -> tuple[type, type]:
    """The ring's learner and rollout, with clocks; made here because importing Ray and torch takes long."""
    from caprl_async.learner.actor import LearnerActor
    from caprl_async.rollout.actor import RolloutActor
    from caprl_async.types import Version
    from caprl_async.weights.packed import checksum, pack

    class Learner(LearnerActor):
        def take(self, step: int) -> float:
            return self._take_snapshot(Version(0, step))

        def copies(self) -> Figures:
            """Seconds of plain copies of the snapshot, and of what the sender does before it sends."""
            self._use_threads()
            tensors = list(self.snapshot()[1].values())
            there = [tensor.clone() for tensor in tensors]
            _, buffer = pack(self.snapshot()[1])
            check = timed(lambda: checksum(buffer))
            return {
                "bytes": float(sum(tensor.nbytes for tensor in tensors)),
                "copy": timed(lambda: [a.copy_(b) for a, b in zip(there, tensors, strict=True)]),
                "copy_fresh": timed(lambda: [tensor.clone() for tensor in tensors]),
                "checksum": check,
                "pack": timed(lambda: pack(self.snapshot()[1])) - check,
            }

    class Rollout(RolloutActor):
        async def receive_weights(self, *, version: str, **info: Any) -> Figures:
            self.last = await super().receive_weights(version=version, **info)
            return self.last

        async def last_update(self) -> Figures:
            return self.last

    return Learner, Rollout


def configuration(model: str, args: argparse.Namespace) -> Config:
    """The demo's, with this policy and backend; on GPUs with an engine's usual settings."""
    from caprl_async import conf

    keys = ["conf=conf/demo.yaml", f"policy.model={model}", f"weights.backend={args.backend}"]
    if args.device == "cuda":
        keys += [f"ring.gpus_per_{who}={args.gpus}" for who in ("learner", "rollout", "judge")]
        engines = ("rollout.engine", "judge.engine")
        keys += [f"{engine}.{key}" for engine in engines for key in ("in_process=false", "block_size=null")]
        keys += ["learner.device=cuda", "learner.dtype=bfloat16", "rollout.engine.dtype=bfloat16"]
        keys += [f"rollout.engine.gpu_memory_utilization={0.8 * min(args.gpus, 1.0)}"]
    return conf.load([*keys, *args.overrides])


def sync_times(model: str, args: argparse.Namespace) -> Figures:
    """Mean seconds of `rounds` syncs of a model's weights, after one that does not count.

    Raises:
        SystemExit: a sync failed.
    """
    import ray
    import zmq

    from caprl_async.replay.transport import HubAddress
    from caprl_async.types import Version
    from caprl_async.weights.sync import WeightSync

    config = configuration(model, args)
    learner_class, rollout_class = actors()
    public, secret = zmq.curve_keypair()
    nobody = HubAddress(
        endpoint="tcp://127.0.0.1:9", server_key=public, client_key=public, client_secret=secret
    )
    place: Any = {"num_cpus": 0.1, "num_gpus": args.gpus if args.device == "cuda" else 0}
    learner: Any = ray.remote(learner_class).options(max_concurrency=4, **place).remote(0, config, nobody)
    names = [f"rollout-{i}" for i in range(args.engines)]
    engines: Any = {n: ray.remote(rollout_class).options(**place).remote(n, config, nobody) for n in names}
    try:
        host, port = ray.get(learner.rendezvous.remote())
        ray.get(
            [learner.setup.remote(1, host, port), *(engine.start.remote() for engine in engines.values())]
        )
        sync = WeightSync(config.weights, learner, engines, address=host)
        failed = sync.open()
        if failed:
            raise SystemExit(f"no weight group: {failed}")
        rounds = []
        for step in range(1, args.rounds + 2):
            snapshot = ray.get(learner.take.remote(step))
            report = sync.publish(Version(0, step))
            if not report.announced:
                raise SystemExit(f"the weights were not taken: {report}")
            updates = ray.get([engine.last_update.remote() for engine in engines.values()])
            slowest = max(updates, key=lambda update: update["total"])
            parts = {f"engine_{phase}": seconds for phase, seconds in slowest.items()}
            copies = ray.get(learner.copies.remote())
            total = snapshot + report.seconds
            rounds.append(
                {"total": total, "snapshot": snapshot, "publish": report.seconds, **parts, **copies}
            )
        sync.close()
    finally:
        for actor in (learner, *engines.values()):
            ray.kill(actor)
    return rates(means(rounds[1:]))


def rates(mean: Figures) -> Figures:
    """The same with bytes per second, and how many times as long as a plain copy it took."""
    speeds = {"bytes_per_s": mean["bytes"] / mean["total"], "copy_bytes_per_s": mean["bytes"] / mean["copy"]}
    return {**mean, **speeds, "ratio": mean["total"] / mean["copy"]}


def random_policy(folder: Path, width: int, layers: int) -> str:
    """A captioner of random weights in the tiny world's words; its folder."""
    from caprl_async.tiny.models import new_policy, save_model

    save_model(new_policy(width, layers), folder, vision=True)
    return str(folder)


_SYNC = {
    "total": "one sync",
    "snapshot": "learner: gathers its snapshot",
    "publish": "publish: send, receive, load",
    "pack": "of it, sender: packs one buffer (measured apart)",
    "checksum": "of it, either side: checksum (measured apart)",
    "engine_total": "engine stands still",
    "engine_wait": "of it waits for the sender",
    "engine_transfer": "of it transfer and check",
    "engine_load": "of it loads",
    "engine_reset": "of it resets caches",
    "copy": "plain copy, into memory that is there",
    "copy_fresh": "plain copy, into fresh memory",
}


def run_sync(args: argparse.Namespace) -> dict[str, Any]:
    """The tiny policy, then the larger one; prints the table."""
    from caprl_async import conf
    from caprl_async.ring import cluster

    config = conf.load(["conf=conf/demo.yaml"])
    config.ring.object_store_mb = 256
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"tiny policy": config.policy.model}
        if args.width:
            models["larger"] = random_policy(Path(folder) / "larger", args.width, args.layers)
        cluster.connect(config.ring, log_level="WARNING")
        try:
            for name, model in models.items():
                found[name] = sync_times(model, args)
        finally:
            cluster.disconnect()
    show(f"one weight sync by {args.backend} to {args.engines} engine(s), milliseconds", _SYNC, found)
    for name, one in found.items():
        print(
            f"{name}: {one['bytes'] / 1e6:.1f} MB; sync {one['bytes_per_s'] / 1e9:.3f} GB/s, plain copy "
            f"{one['copy_bytes_per_s'] / 1e9:.3f} GB/s; {one['ratio']:.1f} times as long"
        )
    *_, last = found.values()
    return {**vars(args), "models": found, "ratio": last["ratio"]}


# ---------------------------------------------------------------- the ipc way alone


_IPC = {
    "total": "transfer between two processes",
    "from_snapshot": "the same from a snapshot in host memory",
    "copy": "plain copy, into memory that is there",
}


def shapes(parameters: int) -> list[tuple[int, ...]]:
    """Shapes of that many parameters in all, in the proportions of a 3B Qwen2.5 of 36 layers."""
    width = max(8, int(math.sqrt(parameters / 36 / 18.4)))
    layer: list[tuple[int, ...]] = [(width, width), (width // 8, width), (width // 8, width), (width, width)]
    layer += [(5 * width, width), (5 * width, width), (width, 5 * width), (width,), (width,)]
    found: list[tuple[int, ...]] = []
    left = parameters
    while left >= sum(map(math.prod, layer)):
        found += layer
        left -= sum(map(math.prod, layer))
    rows = left // width
    return [*found, *([(rows, width)] if rows else []), *([(left % width,)] if left % width else [])]


def chunks(sizes: Sequence[int], capacity: int) -> list[range]:
    """Consecutive tensors that fit into one buffer, as vLLM's packing chooses them.

    Raises:
        ValueError: one tensor alone does not fit.
    """
    if max(sizes) > capacity:
        raise ValueError(f"a tensor of {max(sizes)} bytes, a buffer of {capacity}")
    found, start, used = [], 0, 0
    for i, size in enumerate(sizes):
        if used + size > capacity:
            found.append(range(start, i))
            start, used = i, 0
        used += size
    return [*found, range(start, len(sizes))]


def _new(args: argparse.Namespace, fill: bool) -> list[Tensor]:
    import torch

    dtype = getattr(torch, args.dtype)
    make = torch.randn if fill else torch.zeros
    return [make(shape, dtype=dtype, device=args.device) for shape in shapes(int(args.parameters))]


def _settle(device: str) -> Callable[[], None]:
    """What waits for the device. Two processes of many threads each would fight over the CPU's cores."""
    import torch

    if device == "cuda":
        return torch.cuda.synchronize
    torch.set_num_threads(1)
    return lambda: None


def _pieces(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of the buffer with the shapes of the tensors, one after the other."""
    parts = buffer[: sum(t.nbytes for t in tensors)].split([t.nbytes for t in tensors])
    return [part.view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _digest(tensors: Sequence[Tensor]) -> list[float]:
    return [float(tensor.double().sum()) for tensor in tensors]


def receiver(args: argparse.Namespace, buffers: Any, line: Any) -> None:
    """The other process: copies each chunk into its own tensors, answers, and at the end shows their sums."""
    settle, tensors, buffer = _settle(args.device), _new(args, fill=False), buffers.get()
    line.send("ready")
    while (chunk := line.recv()) is not None:
        mine = [tensors[i] for i in chunk]
        for target, piece in zip(mine, _pieces(buffer, mine), strict=True):
            target.copy_(piece)
        settle()
        line.send("taken")
    line.send(_digest(tensors))
    line.recv()  # the buffer belongs to the sender: it goes last


def run_ipc(args: argparse.Namespace) -> dict[str, Any]:
    """This process sends; prints the table.

    Raises:
        SystemExit: the other process has other weights afterwards.
    """
    import torch
    import torch.multiprocessing as multiprocessing

    settle, tensors = _settle(args.device), _new(args, fill=True)
    sizes = [tensor.nbytes for tensor in tensors]
    buffer = torch.empty(max(int(args.buffer_gib * 2**30), max(sizes)), dtype=torch.uint8, device=args.device)
    if args.device == "cpu":
        buffer.share_memory_()
    plan = chunks(sizes, buffer.numel())
    context = multiprocessing.get_context("spawn")
    line, theirs = context.Pipe()
    buffers = context.Queue()
    process = context.Process(target=receiver, args=(args, buffers, theirs), daemon=True)
    process.start()
    buffers.put(buffer)
    line.recv()

    def send(source: Sequence[Tensor]) -> None:
        for chunk in plan:
            mine = [source[i] for i in chunk]
            for piece, tensor in zip(_pieces(buffer, mine), mine, strict=True):
                piece.copy_(tensor)
            settle()  # the other process does not see this one's stream
            line.send(list(chunk))
            line.recv()

    sources = {"total": tensors}
    if args.device == "cuda":
        sources["from_snapshot"] = [tensor.cpu() for tensor in tensors]
    there = [torch.empty_like(tensor) for tensor in tensors]
    rounds = []
    for _ in range(args.rounds + 1):
        one = {name: timed(partial(send, source), settle) for name, source in sources.items()}
        one["copy"] = timed(lambda: [a.copy_(b) for a, b in zip(there, tensors, strict=True)], settle)
        rounds.append(one)
    line.send(None)
    same = line.recv() == _digest(tensors)
    line.send(None)
    process.join()
    if not same:
        raise SystemExit("the other process has other weights")
    mean = means(rounds[1:])
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, shared memory"
    title = f"{sum(t.numel() for t in tensors):,} parameters in {args.dtype}, {len(plan)} chunk(s), {device}"
    show(f"{title}; milliseconds; vLLM is not in the measurement", _IPC, {"ipc": mean})
    about = {"vllm": False, "device_name": device, "chunks": len(plan)}
    return {**vars(args), **about, **rates({**mean, "bytes": float(sum(sizes))})}


# ---------------------------------------------------------------- the command


def show(title: str, names: dict[str, str], columns: dict[str, Figures]) -> None:
    """Seconds as milliseconds: a row a figure, a column a model."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *columns)
    for key, name in names.items():
        if all(key in values for values in columns.values()):
            table.add_row(name, *(f"{1000 * values[key]:.2f}" for values in columns.values()))
    console = Console(width=130)
    console.print(title)
    console.print(table)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("gloo", "nccl", "ipc"), default="gloo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpus", type=float, default=1.0, help="cuda: GPUs of each actor, or a share of one")
    parser.add_argument("--engines", type=int, default=1, help="rollout actors")
    parser.add_argument("--rounds", type=int, default=5, help="syncs that count")
    parser.add_argument("--width", type=int, default=768, help="of the larger model, times 32; 0: tiny alone")
    parser.add_argument("--layers", type=int, default=12, help="of the larger model")
    parser.add_argument("--ipc-processes", action="store_true", help="the ipc way alone; see above")
    parser.add_argument("--parameters", type=float, default=1e8, help="ipc processes: as 3e9")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="ipc processes")
    parser.add_argument("--buffer-gib", type=float, default=1.0, help="ipc processes: as vLLM's")
    parser.add_argument("overrides", nargs="*", help="conf keys, key=value")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    print(json.dumps(run_ipc(args) if args.ipc_processes else run_sync(args)))


if __name__ == "__main__":
    main()
