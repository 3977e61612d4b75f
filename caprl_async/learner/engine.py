"""DeepSpeed around the policy: process group, ZeRO, optimizer, exact accumulation, checkpoints."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from caprl_async.config import LearnerConfig
from caprl_async.learner.lora import Weight, merged_weights
from caprl_async.learner.saving import Copied, memory_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_TAG = "state"


class GradientNotFinite(FloatingPointError):
    """The norm of the gradient is NaN or infinite; the optimizer has not moved."""


def learning_rate(step: int, steps: int, config: LearnerConfig) -> float:
    """Rate of batch `step` (from 0) of `steps`: linear warm-up, then cosine down to `min_lr_ratio * lr`.

    A function of the step alone, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


def zero_stage(config: LearnerConfig) -> int:
    """The ZeRO stage that runs. DeepSpeed sums bfloat16 gradients in float32 only from stage 1 on."""
    return max(1, config.zero_stage) if config.dtype == "bfloat16" else config.zero_stage


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration. It must not divide: the loss comes with one global normaliser."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": config.device == "cuda"}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": zero_stage(config),
            "overlap_comm": config.device == "cuda",
            # Gathered for a checkpoint by the learner itself, parameter by parameter.
            "stage3_gather_16bit_weights_on_model_save": False,
            **(offload if config.offload_optimizer else {}),
        },
        # Torch's AdamW works on the CPU as well; DeepSpeed's own needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
    }


def prepare(device: str) -> None:
    """Must run before DeepSpeed is imported: it looks for its accelerator, and for a compiler, on import."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    # Else DeepSpeed compiles its shared-memory collectives on first use; gloo's do as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.utils import logger

    logger.setLevel("ERROR")


def join_group(
    rank: int, world: int, host: str, port: int, *, device: str, listener: int | None, timeout_s: float
) -> None:
    """Makes the default process group of the learner ranks; DeepSpeed takes it over.

    `listener` is rank 0's socket, already listening on (host, port): torch's own would listen on every
    interface of the node. On loopback, gloo's connections stay on loopback too.
    """
    if host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        host,
        port,
        world,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
        wait_for_workers=False,
    )
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=timeout
    )


class TrainEngine:
    """One rank of DeepSpeed around a module. Every method is collective: all ranks call it, in one order."""

    def __init__(self, module: nn.Module, config: LearnerConfig) -> None:
        """Needs `prepare` and `join_group`. What needs gradients in the module is trained."""
        import deepspeed

        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=trainable,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self.stage = zero_stage(config)
        self.world = dist.get_world_size()
        self.device = torch.device(self._engine.device)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, batch: Any) -> Any:
        return self._engine(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this rank's part of the loss; with `last` the ranks' gradients are summed."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; our parts of the loss add up.
        self._engine.backward(loss * self.world)

    def step(self, lr: float) -> float:
        """Moves the optimizer once; returns the gradient's global norm before clipping.

        Raises:
            GradientNotFinite: see there.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._plain_norm() if self.stage == 0 else None
        if norm is not None:
            self._check(norm)
        self._engine.step()
        if norm is None:
            # ZeRO knows the norm of its parts only here; it has left the step out if that is not finite.
            norm = float(self._engine.get_global_grad_norm())
            self._check(norm)
        return norm

    def _plain_norm(self) -> float:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _check(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise GradientNotFinite(f"the norm of the gradient is {norm}")

    def gather(self, module: nn.Module) -> dict[str, Tensor] | None:
        """Copies of all parameters of a submodule by name, in rank 0's host memory; None on the other ranks.

        Adapters are merged into what they adapt.
        """
        return self.gather_weights(merged_weights(module))

    def gather_weights(self, weights: Iterable[Weight]) -> dict[str, Tensor] | None:
        """Their values by name, in rank 0's host memory; None on the other ranks."""
        keep = dist.get_rank() == 0
        copies: dict[str, Tensor] = {}
        for weight in weights:
            with self._whole(weight.parts):
                if keep:
                    copies[weight.name] = weight.value()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copies if keep else None

    @contextmanager
    def _whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # what is gathered goes, copies of it may be under way

    def save(self, folder: Path) -> list[Copied]:
        """Copies of this rank's parts of parameters and optimizer, and of its random state: to be written."""
        memory = memory_engine()
        ours, self._engine.checkpoint_engine = self._engine.checkpoint_engine, memory
        try:
            self._engine.save_checkpoint(str(folder), tag=_TAG)
        finally:
            self._engine.checkpoint_engine = ours
        return [*memory.files, Copied(folder / f"rng-{dist.get_rank()}.pt", _rng_state())]

    def load(self, folder: Path) -> None:
        """Inverse of `save`, with the same number of ranks and the same ZeRO stage.

        Raises:
            FileNotFoundError: the folder holds no state of this rank.
        """
        rng = folder / f"rng-{dist.get_rank()}.pt"
        if not rng.is_file():
            raise FileNotFoundError(f"{folder} holds no learner state of rank {dist.get_rank()}")
        self._engine.load_checkpoint(str(folder), tag=_TAG)
        _set_rng_state(torch.load(rng, weights_only=True))

    def close(self) -> None:
        self._engine.destroy()


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates [k, T_r] over the ranks to [k, sum of T_r]; ranks may differ in T."""
    world = dist.get_world_size()
    if world == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([rows.shape[1]], device=rows.device))
    widest = int(max(sizes))
    padded = nn.functional.pad(rows, (0, widest - rows.shape[1])).contiguous()
    everyone = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:, : int(size)] for part, size in zip(everyone, sizes, strict=True)], dim=1)


def same_on_all_ranks(value: int, device: torch.device) -> bool:
    """Whether every rank calls this with the same number."""
    mine = torch.tensor([value, -value], device=device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return int(mine[0]) == -int(mine[1])


def ranks_where(flag: bool, device: torch.device) -> list[int]:
    """The ranks that call this with True."""
    mine = torch.tensor([int(flag)], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [rank for rank, value in enumerate(everyone) if int(value)]
