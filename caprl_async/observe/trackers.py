"""Where a run's curves and samples are shown beside its own folder: TensorBoard, W&B, trackio, MLflow.

`observe.trackers` names them. What they keep lies in the run folder, unless their own environment variables
(WANDB_*, TRACKIO_*, MLFLOW_*) send it elsewhere. A tracker that fails is told of and let go: it never harms
the run.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

TENSORBOARD = "tensorboard"
_IDS = "trackers.json"  # the run's names there, so that a resume goes on with it
_PROJECT = "caprl_async"
_LARGEST = 512  # pixels of a shown image's longer side
_TAIL = 1 << 20  # bytes of samples.jsonl that hold a step's samples


@dataclass(frozen=True)
class Sample:
    """One image of a batch and its captions, best first, as text."""

    image: Image.Image
    text: str


class Tracker(Protocol):
    """One place that shows runs. Each method may raise anything: see `Trackers`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Finite numbers of one step."""

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        """Images with captions."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path, conf: Mapping[str, Any]) -> None:
        # Imported here, as in all of them: a conf is read by processes that shall be light.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text = event_pb2, summary_pb2.Summary, text_pb
        self._events = EventFileWriter(str(run_dir / TENSORBOARD), flush_secs=10)
        self._last: int | None = None
        self._add(0, text_pb("caprl/conf", f"```\n{json.dumps(conf, indent=1)}\n```").value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._last is None or step <= self._last:
            # Points at this step and after it, from an earlier life, are void.
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._events.add_event(self._event.Event(wall_time=time.time(), step=step, session_log=start))
        self._last = step
        values = [
            self._summary.Value(tag=f"caprl/{name}", simple_value=value) for name, value in metrics.items()
        ]
        self._add(step, values)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for i, sample in enumerate(samples):
            png = io.BytesIO()
            sample.image.save(png, "PNG")
            width, height = sample.image.size
            image = self._summary.Image(
                width=width, height=height, colorspace=3, encoded_image_string=png.getvalue()
            )
            shown = self._summary.Value(tag=f"samples/{i}", image=image)
            self._add(step, [shown, *self._text(f"samples/{i}/captions", sample.text).value])

    def _add(self, step: int, values: Iterable[Any]) -> None:
        summary = self._summary(value=values)
        self._events.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._events.close()


class Wandb:
    """W&B; without a key it keeps the run in `run_dir/wandb`, for `wandb sync`."""

    def __init__(self, run_dir: Path, conf: Mapping[str, Any]) -> None:
        import wandb

        keyed = wandb.api.api_key is not None
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run_dir.name,
            id=_own_id(run_dir, "wandb"),
            resume="allow",
            dir=str(run_dir),
            config=dict(conf),
            mode=None if keyed or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(silent=True),
        )
        # W&B's own step only ever grows, and drops what is made again after going back.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        images = [self._wandb.Image(sample.image, caption=sample.text) for sample in samples]
        self._run.log({"samples": images, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio, in `run_dir/trackio`: `TRACKIO_DIR=... trackio show`."""

    def __init__(self, run_dir: Path, conf: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))
        import trackio

        self._trackio = trackio
        with redirect_stdout(io.StringIO()):  # how to see it: the README says that once
            self._run = trackio.init(
                project=_PROJECT, name=run_dir.name, config=dict(conf), resume="allow", embed=False
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        images = {f"samples/{i}": self._trackio.Image(s.image, caption=s.text) for i, s in enumerate(samples)}
        self._run.log(images, step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


class MLflow:
    """MLflow, in `run_dir/mlflow.db`, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, run_dir: Path, conf: Mapping[str, Any]) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir / 'mlflow.db'}")
        self._client = mlflow.MlflowClient(uri)
        experiment = self._client.get_experiment_by_name(_PROJECT)
        own = (run_dir / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        number = experiment.experiment_id if experiment else self._client.create_experiment(_PROJECT, own)
        ids = _ids(run_dir)
        if "mlflow" not in ids:
            made = self._client.create_run(number, run_name=run_dir.name)
            _keep_id(run_dir, "mlflow", made.info.run_id)
            for name, value in conf.items():
                self._client.log_param(made.info.run_id, name, str(value)[:500])
        self._run = _ids(run_dir)["mlflow"]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in metrics.items()])

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        for i, sample in enumerate(samples):
            self._client.log_image(self._run, sample.image, key=f"samples-{i}", step=step)
            self._client.log_text(self._run, sample.text, f"captions/{step:06d}-{i}.md")

    def close(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    TENSORBOARD: TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def problems(names: Sequence[str]) -> Iterable[str]:
    """A sentence for each name that is no tracker, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            yield f"observe.trackers={list(names)}: {name!r} is none of {', '.join(TRACKERS)}"
        elif importlib.util.find_spec(name) is None:
            yield (
                f"observe.trackers={list(names)}: the package {name} is not installed; "
                "`make setup` installs it"
            )


class Trackers:
    """All trackers of a run; one that fails is told of by `say` and gets nothing more."""

    def __init__(
        self, names: Sequence[str], run_dir: Path, conf: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, functools.partial(self._begin, name, run_dir, conf))

    def _begin(self, name: str, run_dir: Path, conf: Mapping[str, Any]) -> None:
        self._open[name] = TRACKERS[name](run_dir, conf)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, functools.partial(tracker.log, step, metrics))

    def show(self, step: int, read: Callable[[], Sequence[Sample]]) -> None:
        """Shows what `read()` gives; where that fails, the next time may do better."""
        try:
            samples = read()
        except (OSError, KeyError, TypeError) as error:
            self._say(f"no samples of step {step} for observe.trackers: {type(error).__name__}: {error}")
            return
        for name, tracker in list(self._open.items()) if samples else ():
            self._try(name, functools.partial(tracker.show, step, samples))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _try(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # of any kind: networks, servers, other people's packages
            self._open.pop(name, None)
            why = f"{type(error).__name__}: {error}"
            self._say(f"observe.trackers: {name} failed and gets nothing more: {why}")


def samples_of(run_dir: Path, step: int) -> list[Sample]:
    """What samples.jsonl holds of the batch that was cut at `step`, of those whose image can be read."""
    path = run_dir / "samples.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        tail = file.read().decode("utf-8", errors="replace")
    found = []
    for line in tail.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue  # cut by the seek, or still being written
        if isinstance(value, dict) and value.get("step") == step:
            found.append(value)
    return [sample for value in found if (sample := _sample(value)) is not None]


def _sample(value: Mapping[str, Any]) -> Sample | None:
    try:
        with Image.open(value["image"]) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((_LARGEST, _LARGEST))
    captions = sorted(value["captions"], key=lambda one: -(one.get("reward") or 0.0))
    lines = [
        f"- {one['reward']:.3f}: {one['text']}" if one.get("reward") is not None else f"- –: {one['text']}"
        for one in captions
    ]
    return Sample(image, f"{value.get('row_id', '')}\n\n" + "\n".join(lines))


def _own_id(run_dir: Path, name: str) -> str:
    """This run's id at a tracker that lets us choose it."""
    if name not in _ids(run_dir):
        _keep_id(run_dir, name, secrets.token_hex(8))
    return _ids(run_dir)[name]


def _ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / _IDS
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _keep_id(run_dir: Path, name: str, value: str) -> None:
    (run_dir / _IDS).write_text(json.dumps({**_ids(run_dir), name: value}))
