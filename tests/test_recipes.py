"""The recipes for real models: each resolves, and by the models' sizes fits the hardware that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_planning import QWEN_3B

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.jobs.plan import memory_of, work_of
from caprl_async.planning.estimate import GPUS
from caprl_async.planning.model import read_shape

QWEN25_JUDGE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3_JUDGE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 262144,
}  # fmt: skip
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "text_config": {
        **{name: value for name, value in QWEN3_JUDGE.items() if name != "architectures"},
        "model_type": "qwen3_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
        "num_heads": 16, "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders as checkpoints have them, without the weights themselves, and a file where data would be."""
    made = tmp_path_factory.mktemp("models")
    found = {}
    models = {
        "qwen25_vl": {**QWEN_3B, "image_token_id": 151655},
        "qwen25": QWEN25_JUDGE,
        "qwen3_vl": QWEN3_4B,
        "qwen3": QWEN3_JUDGE,
    }
    for name, config in models.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(config))
        (made / name / "model.safetensors").touch()
        found[name] = str(made / name)
    (made / "data.parquet").touch()
    return {**found, "data": str(made / "data.parquet")}


def load(name: str, given: dict[str, str], policy: str, judge: str, *more: str) -> Config:
    return conf.load(
        [
            f"conf=conf/{name}.yaml",
            f"policy.model={given[policy]}",
            *([f"judge.model={given[judge]}"] if judge else []),
            *more,
        ]
    )


@pytest.mark.parametrize(
    ("name", "policy", "judge", "gpu"),
    [("qwen2_5_vl_3b", "qwen25_vl", "qwen25", "h200"), ("qwen3_vl_4b", "qwen3_vl", "qwen3", "h100")],
)
def test_a_recipe_resolves_and_fits_its_gpus(
    name: str, policy: str, judge: str, gpu: str, given: dict[str, str]
) -> None:
    config = load(name, given, policy, judge, f"data.train={given['data']}")
    captioner, reader = read_shape(Path(given[policy])), read_shape(Path(given[judge]))
    memory = memory_of(config, captioner, reader, work_of(config, captioner))
    assert set(memory) == {"rollout", "judge", "learner"}
    assert max(memory.values()) < GPUS[gpu].memory_gib


def test_the_sizes_are_those_of_the_models_names(given: dict[str, str]) -> None:
    assert read_shape(Path(given["qwen3_vl"])).parameters == pytest.approx(4.44e9, rel=0.01)
    assert read_shape(Path(given["qwen3"])).parameters == pytest.approx(4.02e9, rel=0.01)
    assert read_shape(Path(given["qwen25"])).parameters == pytest.approx(3.09e9, rel=0.01)


def test_capRLs_image_recipe_is_the_published_one(given: dict[str, str]) -> None:
    config = load("qwen2_5_vl_3b", given, "qwen25_vl", "qwen25", f"data.train={given['data']}")
    assert (config.rollout.group_size, config.replay.batch_groups, config.steps) == (8, 128, 1800)
    learner = config.learner
    assert (learner.lr, learner.warmup_steps, learner.betas, learner.grad_norm) == (
        1e-6,
        20,
        [0.9, 0.95],
        1.0,
    )
    assert (config.rollout.max_tokens, config.policy.max_pixels) == (4096, 1_000_000)


def test_capRL_plus_plus_is_the_published_one(given: dict[str, str]) -> None:
    config = load("qwen3_vl_4b", given, "qwen3_vl", "qwen3", f"data.train={given['data']}")
    reward, learner = config.reward, config.learner
    assert (reward.accuracy, reward.length, reward.length_free, reward.length_max) == (1.0, 0.2, 2048, 3072)
    assert (learner.advantage.kind.name, learner.aggregation.name, learner.kl.coef) == (
        "rloo",
        "sequence_mean",
        0,
    )
    assert (learner.lr, learner.warmup_steps) == (1e-5, 20)


def test_capRL_plus_plus_goes_on_with_videos(given: dict[str, str]) -> None:
    config = load("qwen3_vl_4b_video", given, "qwen3_vl", "qwen3", f"data.train={given['data']}")
    reward = config.reward
    assert (reward.accuracy, reward.format, reward.length) == (1.0, 0.2, 0.2)
    captioner, reader = read_shape(Path(given["qwen3_vl"])), read_shape(Path(given["qwen3"]))
    frame = captioner.image_tokens(config.policy.max_pixels)
    assert config.data.frames * frame + config.rollout.max_tokens < config.rollout.engine.max_model_len
    memory = memory_of(config, captioner, reader, work_of(config, captioner))
    assert max(memory.values()) < GPUS["h100"].memory_gib


def test_prism_is_the_published_one() -> None:
    config = conf.load(
        [
            *("conf=conf/prism_vl.yaml", "prism.benchmark=chartqa", f"prism.data={Path(__file__)}"),
            *("captioner.endpoint.url=http://127.0.0.1:1/v1", "answerer.endpoint.url=http://127.0.0.1:1/v1"),
        ]
    )
    captioner = config.captioner
    assert (config.prism.captions, captioner.temperature, captioner.max_tokens) == (4, 1.0, 2048)


def test_supervised_training_and_pretraining_resolve(given: dict[str, str]) -> None:
    sft = load("sft", given, "qwen25_vl", "", f"sft.data={given['data']}")
    assert (sft.job, sft.sft.batch, sft.learner.lr) == ("sft", 128, 2e-5)
    larger = load("qwen3_vl_4b_sft", given, "qwen3_vl", "", f"sft.data={given['data']}")
    assert (larger.job, larger.learner.num_ranks, larger.learner.lr) == ("sft", 2, 2e-5)
    stages = [f"pretrain.{name}.data={given['data']}" for name in ("align", "further", "tune")]
    pretrain = load("pretrain", given, "qwen25_vl", "", *stages).pretrain
    rates = [(s.lr, s.batch, s.train_only) for s in (pretrain.align, pretrain.further, pretrain.tune)]
    assert rates == [(1e-3, 256, ["visual.merger"]), (4e-5, 256, []), (2e-5, 128, [])]
