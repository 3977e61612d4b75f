"""What a user meets when a conf is right, wrong, or used twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.conf_help import leaves, room_of
from caprl_async.config import (
    Config,
    ImportanceConfig,
    ImportanceLevel,
    JudgeMode,
    KLConfig,
    LearnerConfig,
    TrustRegion,
    TrustRegionConfig,
    WeightBackend,
)
from caprl_async.observe.names import METRICS

Write = Callable[..., Path]


PATCHES = {"vision_config": {"spatial_merge_size": 2}, "image_token_id": 5}


def _checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def minimal(tmp_path: Path) -> dict[str, Any]:
    """The values of a conf that passes on a machine without a GPU."""
    data = tmp_path / "train.parquet"
    data.write_bytes(b"")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_bytes(b"")
    return {
        "run_dir": str(tmp_path / "run"),
        "data": {"train": str(data), "heldout": str(heldout)},
        "policy": {"model": str(_checkpoint(tmp_path / "policy", **PATCHES))},
        "judge": {"model": str(_checkpoint(tmp_path / "judge", architectures=["Qwen2ForCausalLM"]))},
        "learner": {"device": "cpu"},
        "weights": {"backend": "gloo"},
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(values: Any, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return _write


@pytest.fixture
def load(minimal: dict[str, Any], write: Write) -> Callable[..., Config]:
    path = write(minimal, "minimal.yaml")
    return lambda *overrides: conf.load([f"conf={path}", *overrides])


def test_values_types_and_overrides(load: Callable[..., Config]) -> None:
    config = load("judge.mode=sample", "learner.lr=3e-4", "learner.betas=[0.8,0.9]", "steps=7")
    assert config.judge.mode is JudgeMode.sample
    assert config.weights.backend is WeightBackend.gloo
    assert (config.learner.lr, config.learner.betas, config.steps) == (3e-4, [0.8, 0.9], 7)
    assert type(config) is Config
    assert dataclasses.is_dataclass(config.judge.prompt)


def test_base_is_relative_to_its_conf_and_later_layers_win(minimal: dict[str, Any], write: Write) -> None:
    write({**minimal, "steps": 1, "seed": 1}, "deep/base.yaml")
    write({"base": "deep/base.yaml", "steps": 2, "rollout": {"group_size": 4}}, "middle.yaml")
    top = write({"base": "middle.yaml", "rollout": {"max_tokens": 9}})
    config = conf.load([f"conf={top}", "rollout.temperature=0.5"])
    assert (config.seed, config.steps) == (1, 2)
    assert (config.rollout.group_size, config.rollout.max_tokens, config.rollout.temperature) == (4, 9, 0.5)


def test_of_several_confs_and_bases_the_later_wins(minimal: dict[str, Any], write: Write) -> None:
    first = write({**minimal, "steps": 1, "seed": 1}, "first.yaml")
    write({"steps": 2, "rollout": {"group_size": 4}}, "second.yaml")
    write({"steps": 3}, "third.yaml")
    both = write({"base": ["second.yaml", "third.yaml"]}, "both.yaml")
    config = conf.load([f"conf={first}", f"conf={both}"])
    assert (config.steps, config.seed, config.rollout.group_size) == (3, 1, 4)
    bad = write({"base": [1]}, "bad.yaml")
    with pytest.raises(ConfError, match="list of paths"):
        conf.load([f"conf={bad}"])


def test_base_in_a_circle_is_refused(write: Write) -> None:
    write({"base": "b.yaml"}, "a.yaml")
    path = write({"base": "a.yaml"}, "b.yaml")
    with pytest.raises(ConfError, match="circle"):
        conf.load([f"conf={path}"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["conf= is missing"]),
        (["conf=conf/demo.yaml", "conf=nowhere.yaml"], ["nowhere.yaml is no file"]),
        (["conf=conf/demoo.yaml"], ["demoo.yaml is no file", "demo.yaml?"]),
        (["--steps", "5"], ["'--steps'", "key=value"]),
    ],
)
def test_wrong_command_lines(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfError) as error:
        conf.load(argv)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learner.learning_rate", "learner.lr"),
        ("lr", "learner.lr"),
        ("rollout.groupsize", "rollout.group_size"),
        ("replay.max_stalness", "replay.max_staleness"),
        ("judge.engine.max_seqs", "judge.engine.max_num_seqs"),
        ("stepps", "steps"),
        ("learner.correction.clip_low", "learner.correction.trust_region.clip_low"),
    ],
)
def test_unknown_key_names_itself_its_file_and_the_nearest(
    minimal: dict[str, Any], write: Write, key: str, nearest: str
) -> None:
    nested: Any = 1
    for part in reversed(key.split(".")):
        nested = {part: nested}
    path = write(nested)
    with pytest.raises(ConfError) as error:
        conf.load([f"conf={path}"])
    assert f"unknown key {key} in {path}" in str(error.value)
    assert f"did you mean {nearest}" in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=many", ["steps='many'", "whole number", "command line"]),
        ("steps=1.5", ["steps=1.5", "whole number"]),
        ("learner.lr=fast", ["learner.lr='fast'", "a number"]),
        ("resume=perhaps", ["resume='perhaps'", "true or false"]),
        ("judge.mode=expectd", ["expected | sample | likelihood", "did you mean expected"]),
        ("learner.betas=[a]", ["learner.betas", "list"]),
        ("learner=3", ["learner is a section", "num_ranks"]),
        ("rollout.engine.block_size=x", ["block_size", "whole number or null"]),
        ("seed=${nowhere}", ["seed", "nowhere"]),
        ("learner.lr=nan", ["learner.lr", "finite"]),
    ],
)
def test_wrong_types(load: Callable[..., Config], override: str, words: list[str]) -> None:
    with pytest.raises(ConfError) as error:
        load(override)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["weights.backend=nccl"], ["learner.device=cpu", "weights.backend=nccl"]),
        (["learner.device=cuda"], ["learner.device=cuda", "ring.gpus_per_learner=0"]),
        (["learner.dtype=float64"], ["learner.dtype=float64", "bfloat16"]),
        (["judge.engine.dtype=int8"], ["judge.engine.dtype=int8", "float16"]),
        (
            ["rollout.group_size=1", "learner.advantage.kind=rloo"],
            ["rollout.group_size=1", "learner.advantage.kind=rloo"],
        ),
        (["rollout.max_tokens=4096"], ["rollout.max_tokens", "rollout.engine.max_model_len"]),
        (["replay.min_group=9"], ["replay.min_group=9", "rollout.group_size=8"]),
        (["replay.batch_groups=1", "learner.num_ranks=2"], ["replay.batch_groups=1", "learner.num_ranks=2"]),
        (["steps=0"], ["steps=0"]),
        (["judge.temperature=0"], ["judge.temperature=0", "judge.mode=expected"]),
        (["judge.also=[pkg:tiny/models/heldout_judge]"], ["judge.num_actors=1", "2 models"]),
        (["judge.also=[nowhere]", "judge.num_actors=2"], ["judge.also=", "nowhere"]),
        (["rollout.max_actors=1", "rollout.num_actors=2"], ["rollout.max_actors=1", "num_actors=2"]),
        (["judge.engine.max_num_batched_tokens=1000"], ["max_num_batched_tokens=1000", "max_model_len=4096"]),
        (["rollout.engine.block_size=16"], ["block_size=16", "learner.device=cpu", "32"]),
        (["reward.length_max=10", "reward.length_free=10"], ["reward.length_max", "reward.length_free"]),
        (["learner.correction.importance.high=0.5"], ["importance.high=0.5", "at least 1"]),
        (
            ["learner.correction.proximal=behaviour"],
            ["proximal=behaviour", "importance.level=token", "always 1"],
        ),
        (
            ["learner.correction.proximal=interpolate", "learner.correction.trust_region.kind=reinforce"],
            ["proximal=interpolate", "trust_region.kind=reinforce"],
        ),
        (
            ["learner.correction.importance.beyond=mask", "learner.correction.importance.high=0"],
            ["importance.beyond=mask", "importance.low=0", "high=0"],
        ),
        (
            ["learner.correction.trust_region.kind=gspo", "learner.correction.trust_region.dual_clip=3"],
            ["dual_clip=3", "kind=gspo"],
        ),
        (["learner.correction.trust_region.dual_clip=1.1"], ["dual_clip=1.1", "clip_high=0.2"]),
        (["learner.offload_optimizer=true"], ["offload_optimizer=true", "learner.zero_stage=0"]),
        (["learner.lora.targets=[q_proj]"], ["learner.lora.targets=['q_proj']", "learner.lora.rank=0"]),
        (["learner.lora.rank=8", "learner.lora.targets=['']"], ["learner.lora.targets=['']", "ending"]),
        (["learner.lora.rank=-1"], ["learner.lora.rank=-1", "0 or more"]),
        (["learner.lora.rank=8", "learner.lora.alpha=0"], ["learner.lora.alpha=0", "above 0"]),
        (["learner.sum_length=9"], ["sum_length=9", "aggregation=token_mean"]),
        (
            ["learner.correction.trust_region.kind=gspo", "learner.updates_per_batch=2"],
            ["trust_region.kind=gspo", "importance.level=token"],
        ),
        (
            ["learner.correction.trust_region.kind=cispo"],
            ["trust_region.kind=cispo", "proximal=recompute", "updates_per_batch=1"],
        ),
        (
            ["learner.correction.trust_region.dual_clip=3"],
            ["trust_region.dual_clip=3", "proximal=recompute", "updates_per_batch=1"],
        ),
        (
            ["learner.updates_per_batch=9", "replay.batch_groups=8"],
            ["updates_per_batch=9", "batch_groups=8"],
        ),
        (["observe.bands.kl=[0,1]"], ["observe.bands.kl", "learner.kl.coef=0"]),
        (["reward.length=0.2"], ["reward.length=0.2", "rollout.max_tokens=", "reward.length_free=2048"]),
        (["replay.min_reward_spread=0"], ["replay.min_reward_spread=0", "above 0"]),
        (["observe.bands.kl=[1]"], ["observe.bands.kl=[1.0]", "[low, high]"]),
        (["weights.broadcast_interval=4"], ["weights.broadcast_interval=4", "replay.max_staleness=2"]),
        (["data.heldout=", "evaluate.interval=2"], ["evaluate.interval=2", "data.heldout"]),
        (["judge.prompt.caption=no place"], ["judge.prompt.caption", "{caption}"]),
        (["job=trian"], ["job=trian", "train"]),
        (["resume=true"], ["resume=true", "no checkpoint"]),
    ],
)
def test_impossible_combinations(load: Callable[..., Config], overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfError) as error:
        load(*overrides)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("mode", ["expected", "sample"])
def test_options_must_be_shown_when_letters_are_asked_for(load: Callable[..., Config], mode: str) -> None:
    load("judge.mode=likelihood", "judge.prompt.question=asks {question}")
    with pytest.raises(ConfError, match="options"):
        load(f"judge.mode={mode}", "judge.prompt.question=asks {question}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=missing.parquet", ["data.train=", "missing.parquet is no file"]),
        ("data.train=tests", ["data.train=", "is a folder without .parquet files"]),
        ("data.heldout=README.md", ["data.heldout=", "is neither .parquet nor .jsonl"]),
        ("data.train=", ["data.train is empty"]),
        ("policy.model=missing", ["policy.model=", "is no folder"]),
        ("judge.model=", ["judge.model is empty"]),
        ("evaluate.heldout_judge.model=missing", ["evaluate.heldout_judge.model="]),
        ("evaluate.dense_policy=missing", ["evaluate.dense_policy="]),
        ("evaluate.program=nowhere", ["evaluate.program=nowhere", "module:function"]),
        ("evaluate.program=json:nothing", ["json", "nothing"]),
    ],
)
def test_missing_files_are_named_with_their_key(
    load: Callable[..., Config], override: str, words: list[str]
) -> None:
    with pytest.raises(ConfError) as error:
        load(override)
    assert all(word in str(error.value) for word in words)


def test_a_judge_that_sees_and_a_captioner_that_does_not_are_refused(
    load: Callable[..., Config], minimal: dict[str, Any]
) -> None:
    with pytest.raises(ConfError) as error:
        load(f"judge.model={minimal['policy']['model']}", f"policy.model={minimal['judge']['model']}")
    assert "judge must be a text-only model" in str(error.value)
    assert "a captioner must see" in str(error.value)


def test_models_that_the_ring_cannot_run_are_refused(load: Callable[..., Config], tmp_path: Path) -> None:
    other = _checkpoint(tmp_path / "other", vision_config={}, model_type="llava")
    encoder = _checkpoint(tmp_path / "encoder", architectures=["BertModel"])
    with pytest.raises(ConfError) as error:
        load(f"policy.model={other}", f"judge.model={encoder}")
    assert "llava" in str(error.value)
    assert "BertModel" in str(error.value)


def test_all_problems_of_one_kind_come_in_one_error(load: Callable[..., Config]) -> None:
    with pytest.raises(ConfError) as error:
        load("steps=0", "learner.num_ranks=0", "learner.dtype=x")
    assert str(error.value).startswith("3 problems")


def test_broken_yaml_names_file_and_line(write: Write) -> None:
    path = write("steps: 3\nseed: [1\n")
    with pytest.raises(ConfError, match=rf"{path} line \d"):
        conf.load([f"conf={path}"])


def test_an_empty_section_is_the_default(minimal: dict[str, Any], write: Write) -> None:
    path = write({**minimal, "observe": None})
    assert conf.load([f"conf={path}"]).observe == Config().observe


def test_paths_are_found_from_any_folder(
    minimal: dict[str, Any], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {**minimal, "data": {"train": "train.parquet"}, "run_dir": "runs/x"}
    path = write(beside)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = conf.load([f"conf={path}"])
    assert config.data.train == str(tmp_path / "train.parquet")  # beside the conf
    assert config.run_dir == str(elsewhere / "runs/x")  # what is written goes to the working directory
    (elsewhere / "train.parquet").write_bytes(b"")
    assert conf.load([f"conf={path}"]).data.train == str(elsewhere / "train.parquet")
    package = Path(conf.__file__).parent
    assert conf.resolve_path("pkg:tiny/data/x.parquet") == str(package / "tiny/data/x.parquet")


_OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "learner.lr": st.floats(1e-12, 1.0),
        "learner.correction.importance.high": st.floats(1.0, 100.0),
        "judge.mode": st.sampled_from(["expected", "sample", "likelihood", "text"]),
        "judge.prompt.abstain": st.text(
            st.characters(codec="utf-8", exclude_characters="$\\"), min_size=1
        ).filter(str.strip),
        "rollout.engine.block_size": st.sampled_from([None, 32, 64]),
    },
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=_OVERRIDES)
@example(values={"judge.prompt.abstain": "0\x85"})
@example(values={"judge.prompt.abstain": "a\u2028b\n\u2029c"})
def test_the_resolved_conf_loads_to_the_same_config(
    load: Callable[..., Config], tmp_path: Path, values: dict[str, Any]
) -> None:
    config = load()
    for key, value in values.items():
        room, name = room_of(config, key)
        setattr(room, name, JudgeMode[value] if key == "judge.mode" else value)
    conf.dump(config, tmp_path / "resolved.yaml")
    assert conf.load([f"conf={tmp_path / 'resolved.yaml'}"]) == config


def test_a_run_folder_is_used_once_unless_resumed(load: Callable[..., Config]) -> None:
    config = load()
    with conf.run_folder(config) as folder:
        assert conf.load([f"conf={folder / conf.RESOLVED}"]) == config
        with pytest.raises(ConfError, match="a run is going on"), conf.run_folder(config):
            pass
    with conf.run_folder(config):  # the first did not come to train: nothing is lost
        (folder / METRICS).touch()
    with pytest.raises(ConfError, match=r"run_dir=.*delete it"), conf.run_folder(config):
        pass
    cut = folder / "checkpoints" / "step-1" / "manifest.json"
    cut.parent.mkdir(parents=True)
    cut.write_text("{}")
    with pytest.raises(ConfError, match="resume=true"), conf.run_folder(config):
        pass
    with conf.run_folder(load("resume=true")):
        assert conf.load([f"conf={folder / conf.RESOLVED}"]) == config  # without resume


def test_every_key_is_explained_in_help_and_table() -> None:
    text, table = conf.help_text(), conf.markdown_table()
    for leaf in leaves():
        assert leaf.help
        assert f"`{leaf.key}`" in table
        assert leaf.key in text
    assert "conf=conf/demo.yaml" in text


def test_the_shipped_confs_have_only_known_keys_and_types() -> None:
    for path in (Path(conf.__file__).parent.parent / "conf").rglob("*.yaml"):
        assert conf.read([path])


@pytest.mark.parametrize("name", ["grpo", "caprl", "decoupled_ppo", "tis", "icepop", "gspo", "cispo"])
def test_every_preset_fits_the_demo_and_is_complete(name: str, tmp_path: Path) -> None:
    """What a preset does must not depend on the preset before it."""

    def learner(*presets: str) -> LearnerConfig:
        confs = [f"conf=conf/{conf}.yaml" for conf in ("demo", *(f"presets/{preset}" for preset in presets))]
        found = conf.load([*confs, f"run_dir={tmp_path}"]).learner
        if found.correction.importance.level is ImportanceLevel.none:
            found.correction.importance = ImportanceConfig(level=ImportanceLevel.none)  # bounds of nothing
        if found.correction.trust_region.kind is TrustRegion.reinforce:
            found.correction.trust_region = TrustRegionConfig(kind=TrustRegion.reinforce)
        if found.kl.coef == 0:
            found.kl = KLConfig()
        return found

    for other in ("grpo", "caprl", "icepop", "gspo", "decoupled_ppo"):
        assert learner(other, name) == learner(name)


def test_a_choice_that_may_be_null_names_its_values(load: Callable[..., Config]) -> None:
    assert load("evaluate.heldout_judge.mode=text").evaluate.heldout_judge.mode is JudgeMode.text
    with pytest.raises(ConfError, match=r"none of expected \| sample \| likelihood \| text \| rate \| null"):
        load("evaluate.heldout_judge.mode=blind")


def test_a_judge_that_rates_must_see_and_asks_nothing(load: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfError, match="mode=rate it must see"):
        load("judge.mode=rate")
    served = ["judge.mode=rate", "judge.endpoint.url=http://127.0.0.1:1/v1", "judge.model="]
    assert load(*served).judge.mode is JudgeMode.rate
    with pytest.raises(ConfError, match=r"reward\.blind"):
        load(*served, "reward.blind=drop")
    with pytest.raises(ConfError, match=r"heldout_judge\.mode=rate"):
        load(*served, "evaluate.heldout_judge.mode=rate")
