"""The command line as a user meets it: wrong confs, a run, its folder, a resume, Ctrl-C, a killed driver."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_kit import MAX_PIXELS, MIN_PIXELS, PROMPT, noise_image, tiny_engine
from process_kit import left_running

from caprl_async import processes
from caprl_async.data.processor import PolicyProcessor
from caprl_async.engine.build import VisionLimits
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import Request
from caprl_async.observe.metrics import read_metrics
from caprl_async.replay.events import Event, surviving
from caprl_async.replay.ledger import audit_file
from caprl_async.replay.line import surviving_line
from caprl_async.replay.reading import Reading
from caprl_async.run import main
from caprl_async.types import ImageRef

ROOT = Path(__file__).resolve().parent.parent
HELDOUT_OFF = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="]
SMALL = ["replay.batch_groups=4", "evaluate.images=8", "evaluate.dense_policy=", "checkpoint.interval=2"]
COMMAND = [sys.executable, "-m", "caprl_async.run", "conf=conf/demo.yaml", *SMALL]


def test_help_names_every_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for room in ("data", "policy", "rollout", "judge", "reward", "replay", "learner", "weights"):
        assert f"{room}." in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["conf=conf/none.yaml"], "none.yaml"),
        (["conf=conf/demo.yaml", "replay.max_stalness=1"], "replay.max_staleness"),
        (["conf=conf/demo.yaml", "steps=many"], "steps"),
        (["conf=conf/demo.yaml", "policy.model=/nowhere"], "policy.model"),
        (["conf=conf/demo.yaml", "weights.backend=nccl"], "weights.backend"),
    ],
)
def test_a_wrong_conf_is_one_clear_error(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = _run(f"run_dir={folder}", "steps=3")
    assert first.returncode == 0, first.stderr
    result = json.loads((folder / "result.json").read_text())
    for row in ("start", "trained", "ceiling", "blind"):
        assert 0 <= result[row]["judge"] <= 1
        assert 0 <= result[row]["heldout_judge"] <= 1
        assert result[row]["length"] >= 0
    assert result["steps"] == 3
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert "<svg" in (folder / "report.html").read_text()
    assert list((folder / "tensorboard").glob("events*"))
    _loads_in_transformers(folder / "model")
    _captions_in_vllm(folder / "model", noise_image(tmp_path, 112, 112))

    second = _run(f"run_dir={folder}", "steps=3")
    assert second.returncode == 2
    assert "resume=true" in second.stderr


def _loads_in_transformers(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    AutoProcessor.from_pretrained(folder)


def _captions_in_vllm(folder: Path, image: ImageRef) -> None:
    processor = PolicyProcessor(str(folder), MIN_PIXELS, MAX_PIXELS)
    limits = VisionLimits(MIN_PIXELS, MAX_PIXELS)
    engine = Engine(str(folder), tiny_engine(), seed=0, vision=limits)
    try:
        answer = asyncio.run(
            engine.generate(Request(processor.prompt_ids(PROMPT), image=image, max_tokens=9))
        )
        assert answer.completions[0].token_ids
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_in_the_middle_leaves_nothing_running(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = processes.descendants()
    run = subprocess.Popen(
        [*COMMAND, f"run_dir={folder}", "steps=500", "data.heldout=", *HELDOUT_OFF],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not read_metrics(folder):
            assert run.poll() is None, run.stderr and run.stderr.read()
            assert time.monotonic() < deadline, "no step in five minutes"
            time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the whole group
        _, error = run.communicate(timeout=90)
    finally:
        run.kill()
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert "left processes" not in error
    assert left_running(before, patience_s=0.0) == []
    assert (folder / "report.html").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for one checkpoint and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=44m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a disk of its own needs the right to mount one: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_full_disk_costs_no_checkpoint_that_is_there(tmp_path: Path, small_disk: Path) -> None:
    """And `resume=true` goes on from it when there is room again."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    few = ["data.heldout=", *HELDOUT_OFF, "checkpoint.interval=1", "observe.record_batches=true"]
    full = _run(f"run_dir={folder}", "steps=3", *few)
    assert full.returncode == 1, full.stderr
    assert "no checkpoint this time" in full.stderr
    assert "could not be saved" in full.stderr
    assert "No space left" in full.stderr
    assert "Traceback" not in full.stderr
    assert [path.name for path in small_disk.glob("*")] == ["step-000001"]

    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    again = _run(f"run_dir={folder}", "steps=3", "resume=true", *few)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    audit = audit_file(folder / "ledger.sqlite", 2)
    assert (audit["violations"], audit["ended"]["trained"]) == ([], 3 * 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_is_started_again_and_goes_on(tmp_path: Path) -> None:
    """At lag 0 with the prompts in their order, and what is recorded leads to the same parameters."""
    folder = tmp_path / "a run's = folder"
    before = processes.descendants()
    bare = ["data.heldout=", *HELDOUT_OFF, "replay.max_staleness=0", "observe.record_batches=true"]
    run = subprocess.Popen(
        [*COMMAND, *bare, f"run_dir={folder}", "steps=6"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while not list(folder.glob("checkpoints/step-*")):
            assert run.poll() is None, run.stderr and run.stderr.read()
            assert time.monotonic() < deadline, "no checkpoint in five minutes"
            time.sleep(0.1)
        (driver,) = psutil.Process(run.pid).children()
        driver.kill()
        _, error = run.communicate(timeout=400)
    finally:
        run.kill()
    assert run.returncode == 0, error
    assert "SIGKILL" in error
    assert "from checkpoints/step-" in error
    assert "left processes" not in error
    assert left_running(before, patience_s=0.0) == []
    assert json.loads((folder / "result.json").read_text())["steps"] == 6
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    audit = audit_file(folder / "ledger.sqlite", 2)
    assert audit["violations"] == []
    assert audit["ended"]["trained"] == 6 * 4
    with Reading(folder / "ledger.sqlite") as reading:
        rows = reading.rows()
    evicted = {row.key for row in surviving(rows) if row.event is Event.EVICTED}
    taken = [group.key for step in surviving_line(rows) for group in step.groups]
    sampled = (f"train/{index}" for index in itertools.count())
    assert taken == list(itertools.islice((key for key in sampled if key not in evicted), 6 * 4))
    replayed = subprocess.run(
        [*COMMAND[:3], "conf=conf/replay.yaml", f"run={folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert replayed.stdout.splitlines()[-1].startswith("equal: 6 steps")
