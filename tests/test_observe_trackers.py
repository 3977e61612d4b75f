"""What the trackers are told: curves, images with captions, the conf; and that none of them harms a run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from caprl_async import conf_help
from caprl_async.config import Config
from caprl_async.observe import trackers
from caprl_async.observe.trackers import TENSORBOARD, Trackers, problems, samples_of

CONF = conf_help.flat(Config())


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run with samples of two batches; its trackers' own settings are none."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "a-run"
    folder.mkdir()
    Image.new("RGB", (600, 300), "red").save(folder / "image.png")
    captions = [{"text": "a red image", "reward": 0.25}, {"text": "red, all of it", "reward": 0.5}]
    captions.append({"text": "not judged", "reward": None})
    line = {"step": 3, "row_id": "row-1", "image": str(folder / "image.png"), "captions": captions}
    gone = {**line, "image": str(folder / "gone.png")}
    lines = [{**line, "step": 2}, line, gone]
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in lines) + '{"step": 3, "ro'
    )
    return folder


def _told(run_dir: Path, *names: str) -> list[str]:
    said: list[str] = []
    told = Trackers(names, run_dir, CONF, said.append)
    told.log(1, {"reward_mean": 0.1})
    told.show(1, lambda: samples_of(run_dir, 3))
    told.log(2, {"reward_mean": 0.2})
    told.close()
    return said


def test_samples_are_those_of_the_step_best_caption_first(run_dir: Path) -> None:
    (sample,) = samples_of(run_dir, 3)
    assert sample.image.size == (512, 256)
    assert sample.text == "row-1\n\n- 0.500: red, all of it\n- 0.250: a red image\n- –: not judged"
    assert samples_of(run_dir, 4) == samples_of(run_dir / "nowhere", 3) == []


def test_tensorboard_shows_curves_images_and_captions(run_dir: Path) -> None:
    assert _told(run_dir, TENSORBOARD) == []
    again = Trackers([TENSORBOARD], run_dir, CONF, print)
    again.log(2, {"reward_mean": 0.9})  # a rollback: the old step 2 is void
    again.close()
    events = EventAccumulator(str(run_dir / TENSORBOARD))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("caprl/reward_mean")]
    assert points == [(1, pytest.approx(0.1)), (2, pytest.approx(0.9))]
    (image,) = events.Images("samples/0")
    assert (image.step, image.width, image.height) == (1, 512, 256)
    (captions,) = events.Tensors("samples/0/captions")
    assert b"red, all of it" in captions.tensor_proto.string_val[0]
    assert b"replay.max_staleness" in events.Tensors("caprl/conf")[0].tensor_proto.string_val[0]


def test_wandb_keeps_the_run_in_its_folder(run_dir: Path) -> None:
    assert _told(run_dir, "wandb") == []
    assert list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((run_dir / "wandb").glob("offline-run-*/files/media/images/*.png"))


def test_wandb_keeps_steps_that_are_made_again(run_dir: Path) -> None:
    told = Trackers(["wandb"], run_dir, CONF, print)
    rewards = {1: 0.11111, 2: 0.22222, 3: 0.33333}
    for step, reward in [*rewards.items(), (2, 0.44444)]:  # the ring went back to 1
        told.log(step, {"reward_mean": reward})
    told.close()
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    kept = file.read_bytes()
    assert all(f"{reward}".encode() in kept for reward in (*rewards.values(), 0.44444))


def test_trackio_keeps_the_run_in_its_folder(run_dir: Path) -> None:
    assert _told(run_dir, "trackio") == []
    (database,) = (run_dir / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows] == [1, 1, 2]
    assert list((run_dir / "trackio" / "media").rglob("*.png"))


def test_mlflow_goes_on_with_the_same_run(run_dir: Path) -> None:
    from mlflow import MlflowClient

    assert _told(run_dir, "mlflow") == []
    assert _told(run_dir, "mlflow") == []  # as a resume does
    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "caprl_async"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"reward_mean": 0.2}
    assert run.data.params["replay.max_staleness"] == "2"
    assert list((run_dir / "mlartifacts").rglob("*.md"))


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, run_dir: Path, conf: Mapping[str, Any]) -> None:
            self.calls = 0

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise ConnectionError("the server is gone")

    monkeypatch.setattr(trackers, "TRACKERS", {**trackers.TRACKERS, "broken": Broken})
    (said,) = _told(run_dir, "broken", TENSORBOARD)
    assert (
        said == "observe.trackers: broken failed and gets nothing more: ConnectionError: the server is gone"
    )
    assert list((run_dir / TENSORBOARD).glob("events*"))


def test_unknown_and_missing_trackers_are_found_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (unknown,) = problems(["wandbb"])
    assert "none of tensorboard, wandb" in unknown
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    (missing,) = problems(["mlflow"])
    assert "`make setup` installs it" in missing
