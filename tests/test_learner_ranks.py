"""Real DeepSpeed ranks over gloo: any number of ranks and any ZeRO stage train to the same weights."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from learner_kit import images, make_batch, tiny_config, tiny_processor
from safetensors.torch import load_file, save_file

from caprl_async.config import KLConfig, KLPlace, LearnerConfig, LoRAConfig
from caprl_async.types import TrainBatch, Version

pytestmark = pytest.mark.slow

STEPS = 3
LORA = LoRAConfig(rank=4, alpha=8)
SMALL = {"micro_batch_tokens": 80}  # several micro-batches per rank
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl in the reward": {"kl": KLConfig(coef=0.05, place=KLPlace.reward)},
    "frozen vision": {"freeze_vision": True},
    "projector alone": {"train_only": ["visual.merger"]},
    "lora": {"lora": LORA, "kl": KLConfig(coef=0.05)},
    "bf16": {"dtype": "bfloat16"},
}
"""What one rank trains, at ZeRO 0 and in one micro-batch."""
OFFLOAD = {"offload_optimizer": True, **SMALL}
CHECKPOINTING = {"gradient_checkpointing": True, **SMALL}
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("plain", "zero0"): SMALL,
    ("plain", "zero1-offload"): {"zero_stage": 1, **OFFLOAD},
    ("plain", "zero2-offload"): {"zero_stage": 2, **OFFLOAD},
    ("plain", "zero3"): {"zero_stage": 3, "logprob_chunk": 16, **SMALL},
    ("plain", "zero3-offload-checkpointing"): {"zero_stage": 3, **OFFLOAD, **CHECKPOINTING},
    ("kl in the reward", "zero1"): {"zero_stage": 1, **SMALL},
    ("frozen vision", "zero2"): {"zero_stage": 2, **SMALL},
    ("frozen vision", "zero3-checkpointing"): {"zero_stage": 3, **CHECKPOINTING},
    ("projector alone", "zero3-checkpointing"): {"zero_stage": 3, **CHECKPOINTING},
    ("lora", "zero0-checkpointing"): CHECKPOINTING,
    ("lora", "zero2-offload"): {"zero_stage": 2, **OFFLOAD},
    ("lora", "zero3-checkpointing"): {"zero_stage": 3, **CHECKPOINTING},
    ("bf16", "zero1"): {"zero_stage": 1},
    ("bf16", "zero3-offload"): {"zero_stage": 3, **OFFLOAD},
}
"""What two ranks train: (the same as which of `ALONE`, how)."""


METRICS = ("loss", "grad_norm", "ratio_max", "importance_mean", "logprob_gap_p99", "entropy", "kl")

Tensors = dict[str, torch.Tensor]


def batches(folder: Path, processor: Any) -> list[TrainBatch]:
    refs = images(folder, 4)
    return [
        make_batch(processor, refs, 3, seed=step, lengths=(2, 12), version=Version(0, step))
        for step in range(STEPS)
    ]


def partition_all() -> None:
    """ZeRO-3 keeps small weights whole, and the tiny policy has hardly any others."""
    from caprl_async.learner import engine

    plain = engine.deepspeed_config

    def partitioned(config: LearnerConfig) -> dict[str, Any]:
        found = plain(config)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    engine.deepspeed_config = partitioned


def train_rank(rank: int, world: int, port: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    from caprl_async.learner.engine import join_group, prepare

    torch.set_num_threads(1)
    prepare("cpu")
    join_group(rank, world, "127.0.0.1", port, device="cpu", listener=None, timeout_s=120)
    partition_all()
    from caprl_async.learner.trainer import Trainer

    processor = tiny_processor()
    pixels = Path(folder) / f"images-{world}-{rank}"
    pixels.mkdir()
    trained_on = batches(pixels, processor)
    for name, learner in cases.items():
        trainer = Trainer(tiny_config(warmup_steps=1, **learner), processor, rank, world)
        found = [trainer.train(batch) for batch in trained_on]
        assert all(m["micro_batches"] > 1 for m in found) == ("micro_batch_tokens" in learner)
        tensors = trainer.engine.gather(trainer.hf)
        if tensors is not None:
            metrics = {
                f"metric/{key}": torch.tensor([m[key] for m in found], dtype=torch.float64) for key in METRICS
            }
            save_file({**tensors, **metrics}, Path(folder) / f"{name}.safetensors")
        else:
            assert rank > 0
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    folder = tmp_path_factory.mktemp("ranks")
    shared = {f"{base}, {how}": {**ALONE[base], **learner} for (base, how), learner in CASES.items()}
    mp.spawn(train_rank, (1, free_port(), str(folder), ALONE), nprocs=1)
    mp.spawn(train_rank, (2, free_port(), str(folder), shared), nprocs=2)
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def start() -> Tensors:
    from caprl_async.learner.model import load_policy

    model = load_policy(tiny_config().policy.model, "float32")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(one: Tensors, other: Tensors) -> float:
    """Between all weights of two models."""
    weights = [name for name in one if not name.startswith("metric/")]
    return math.sqrt(sum((one[n].double() - other[n].double()).square().sum().item() for n in weights))


@pytest.mark.parametrize(("base", "how"), CASES)
def test_weights_and_metrics_equal_those_of_one_rank(
    trained: dict[str, Tensors], start: Tensors, base: str, how: str
) -> None:
    alone, found = trained[base], trained[f"{base}, {how}"]
    assert alone.keys() == found.keys()
    exact = base != "bf16"
    for name in (f"metric/{key}" for key in METRICS):
        rtol, atol = (2e-3, 1e-6) if exact else (0.1, 1e-3)
        # Without a reference the KL is NaN.
        torch.testing.assert_close(
            found[name], alone[name], rtol=rtol, atol=atol, equal_nan=True, msg=f"{base}, {how} {name}"
        )
    far = distance(found, alone) / distance(start, alone)
    print(f"{base}, {how}: {far:.1e} of the way apart")
    assert far < (1e-3 if exact else 0.2)


def changed(found: Tensors, start: Tensors) -> set[str]:
    return {name for name, tensor in start.items() if not torch.equal(found[name], tensor)}


@pytest.mark.parametrize("case", ["plain, zero3", "plain, zero3-offload-checkpointing"])
def test_everything_is_trained(trained: dict[str, Tensors], start: Tensors, case: str) -> None:
    assert changed(trained[case], start) == start.keys()
    for name in ("lm_head.weight", "model.visual.patch_embed.proj.weight"):
        assert (trained[case][name] - start[name]).abs().max() > 5e-4


def test_a_frozen_vision_tower_stays(trained: dict[str, Tensors], start: Tensors) -> None:
    moved = changed(trained["frozen vision, zero3-checkpointing"], start)
    assert moved == {name for name in start if not name.startswith("model.visual.")}


def test_of_a_model_that_is_frozen_around_it_the_projector_is_trained(
    trained: dict[str, Tensors], start: Tensors
) -> None:
    moved = changed(trained["projector alone, zero3-checkpointing"], start)
    assert moved == {name for name in start if "visual.merger" in name}


@pytest.mark.parametrize("case", ["lora", "lora, zero2-offload", "lora, zero3-checkpointing"])
def test_adapters_change_the_language_models_linear_layers_by_low_ranks(
    trained: dict[str, Tensors], start: Tensors, case: str
) -> None:
    found = trained[case]
    assert changed(found, start) == {
        name for name in start if "language_model" in name and name.endswith("_proj.weight")
    }
    for name in changed(found, start):
        moved = found[name].double() - start[name].double()
        assert moved.abs().max() > 1e-4
        assert torch.linalg.matrix_rank(moved, rtol=1e-3) <= LORA.rank, "the base has moved too"
    assert found["metric/kl"][0] == 0.0, "the reference is not the base"
    assert found["metric/kl"][-1] > 0.0
