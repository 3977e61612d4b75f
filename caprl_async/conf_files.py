"""Checks that the files a conf names are there and are what they should be; nothing large is read.

Part of conf_checks.py, which asks for these problems when the values are right.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caprl_async.benchmarks.table import BENCHMARKS, CAPRL_QA, GRADED
from caprl_async.conf_help import value_of
from caprl_async.config import Config, JudgeMode, WriterConfig
from caprl_async.endpoint.protocol import url_problems
from caprl_async.judge.chat import clashes as endpoint_clashes
from caprl_async.prism.names import EVALUATED

INPUT_FILES = {"data.train": True, "data.heldout": False, "evaluate.heldout_judge.data": False}
"""Keys that name a data file, and whether the run needs one."""

INPUT_MODELS = {
    "policy.model": True,
    "judge.model": True,
    "evaluate.heldout_judge.model": False,
    "evaluate.dense_policy": False,
}
"""Keys that name the folder of a checkpoint, and whether the run needs one."""

FURTHER_JUDGES = "judge.also"
"""The same, of which it may name several."""

STAGES = ("align", "further", "tune")
"""Of job=pretrain, in order."""

LEDGER = "ledger.sqlite"
"""The file of a run folder that holds every prompt's life, from the moment at which the queue is up."""


RECORDED = ("conf.yaml", LEDGER)
"""What every run folder holds."""


def problems(config: Config) -> Iterator[str]:
    """A sentence for each file that is missing or wrong, of those that training needs."""
    yield from _files(config)
    yield from _models(config)
    yield from _program(config)
    yield from _resume(config)


def sft_problems(config: Config) -> Iterator[str]:
    """The same for supervised training; without held-out questions it needs no judge."""
    for key, path in (("sft.data", config.sft.data), ("sft.validation", config.sft.validation)):
        if key == "sft.data" and not path:
            yield "sft.data is empty: job=sft needs images with texts"
        elif path and not Path(path).exists():
            yield f"{key}={path} does not exist"
    yield from _measuring(config)
    yield from _resume(config)


def _measuring(config: Config) -> Iterator[str]:
    """Of supervised training, which needs a judge only to be measured by it."""
    if config.data.heldout:
        found = (problem for find in (_files, _models, _program) for problem in find(config))
        yield from (problem for problem in found if not problem.startswith("data.train"))
    elif problem := _model_problem("policy.model", Path(config.policy.model), config):
        yield problem


def pretrain_problems(config: Config) -> Iterator[str]:
    """The same for all stages of pre-training."""
    stages = {name: getattr(config.pretrain, name) for name in STAGES}
    if not any(stage.data for stage in stages.values()):
        yield f"no stage has data: set {' or '.join(f'pretrain.{name}.data' for name in STAGES)}"
    for name, stage in stages.items():
        for key, path in (("data", stage.data), ("validation", stage.validation)):
            if path and not Path(path).exists():
                yield f"pretrain.{name}.{key}={path} does not exist"
        if stage.data and stage.train_only and config.learner.lora.rank:
            yield f"pretrain.{name}.train_only with learner.lora.rank: only the adapters would be trained"
        if stage.data and stage.steps < 1:
            yield f"pretrain.{name}.steps={stage.steps}: a stage with data needs steps"
    yield from _measuring(config)


def plan_problems(config: Config) -> Iterator[str]:
    """The same for the job that plans: configs of checkpoints are enough, without weights."""
    models = [("policy.model", config.policy.model)]
    if not config.judge.endpoint.url:
        models.append(("judge.model", config.judge.model))
        models += [(FURTHER_JUDGES, path) for path in config.judge.also]
    for key, folder in models:
        if not (Path(folder) / "config.json").is_file():
            yield f"{key}={folder} holds no config.json; job=plan needs that of a Hugging Face checkpoint"


def run_problems(config: Config) -> Iterator[str]:
    """The same for jobs that read what a run has left."""
    folder = Path(config.run)
    if not config.run:
        yield f"run is empty: job={config.job} needs the folder of a run, as run=runs/demo"
    elif not folder.is_dir():
        near = sorted({path.parent.name for path in folder.parent.glob(f"*/{RECORDED[-1]}")})
        yield f"run={folder} is no folder" + (f"; {folder.parent} has {', '.join(near)}" if near else "")
    elif missing := [name for name in RECORDED if not (folder / name).is_file()]:
        yield f"run={folder} is no run's folder: it holds no {' and no '.join(missing)}"


def annotate_problems(config: Config) -> Iterator[str]:
    """The same for the job that captions a data set."""
    images, folder = config.data.images, Path(config.run_dir)
    if not images:
        yield "data.images is empty: job=annotate needs a folder of images, or of .parquet or .tar files"
    elif not Path(images).exists():
        yield f"data.images={images} does not exist"
    yield from writer_problems(config.captioner, "captioner", sees=True)
    begun = any((folder / "captions").glob("captions-*"))
    if begun and not config.resume:
        yield f"run_dir={folder} already holds captions; go on with them by resume=true, or choose another"


