"""Supervised training and pre-training by the command line: a killed rank, measuring, the stages."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tool_kit import load_tool

from caprl_async import conf, tiny
from caprl_async.config import Config
from caprl_async.jobs.pretrain import stage_config
from caprl_async.observe.metrics import read_metrics
from caprl_async.run import main

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(tiny.__file__).parent
UNMEASURED = [
    *("data.heldout=", "evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
    *("evaluate.interval=0", "evaluate.program="),
]
COMMAND = [sys.executable, "-m", "caprl_async.run", "conf=conf/sft_demo.yaml", *UNMEASURED]
SMALL = ["sft.batch=8", "sft.interval=4", "sft.validation_images=16", "checkpoint.interval=3", "steps=8"]


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def _wait(run: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not until():
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)


def _kill(run: subprocess.Popen[str], name: str) -> None:
    for process in psutil.Process(run.pid).children(recursive=True):
        if name in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"there is no process of {name}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_and_a_resume_come_to_the_same_weights(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(
        [*COMMAND, *SMALL, f"run_dir={whole}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["validation_loss"] < rows[3]["validation_loss"]  # type: ignore[operator]
    assert json.loads((whole / "result.json").read_text())["validation_loss"] == rows[-1]["validation_loss"]
    assert "<svg" in (whole / "report.html").read_text()

    with subprocess.Popen([*COMMAND, *SMALL, f"run_dir={broken}"], cwd=ROOT, text=True) as run:
        _wait(run, lambda: len(read_metrics(broken)) >= 5)
        _kill(run, "learner-0")
        assert run.wait(300) == 0
    told = (broken / "diary.jsonl").read_text()
    assert "starting the learner again" in told
    assert "going back to" in told
    assert _weights(broken) == _weights(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_are_measured_by_engines_and_judges(tmp_path: Path) -> None:
    ranks = ["learner.num_ranks=2", "learner.zero_stage=2", "evaluate.images=8", "steps=3", "sft.batch=6"]
    off = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.interval=2"]
    arguments = ["conf=conf/sft_demo.yaml", *off, *ranks, "sft.validation=", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "caprl_async.run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["start"]["judge"] < 1
    assert 0 < result["trained"]["judge"] < 1
    assert "eval_judge" in read_metrics(tmp_path / "run")[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["rollout-0", "learner-0"])
def test_a_death_while_the_start_is_measured_is_survived(name: str, tmp_path: Path) -> None:
    off = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.interval=0"]
    sizes = ["evaluate.images=200", "steps=1", "sft.batch=4", "sft.validation="]
    arguments = ["conf=conf/sft_demo.yaml", *off, *sizes, f"run_dir={tmp_path}"]
    command = [sys.executable, "-m", "caprl_async.run", *arguments]
    said = tmp_path.with_suffix(".txt")
    with said.open("w") as err, subprocess.Popen(command, cwd=ROOT, stderr=err, text=True) as run:
        _wait(run, lambda: "measuring the start" in said.read_text())
        _kill(run, name)
        assert run.wait(300) == 0, said.read_text()
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["start"]["judge"] < 1
    assert len((tmp_path / "evals" / "start.jsonl").read_text().splitlines()) == 200
    assert f"{name} died" in said.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pretraining_goes_through_its_stages_and_passes_over_what_is_done(tmp_path: Path) -> None:
    start = tmp_path / "init"
    models = ["--language", str(TINY / "models" / "judge"), "--tower", str(TINY / "models" / "policy")]
    assert load_tool("init_vlm").main([*models, "--out", str(start)]) == 0
    data = TINY / "data" / "train.parquet"
    stages = [
        *(f"pretrain.{name}.data={data}" for name in ("align", "tune")),
        *(f"pretrain.{name}.steps=2" for name in ("align", "tune")),
        *(f"pretrain.{name}.batch=4" for name in ("align", "tune")),
    ]
    run_dir = tmp_path / "run"
    command = [*COMMAND, "job=pretrain", f"policy.model={start}", *stages, f"run_dir={run_dir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in run_dir.iterdir()) == ["1-align", "3-tune", "model"]
    assert (run_dir / "model").resolve() == (run_dir / "3-tune" / "model").resolve()

    from safetensors.torch import load_file

    before, aligned, tuned = (
        load_file(folder / "model.safetensors")
        for folder in (start, run_dir / "1-align" / "model", run_dir / "model")
    )
    moved = {name for name in before if not before[name].equal(aligned[name])}
    assert moved
    assert all("merger" in name for name in moved), "aligning trains the projector alone"
    assert {name for name in before if not aligned[name].equal(tuned[name])} > moved

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert "DeepSpeed" not in again.stderr


def test_a_stage_of_another_conf_is_neither_gone_on_with_nor_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = f"pretrain.align.data={TINY / 'data' / 'train.parquet'}"
    arguments = ["conf=conf/sft_demo.yaml", *UNMEASURED, "job=pretrain", data, f"run_dir={tmp_path}"]
    config = conf.load([*arguments, "pretrain.align.steps=3"])
    folder = tmp_path / "1-align"
    folder.mkdir()
    own = stage_config(config, config.pretrain.align, folder, config.policy.model)
    (folder / "conf.yaml").write_text(conf.to_yaml(own))
    (folder / "result.json").write_text("{}")
    assert main([*arguments, "pretrain.align.steps=4"]) == 2
    assert f"{folder / 'conf.yaml'} is another conf's" in capfd.readouterr().err
    assert not (tmp_path / "model").is_symlink()
    (folder / "model").mkdir()
    assert main([*arguments, "pretrain.align.steps=3"]) == 0
    assert "done already" in capfd.readouterr().err
    assert (tmp_path / "model").resolve() == folder / "model"


def test_a_stage_is_the_conf_with_its_own_keys() -> None:
    config = Config()
    config.pretrain.align.data, config.pretrain.align.steps = "x.parquet", 7
    found = stage_config(config, config.pretrain.align, Path("runs/1-align"), "init")
    assert (found.steps, found.sft.batch, found.learner.lr) == (7, 256, 1e-3)
    assert (found.learner.train_only, found.policy.model) == (["visual.merger"], "init")
    assert found.data.prompt == ""
    assert config.learner.lr == Config().learner.lr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["job=sft", "sft.data="], "sft.data is empty"),
        (["job=sft", "sft.data=/nowhere.parquet"], "sft.data=/nowhere.parquet does not exist"),
        (["job=pretrain"], "no stage has data"),
        (["job=pretrain", "pretrain.tune.data=/nowhere"], "pretrain.tune.data=/nowhere does not exist"),
        (["job=pretrain", "data.heldout=/nowhere.parquet"], "data.heldout=/nowhere.parquet"),
    ],
)
def test_what_cannot_run_is_told_before_anything_starts(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["conf=conf/sft_demo.yaml", *UNMEASURED, f"run_dir={tmp_path / 'run'}"]
    assert main([*command, *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
