"""Pre-training in three stages, each a supervised run of its own that begins with the last one's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.conf_files import STAGES
from caprl_async.config import Config, StageConfig
from caprl_async.jobs import sft


def run(config: Config) -> None:
    """Runs the stages that have data, each in its folder below `run_dir`; finished ones are passed over, one
    that was broken off goes on. `run_dir/model` leads to the last one's result.

    Raises:
        ConfError: a stage's folder holds what another conf has made.
        DataError, RingFailed: see `jobs.sft`.
    """
    console = Console(stderr=True)
    root = Path(config.run_dir)
    model = config.policy.model
    for number, name in enumerate(STAGES, 1):
        stage: StageConfig = getattr(config.pretrain, name)
        if not stage.data:
            continue
        folder = root / f"{number}-{name}"
        own = stage_config(config, stage, folder, model)
        if (folder / conf.RESOLVED).is_file() and not conf.is_resolved(own, folder):
            raise ConfError(
                f"{folder / conf.RESOLVED} is another conf's; choose another run_dir=... than {root}"
            )
        if (folder / "result.json").is_file():
            console.print(f"stage {name}: done already, in {folder}", markup=False, soft_wrap=True)
        else:
            console.print(f"stage {name}: {stage.steps} steps from {model}", markup=False, soft_wrap=True)
            sft.run(own)
        model = str((folder / "model").resolve())
    link = root / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(model))


def stage_config(config: Config, stage: StageConfig, folder: Path, model: str) -> Config:
    """The supervised run of one stage."""
    return dataclasses.replace(
        config,
        job="sft",
        run_dir=str(folder),
        resume=conf.has_run(folder),
        steps=stage.steps,
        data=dataclasses.replace(config.data, prompt=stage.prompt),
        policy=dataclasses.replace(config.policy, model=model),
        sft=dataclasses.replace(config.sft, data=stage.data, validation=stage.validation, batch=stage.batch),
        learner=dataclasses.replace(config.learner, lr=stage.lr, train_only=list(stage.train_only)),
    )