def evaluate_problems(config: Config) -> Iterator[str]:
    """The same for the job that measures captions."""
    prism, folder = config.prism, Path(config.run_dir)
    known = ", ".join((*BENCHMARKS, CAPRL_QA))
    judged = prism.benchmark == CAPRL_QA
    if prism.benchmark not in BENCHMARKS and not judged:
        yield f"prism.benchmark={prism.benchmark!r} is no benchmark that is known; known are {known}"
    if not prism.data:
        yield "prism.data is empty: name the benchmark's .tsv, .parquet or .json file"
    elif not Path(prism.data).exists():
        yield f"prism.data={prism.data} does not exist"
    for placeholder in ("{caption}", "{question}"):
        if prism.template.count(placeholder) != 1:
            yield f"prism.template must hold {placeholder} exactly once"
    if not prism.captions_from:
        yield from writer_problems(config.captioner, "captioner", sees=True)
    elif not Path(prism.captions_from).exists():
        yield f"prism.captions_from={prism.captions_from} does not exist"
    if judged:
        yield from judge_problems(config)
    else:
        yield from writer_problems(config.answerer, "answerer", sees=False)
    if prism.benchmark in GRADED:
        yield from writer_problems(config.grader, "grader", sees=False)
    begun = [name for name in ("captions", "answers", "verdicts") if any((folder / name).glob(f"{name}-*"))]
    if begun and not config.resume:
        yield f"run_dir={folder} already holds {begun[0]}; go on with them by resume=true, or choose another"


def compare_problems(config: Config) -> Iterator[str]:
    """The same for the job that compares evaluations."""
    runs = config.compare.runs
    if not runs:
        yield "compare.runs is empty: name run folders of job=evaluate, as compare.runs=[runs/a,runs/b]"
    if len(set(runs)) < len(runs):
        yield f"compare.runs={runs} names a run twice"
    for folder in map(Path, runs):
        if missing := [name for name in EVALUATED if not (folder / name).is_file()]:
            yield f"compare.runs: {folder} is no evaluation that is through (no {', no '.join(missing)})"


def curate_problems(config: Config) -> Iterator[str]:
    """The same for the job that makes questions."""
    curate, folder = config.curate, Path(config.run_dir)
    if curate.questions_from:
        if not Path(curate.questions_from).exists():
            yield f"curate.questions_from={curate.questions_from} does not exist"
    elif not config.data.images:
        yield "data.images is empty: job=curate needs images (or questions, curate.questions_from)"
    elif not Path(config.data.images).exists():
        yield f"data.images={config.data.images} does not exist"
    else:
        yield from writer_problems(config.questioner, "questioner", sees=True)
    if curate.exclude and not Path(curate.exclude).exists():
        yield f"curate.exclude={curate.exclude} does not exist"
    checker, judge = config.checker, config.judge
    if checker.model or checker.endpoint.url:
        yield from writer_problems(checker, "checker", sees=True)
    if judge.model or judge.endpoint.url:
        yield from judge_problems(config)
    elif not (checker.model or checker.endpoint.url):
        yield "checker.model (or .endpoint.url) is empty, and judge.model too: nobody checks the questions"
    begun = [name for name in ("written", "checked", "judged") if any((folder / name).glob(f"{name}-*"))]
    if begun and not config.resume:
        yield f"run_dir={folder} already holds a curation; go on with it by resume=true, or choose another"


def writer_problems(config: WriterConfig, key: str, *, sees: bool) -> Iterator[str]:
    """The same for a model that writes; `sees`: it is shown images."""
    if config.endpoint.url:
        yield from url_problems(config.endpoint.url, f"{key}.endpoint")
        return
    folder = Path(config.model)
    if not config.model:
        yield f"{key}.model is empty: name the folder of a checkpoint (or set {key}.endpoint.url)"
    elif not (folder / "config.json").is_file():
        yield f"{key}.model={folder} is no folder of a Hugging Face checkpoint (it holds no config.json)"
    elif sees and "vision_config" not in (folder / "config.json").read_text(encoding="utf-8"):
        yield f"{key}.model={folder} has no vision tower (vision_config); it must see images"


def judge_problems(config: Config) -> Iterator[str]:
    """The same for the judge."""
    model = config.judge.model
    if config.judge.mode is JudgeMode.rate:
        yield f"judge.mode=rate rates captions; job={config.job} asks questions: take another mode"
    if config.judge.mode is JudgeMode.sample:
        yield f"judge.mode=sample draws some of the questions; job={config.job} asks all: take another mode"
    if config.judge.endpoint.url:
        yield from endpoint_clashes(config.judge)
        return
    if not model:
        yield "judge.model is empty: name the folder of a checkpoint (or set judge.endpoint.url)"
    elif problem := _model_problem("judge.model", Path(model), config):
        yield problem


