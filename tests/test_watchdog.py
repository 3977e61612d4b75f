"""The watchdog with small drivers that end, die, hang and litter; no Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from process_kit import left_running

from caprl_async import conf, processes, run
from caprl_async.conf_files import LEDGER

FAKE = str(Path(__file__).with_name("fake_driver.py"))
ROOT = Path(__file__).resolve().parent.parent


def started(folder: Path, *plan: str, restarts: int = 5, hang_s: float = 30.0) -> subprocess.Popen[str]:
    command = [sys.executable, FAKE, "watch", str(folder), str(restarts), str(hang_s), *plan]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # a session of its own, so that a test can signal it as a terminal does


def ended(watchdog: subprocess.Popen[str], patience_s: float = 60.0) -> str:
    """What it has said, when it has ended."""
    _, error = watchdog.communicate(timeout=patience_s)
    return error


def starts(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "starts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_code_that_the_program_gives_is_final(tmp_path: Path, code: int) -> None:
    watchdog = started(tmp_path, str(code))
    assert ended(watchdog) == ""
    assert watchdog.returncode == code
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("die", "SIGKILL"),
        ("segfault", "signal 11"),
        ("vanish", "exit code 1"),  # without a last word: not the program's own
        ("75", "a new one can"),
    ],
)
def test_a_driver_that_did_not_end_by_itself_is_started_again(tmp_path: Path, first: str, said: str) -> None:
    watchdog = started(tmp_path, first, "0")
    error = ended(watchdog)
    assert watchdog.returncode == 0
    assert said in error
    assert "restart 1 of 5" in error
    assert [start["arguments"] for start in starts(tmp_path)] == [[first, "0"], [first, "0", "resume=true"]]


def test_a_crash_after_the_last_word_is_of_no_matter(tmp_path: Path) -> None:
    watchdog = started(tmp_path, "crash-at-exit")
    assert ended(watchdog) == ""
    assert watchdog.returncode == 0
    assert len(starts(tmp_path)) == 1


def test_it_gives_up(tmp_path: Path) -> None:
    watchdog = started(tmp_path, "die", "die", "die", restarts=1)
    assert "ring.driver_restarts" in ended(watchdog)
    assert watchdog.returncode == 1
    assert len(starts(tmp_path)) == 2


def test_a_new_checkpoint_counts_as_progress(tmp_path: Path) -> None:
    watchdog = started(tmp_path, "die", "save-and-die", "die", "die", restarts=1)
    error = ended(watchdog)
    assert watchdog.returncode == 1
    assert len(starts(tmp_path)) == 3
    assert "from the beginning" in error
    assert "from checkpoints/step-000001" in error


def test_a_driver_without_a_sign_of_life_is_killed_and_started_again(tmp_path: Path) -> None:
    watchdog = started(tmp_path, "hang", "0", hang_s=4.0)
    error = ended(watchdog)
    assert watchdog.returncode == 0
    assert "no sign of life for 4 s" in error
    assert len(starts(tmp_path)) == 2


def test_a_pause_by_ctrl_z_is_no_hang(tmp_path: Path) -> None:
    watchdog = started(tmp_path, "wait", hang_s=4.0)
    wait_for((tmp_path / "ready").exists)
    time.sleep(0.5)  # the first beat has been heard, the second is yet to come
    os.killpg(watchdog.pid, signal.SIGSTOP)
    time.sleep(5.0)
    watchdog.send_signal(signal.SIGCONT)  # the worse order: it wakes before the driver has beaten again
    time.sleep(1.0)
    os.killpg(watchdog.pid, signal.SIGCONT)
    time.sleep(1.5)
    watchdog.terminate()
    assert ended(watchdog) == ""
    assert watchdog.returncode == 130
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize(("word", "terminal"), [("wait", True), ("wait", False), ("late", True)])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_driver_once(
    tmp_path: Path, word: str, terminal: bool, signum: signal.Signals
) -> None:
    watchdog = started(tmp_path, word)
    wait_for((tmp_path / ("ready" if word == "wait" else "starts.jsonl")).exists)
    if terminal:
        os.killpg(watchdog.pid, signum)
    else:
        watchdog.send_signal(signum)
    assert ended(watchdog) == ""  # no traceback, either
    assert watchdog.returncode == 130
    assert (tmp_path / "cleaned").exists()


def test_a_stop_between_two_drivers_ends_the_run(tmp_path: Path) -> None:
    watchdog = started(tmp_path, "die", "die", "wait")
    wait_for(lambda: (tmp_path / "starts.jsonl").exists() and len(starts(tmp_path)) == 2)
    wait_for(lambda: not psutil.pid_exists(int(str(starts(tmp_path)[1]["pid"]))))
    watchdog.send_signal(signal.SIGINT)
    assert "stopped" in ended(watchdog)
    assert watchdog.returncode == 130
    assert len(starts(tmp_path)) == 2


def test_the_driver_ends_when_its_watchdog_is_killed(tmp_path: Path) -> None:
    before = processes.descendants()
    watchdog = started(tmp_path, "wait")
    wait_for((tmp_path / "ready").exists)
    watchdog.kill()
    assert ended(watchdog) == ""
    assert left_running(before) == []
    assert (tmp_path / "cleaned").exists()


def test_what_a_run_leaves_behind_is_ended_and_named(tmp_path: Path) -> None:
    before = processes.descendants()
    watchdog = started(tmp_path, "litter")  # an orphan, and stopped, so that only SIGKILL ends it
    error = ended(watchdog)
    assert watchdog.returncode == 0
    assert "left processes behind" in error
    assert "import os, signal" in error
    assert left_running(before, 0.0) == []


def test_what_was_there_before_is_spared(tmp_path: Path) -> None:
    """As in a job script: `monitor & exec python -m caprl_async.run ...`."""
    script = 'sleep 60 & echo $! > "$1/sidecar"; exec "${@:2}"'
    watch = [sys.executable, FAKE, "watch", str(tmp_path), "1", "30", "die", "0"]
    done = subprocess.run(["bash", "-c", script, "bash", str(tmp_path), *watch], cwd=ROOT, timeout=60)
    sidecar = psutil.Process(int((tmp_path / "sidecar").read_text()))
    status = sidecar.status()
    sidecar.kill()
    assert status == psutil.STATUS_SLEEPING
    assert done.returncode == 0


def test_the_watchdog_itself_is_light() -> None:
    code = (
        "import sys, caprl_async.run;"
        "heavy = {'ray', 'torch', 'vllm', 'transformers', 'pandas', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_the_driver_gets_the_arguments_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "a run's = folder"
    arguments = ["conf=conf/demo.yaml", f"run_dir={folder}", 'data.prompt=say "a = b", $HOME and it\'s']
    command = run._commands(conf.read([ROOT / "conf/demo.yaml"], arguments[1:]), arguments)
    assert command(False) == command(True) == [sys.executable, "-m", "caprl_async.run", *arguments]
    folder.mkdir()
    (folder / LEDGER).touch()  # the driver has begun
    assert command(True)[3:] == [*arguments, "resume=true"]


def test_a_conf_edited_during_the_run_does_not_change_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {ROOT / 'conf/demo.yaml'}\nsteps: 7\nrun_dir: {tmp_path / 'run'}\n")
    config = conf.load([f"conf={mine}", "seed=3"])
    command = run._commands(config, [f"conf={mine}", "seed=3"])
    with conf.run_folder(config) as folder:
        (folder / LEDGER).touch()
    mine.write_text(mine.read_text().replace("steps: 7", "steps: 8"))
    again = conf.load(command(True)[3:])
    assert (again.steps, again.seed, again.resume) == (7, 3, True)


def test_another_runs_folder_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / LEDGER).touch()
    arguments = ["conf=conf/demo.yaml", f"run_dir={tmp_path}"]
    command = run._commands(conf.read([ROOT / "conf/demo.yaml"], arguments[1:]), arguments)
    assert "resume=true" not in command(True)
