"""Estimates of a plan: against measurements, against torch's own counter, and what a user is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async import conf
from caprl_async.jobs.plan import learning_of
from caprl_async.planning.estimate import Learning, best_split, engine_gib, learner_gib, split
from caprl_async.planning.model import Shape, read_shape
from caprl_async.run import main

TINY = Path("caprl_async/tiny/models")

QWEN_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text", "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
"""The sizes of Qwen2.5-VL-3B."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen")
    (made / "config.json").write_text(json.dumps(QWEN_3B))
    return made


@pytest.fixture(scope="module")
def shape(folder: Path) -> Shape:
    return read_shape(folder)


def test_the_shape_of_a_checkpoint_without_weights(shape: Shape) -> None:
    assert shape.parameters == pytest.approx(3.75e9, rel=0.01)
    assert shape.tower == pytest.approx(0.67e9, rel=0.02)
    assert shape.text == pytest.approx(3.09e9, rel=0.01), "tied: the output layer is a text token's too"
    assert shape.cache_bytes() == 36 * 2 * 2 * 128 * 2
    assert shape.image_tokens(1_000_000) == 1276


@pytest.mark.parametrize("model", ["policy", "judge"])
def test_parameters_are_those_of_the_file(model: str) -> None:
    from safetensors import safe_open

    with safe_open(TINY / model / "model.safetensors", "pt") as weights:
        counted = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert read_shape(TINY / model).parameters == counted


def test_operations_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "judge", attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, 200, dtype=torch.long))
    assert read_shape(TINY / "judge").forward(200, 200) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "measured"),
    [(14_784, True, 77), (9_856, False, 131)],
)
def test_memory_of_the_learner_is_near_what_was_measured(
    tokens: int, checkpointing: bool, measured: float, shape: Shape
) -> None:
    how = Learning(
        ranks=1, zero_stage=1, bytes_per_parameter=2, offload=False, adapters=0,
        checkpointing=checkpointing, micro_batch_tokens=tokens, logprob_chunk=1024,
    )  # fmt: skip
    assert learner_gib(shape, how) == pytest.approx(measured, rel=0.08)


def test_what_saves_memory_does(shape: Shape) -> None:
    def gib(**changes: Any) -> float:
        how: dict[str, Any] = {
            "ranks": 8, "zero_stage": 1, "bytes_per_parameter": 2, "offload": False, "adapters": 0,
            "checkpointing": True, "micro_batch_tokens": 8192, "logprob_chunk": 1024,
        }  # fmt: skip
        return learner_gib(shape, Learning(**{**how, **changes}))

    stages = [gib(zero_stage=stage) for stage in (0, 1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    assert gib(ranks=1) > gib(ranks=8)
    assert gib(offload=True, ranks=1) < gib(ranks=1)
    assert gib(adapters=10_000_000) < gib()
    assert engine_gib(shape, 1e5, 2) < engine_gib(shape, 1e5, 1)


@given(
    st.integers(3, 14),
    st.tuples(*[st.floats(0.1, 100)] * 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
)
def test_no_other_split_is_faster(total: int, alone: tuple[float, ...], units: tuple[int, ...]) -> None:
    roles = ("rollout", "judge", "learner")
    seconds, sizes = dict(zip(roles, alone, strict=True)), dict(zip(roles, units, strict=True))
    every = [
        split(dict(zip(roles, counts, strict=True)), seconds).batch_s
        for counts in itertools.product(*(range(unit, total + 1, unit) for unit in units))
        if sum(counts) <= total
    ]
    found = best_split(total, sizes, seconds)
    assert (found is None) == (not every)
    if found is not None:
        assert found.batch_s == pytest.approx(min(every))
        assert sum(found.gpus.values()) <= total
        assert found.seconds[found.bottleneck] == found.batch_s


def test_a_plan_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [f"policy.model={folder}", f"judge.model={TINY / 'judge'}"]
    asked = ["conf=conf/qwen2_5_vl_3b.yaml", "job=plan", *models]
    assert main([*asked, "plan.gpu=h200", "plan.gpus=16"]) == 0
    told = capsys.readouterr().out
    for word in ("learner", "bottleneck", "best of 16", "captions per second", "weight sync", "fits"):
        assert word in told
    assert main([*asked, "plan.gpu=a10g"]) == 2
    error = capsys.readouterr().err
    assert "a10g has 22 GiB" in error
    assert "learner needs" in error
    assert "learner.gradient_checkpointing" in error
    assert main([*asked, "policy.model=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_roles_that_share_a_gpu_are_added_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [f"policy.model={folder}", f"judge.model={folder}", "rollout.num_actors=1", "judge.num_actors=1"]
    shares = [f"ring.gpus_per_{role}=0.3" for role in ("rollout", "judge", "learner")]
    small = ["learner.gradient_checkpointing=true", "learner.micro_batch_tokens=4096", "learner.lora.rank=8"]
    asked = ["conf=conf/qwen2_5_vl_3b.yaml", "job=plan", *models, *shares, *small, "learner.lr=1e-4"]
    assert main([*asked, "plan.gpu=h200"]) == 0
    assert "0.3 GPUs" in capsys.readouterr().out
    assert main([*asked, "plan.gpu=a10g", "learner.offload_optimizer=true"]) == 2
    assert "rollout, judge, learner share GPUs" in capsys.readouterr().err


def test_a_reference_for_the_kl_takes_memory(folder: Path) -> None:
    base = ["conf=conf/qwen2_5_vl_3b.yaml", f"policy.model={folder}", f"judge.model={folder}", "job=plan"]
    shape = read_shape(folder)
    plain, held = (
        learner_gib(shape, learning_of(conf.load([*base, f"learner.kl.coef={coef}"]), shape))
        for coef in (0.0, 0.01)
    )
    assert held - plain == pytest.approx(2 * shape.parameters / 2**30)


def test_a_conf_without_gpus_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conf=conf/demo.yaml", "job=plan"]) == 0
    assert "runs on CPUs" in capsys.readouterr().out