def _files(config: Config) -> Iterator[str]:
    for key, needed in INPUT_FILES.items():
        path = value_of(config, key)
        if not path and needed:
            yield f"{key} is empty: the run needs a data file (parquet or jsonl)"
        elif not path:
            continue
        elif Path(path).is_dir():
            if not any(Path(path).glob("*.parquet")):
                yield f"{key}={path} is a folder without .parquet files"
        elif not Path(path).is_file():
            yield f"{key}={path} is no file"
        elif Path(path).suffix not in (".parquet", ".jsonl"):
            yield f"{key}={path} is neither .parquet nor .jsonl"


def _models(config: Config) -> Iterator[str]:
    for key, needed in INPUT_MODELS.items():
        if key == "judge.model" and config.judge.endpoint.url:
            continue  # the judge is served elsewhere
        path = value_of(config, key)
        if not path:
            if needed:
                served = " (or judge.endpoint.url)" if key == "judge.model" else ""
                yield f"{key} is empty: the run needs the folder of a checkpoint{served}"
            continue
        problem = _model_problem(key, Path(path), config)
        if problem:
            yield problem
    for path in config.judge.also:
        if problem := _model_problem(FURTHER_JUDGES, Path(path), config):
            yield problem


def _model_problem(key: str, folder: Path, config: Config) -> str | None:
    if not folder.is_dir():
        return f"{key}={folder} is no folder; name the folder of a Hugging Face checkpoint"
    if not (folder / "config.json").is_file():
        return f"{key}={folder} holds no config.json, so it is no Hugging Face checkpoint"
    if not any(folder.glob("*.safetensors")):
        return f"{key}={folder} holds no *.safetensors; save the checkpoint in that format"
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{key}={folder}/config.json is not valid json: {error}"
    rooms = ("vision_config", "text_config")
    if not isinstance(architecture, dict) or not all(
        isinstance(architecture.get(r, {}), dict) for r in rooms
    ):
        return f"{key}={folder}/config.json is no description of a model"
    captioner = key in ("policy.model", "evaluate.dense_policy")
    rater = config.judge.mode is JudgeMode.rate and key in ("judge.model", FURTHER_JUDGES)
    if rater and "vision_config" not in architecture:
        return f"{key}={folder} has no vision tower (vision_config); with judge.mode=rate it must see"
    if captioner and "vision_config" not in architecture:
        return f"{key}={folder} has no vision tower (vision_config); a captioner must see"
    if captioner and not (
        "image_token_id" in architecture and "spatial_merge_size" in architecture["vision_config"]
    ):
        kind = architecture.get("model_type")
        return (
            f"{key}={folder} is a {kind}, which takes no images as patches with a grid, as Qwen-VL models do"
        )
    if rater:
        return _too_long(key, folder, architecture, config)
    if not captioner and "vision_config" in architecture:
        return f"{key}={folder} has a vision tower; a judge must be a text-only model"
    named = architecture.get("architectures") or []
    answers = isinstance(named, list) and any(str(name).endswith("ForCausalLM") for name in named)
    if not captioner and not answers:
        return f"{key}={folder} is {named or 'of no named architecture'}; a judge must be a ...ForCausalLM"
    return _too_long(key, folder, architecture, config)


def _too_long(key: str, folder: Path, architecture: dict[str, Any], config: Config) -> str | None:
    text = architecture.get("text_config", architecture)
    longest = text.get("max_position_embeddings")
    if key == "policy.model":
        engine, length = "rollout.engine", config.rollout.engine.max_model_len
    elif key in ("judge.model", FURTHER_JUDGES):
        engine, length = "judge.engine", config.judge.engine.max_model_len
    else:
        return None
    if isinstance(longest, int) and length > longest:
        return f"{engine}.max_model_len={length} is above the {longest} positions of {key}={folder}"
    return None


def _program(config: Config) -> Iterator[str]:
    text = config.evaluate.program
    if not text:
        return
    module, colon, function = text.partition(":")
    if not (module and colon and function):
        yield f"evaluate.program={text} is not of the form module:function"
        return
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # importing runs the user's module
        yield f"evaluate.program={text}: {type(error).__name__}: {error}"
        return
    if not callable(found):
        yield f"evaluate.program={text}: module {module} has no function {function}"


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run folder holds a checkpoint to go on from."""
    return any((run_dir / "checkpoints").glob("step-*/manifest.json"))


def has_run(run_dir: Path) -> bool:
    """Whether a run folder holds a run that has begun; without a checkpoint it begins again on a resume."""
    return (run_dir / LEDGER).is_file() or has_checkpoint(run_dir)


def _resume(config: Config) -> Iterator[str]:
    if config.resume and not has_run(Path(config.run_dir)):
        yield (
            f"resume=true, but run_dir={config.run_dir} holds no checkpoint, nor a run that has begun; start "
            "anew with resume=false and another run_dir"
        )
