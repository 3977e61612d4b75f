"""What a conf must hold beyond keys and types: values in range, settings that fit together, files that exist.

Used by conf.py alone; every check gives a sentence that names its keys and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from caprl_async import conf_files, conf_help, conf_learner, conf_loss, conf_values
from caprl_async.conf_bounds import BOUNDS, WRITERS
from caprl_async.conf_help import value_of
from caprl_async.config import (
    Blind,
    Config,
    EngineConfig,
    JudgeConfig,
    JudgeMode,
    RolloutConfig,
    WeightBackend,
)
from caprl_async.endpoint.protocol import patience_s
from caprl_async.judge.chat import clashes as endpoint_clashes
from caprl_async.judge.prompt import ALWAYS, WITH_LETTERS, PromptError, check_placeholders
from caprl_async.observe import trackers
from caprl_async.planning.estimate import GPUS

JOBS = {
    "train": conf_files.problems,
    "sft": conf_files.sft_problems,
    "pretrain": conf_files.pretrain_problems,
    "annotate": conf_files.annotate_problems,
    "evaluate": conf_files.evaluate_problems,
    "compare": conf_files.compare_problems,
    "curate": conf_files.curate_problems,
    "plan": conf_files.plan_problems,
    "report": conf_files.run_problems,
    "inspect": conf_files.run_problems,
    "replay": conf_files.run_problems,
}
"""Modules of caprl_async.jobs with a `run(config)`, and what looks at the files that each needs."""

Check = Callable[[Config], Iterator[str]]

ENGINE_DTYPES = ("float32", "bfloat16", "float16")


class ConfError(Exception):
    """A conf that cannot run; the message is for the user."""

    @classmethod
    def of(cls, problems: list[str]) -> ConfError:
        """One error for all of `problems`."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls(f"{len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems))


def check(config: Config) -> None:
    """Passes a conf that can run.

    Raises:
        ConfError: names everything that is wrong; files are looked at only when the values are right.
    """
    if config.job not in JOBS:
        raise ConfError(f"job={config.job} is none of {' | '.join(JOBS)}")
    settings: tuple[tuple[Check, ...], ...] = ((_ranges, _choices), *_SETTINGS.get(config.job, ()))
    for checks in (*settings, (JOBS[config.job],)):
        problems = [problem for find in checks for problem in find(config)]
        if problems:
            raise ConfError.of(problems)


def check_machine(config: Config) -> None:
    """Whether a ring that runs on this machine alone has the GPUs it asks for; imports torch.

    Raises:
        ConfError: with `ring.address=local` the GPUs are too few.
    """
    if config.ring.address != "local":
        return
    import torch

    ring = config.ring
    ours = 0 if config.judge.endpoint.url else config.judge.num_actors
    engines = ours + bool(config.evaluate.heldout_judge.model)
    wanted = (
        ring.gpus_per_rollout * config.rollout.num_actors
        + ring.gpus_per_judge * engines
        + ring.gpus_per_learner * config.learner.num_ranks
    )
    have = torch.cuda.device_count()
    if config.learner.device == "cuda" and not have:
        raise ConfError(
            "learner.device=cuda, but torch finds no GPU on this machine (ring.address=local); "
            "set learner.device=cpu and weights.backend=gloo, or join a cluster by ring.address"
        )
    if wanted > have:
        raise ConfError(
            f"ring.gpus_per_rollout, gpus_per_judge and gpus_per_learner add up to {wanted:g} GPUs, "
            f"this machine has {have}; use fewer actors or fractions of a GPU"
        )


# ---------------------------------------------------------------- one key at a time


def _ranges(config: Config) -> Iterator[str]:
    for leaf in conf_help.leaves():
        value = value_of(config, leaf.key)
        if problem := conf_values.problem(leaf.key, value):
            yield problem
        elif leaf.key in BOUNDS and value is not None and not BOUNDS[leaf.key][1](value):
            yield f"{leaf.key}={value} must be {BOUNDS[leaf.key][0]}"
    if config.rollout.group_size < 2:
        yield (
            f"rollout.group_size={config.rollout.group_size} must be 2 or more: learner.advantage.kind="
            f"{config.learner.advantage.kind.name} compares the captions of one image with each other"
        )


def _choices(config: Config) -> Iterator[str]:
    for key, allowed in (
        ("learner.dtype", ("float32", "bfloat16")),
        ("learner.device", ("cpu", "cuda")),
        ("rollout.engine.dtype", ENGINE_DTYPES),
        ("judge.engine.dtype", ENGINE_DTYPES),
        *((f"{who}.engine.dtype", ENGINE_DTYPES) for who in WRITERS),
        ("plan.gpu", tuple(GPUS)),
        ("observe.log_level", ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")),
    ):
        value = value_of(config, key)
        if value not in allowed:
            yield f"{key}={value} is none of {' | '.join(allowed)}"

    for role in ("rollout", "judge", "learner"):
        label = value_of(config, f"ring.{role}_label")
        if label and not all(label.partition("=")):
            yield f"ring.{role}_label={label} is not of the form key=value"


# ---------------------------------------------------------------- keys against each other


def _combinations(config: Config) -> Iterator[str]:
    yield from trackers.problems(config.observe.trackers)
    yield from _device(config)
    yield from _engines(config)
    yield from _sampling(config)
    yield from _queue(config)
    yield from conf_loss.problems(config)
    yield from conf_learner.problems(config)
    yield from _judging(config)
    yield from _rating(config)
    yield from _endpoint(config)
    yield from _heldout(config)


def _device(config: Config) -> Iterator[str]:
    learner, ring = config.learner, config.ring
    backend = config.weights.backend
    if learner.device == "cpu" and backend is not WeightBackend.gloo:
        yield (
            f"learner.device=cpu with weights.backend={backend.name}: {backend.name} moves GPU memory only; "
            "use weights.backend=gloo"
        )
    if backend is WeightBackend.ipc and learner.num_ranks > 1:
        yield (
            f"weights.backend=ipc with learner.num_ranks={learner.num_ranks}: ipc hands over the memory of "
            "one rank; use weights.backend=nccl"
        )
    if learner.device == "cuda":
        elsewhere = config.judge.endpoint.url and not config.evaluate.heldout_judge.model
        for key in ("gpus_per_rollout", "gpus_per_judge", "gpus_per_learner"):
            if not getattr(ring, key) and not (key == "gpus_per_judge" and elsewhere):
                yield (
                    f"learner.device=cuda with ring.{key}=0: what reserves no GPU would be on "
                    f"the first one, beside others; set ring.{key} (a fraction shares a GPU)"
                )


def _supervised(config: Config) -> Iterator[str]:
    yield from trackers.problems(config.observe.trackers)
    yield from _device(config)
    yield from conf_learner.problems(config)
    yield from _pixels(config)
    if config.data.heldout:
        yield from _engines(config)
        yield from _judging(config)
        yield from _rating(config)
        yield from _endpoint(config)
    yield from _heldout(config)


_SETTINGS: Mapping[str, tuple[tuple[Check, ...], ...]] = {
    "train": ((_combinations,),),
    "sft": ((_supervised,),),
    "pretrain": ((_supervised,),),
}
"""Beside the values one by one, what must fit together for a job."""


def _engines(config: Config) -> Iterator[str]:
    yield from _numbers("rollout", config.rollout)
    yield from _numbers("judge", config.judge)
    yield from _panel(config)
    yield from _engine("rollout.engine", config.rollout.engine, config)
    yield from _engine("judge.engine", config.judge.engine, config)


def _numbers(key: str, actors: RolloutConfig | JudgeConfig) -> Iterator[str]:
    if 0 < actors.max_actors < actors.num_actors:
        yield (
            f"{key}.max_actors={actors.max_actors} is below {key}.num_actors={actors.num_actors}; "
            "0 lets none join"
        )


def _panel(config: Config) -> Iterator[str]:
    judge = config.judge
    models = 1 + len(judge.also)
    if judge.also and judge.endpoint.url:
        yield "judge.also with judge.endpoint.url: several judges are engines of ours; name judge.model too"
    elif judge.num_actors < models:
        yield (
            f"judge.num_actors={judge.num_actors} with {models} models (judge.model, judge.also): each needs "
            "an actor"
        )
    if config.evaluate.heldout_judge.model in judge.also:
        yield (
            "evaluate.heldout_judge.model is in judge.also: a judge that training uses cannot show that the "
            "captions serve others"
        )


def _engine(key: str, engine: EngineConfig, config: Config) -> Iterator[str]:
    if config.learner.device == "cpu" and engine.block_size is not None and engine.block_size % 32:
        yield (
            f"{key}.block_size={engine.block_size} with learner.device=cpu: attention on the CPU takes "
            "multiples of 32"
        )
    if engine.block_size is not None and engine.block_size < 1:
        yield f"{key}.block_size={engine.block_size} must be 1 or more, or null"
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        yield (
            f"{key}.max_num_batched_tokens={engine.max_num_batched_tokens} is below {key}.max_num_seqs="
            f"{engine.max_num_seqs}: each running sequence needs one token per step"
        )
    if config.learner.device == "cpu" and engine.max_num_batched_tokens < engine.max_model_len:
        yield (
            f"{key}.max_num_batched_tokens={engine.max_num_batched_tokens} is below {key}.max_model_len="
            f"{engine.max_model_len}: a prompt is prefilled in one piece on the CPU"
        )
    reserved = "gpus_per_rollout" if key.startswith("rollout") else "gpus_per_judge"
    gpus = getattr(config.ring, reserved)
    if config.learner.device == "cuda" and engine.tensor_parallel_size > max(1, gpus):
        yield (
            f"{key}.tensor_parallel_size={engine.tensor_parallel_size} with ring.{reserved}={gpus:g}: "
            "an engine sees only the GPUs that its actor reserves"
        )


def _pixels(config: Config) -> Iterator[str]:
    policy = config.policy
    if policy.min_pixels > policy.max_pixels:
        yield f"policy.min_pixels={policy.min_pixels} is above policy.max_pixels={policy.max_pixels}"


def _sampling(config: Config) -> Iterator[str]:
    rollout, reward = config.rollout, config.reward
    if rollout.max_tokens >= rollout.engine.max_model_len:
        yield (
            f"rollout.max_tokens={rollout.max_tokens} with rollout.engine.max_model_len="
            f"{rollout.engine.max_model_len}: no room is left for the prompt and the image"
        )
    yield from _pixels(config)
    if reward.length_max <= reward.length_free:
        yield (
            f"reward.length_max={reward.length_max} must be above reward.length_free={reward.length_free}: "
            "the length term falls from one to the other"
        )
    if reward.length and rollout.max_tokens <= reward.length_free:
        yield (
            f"reward.length={reward.length:g} with rollout.max_tokens={rollout.max_tokens} and reward."
            f"length_free={reward.length_free}: no caption is long enough to lose any of it"
        )
    if not (reward.accuracy or reward.length or reward.format or reward.length_cost):
        yield (
            "reward.accuracy, reward.length, reward.format and reward.length_cost are all 0: all captions "
            "would be equal"
        )
    if config.data.adaptive_questions and not config.data.questions_per_image:
        yield (
            "data.adaptive_questions=true with data.questions_per_image=0: all questions are asked, so there "
            "is nothing to allocate"
        )
    if config.data.adaptive_questions and config.reward.blind is not Blind.off:
        yield (
            f"data.adaptive_questions=true with reward.blind={config.reward.blind.name}: what the questions "
            "that were not drawn would have lost is not known, so the reward would be biased"
        )
    if config.data.adaptive_questions and config.judge.mode is JudgeMode.sample:
        yield (
            "data.adaptive_questions=true with judge.mode=sample: that mode draws questions of its own, so "
            "the reward would be biased"
        )


def _queue(config: Config) -> Iterator[str]:
    replay, learner = config.replay, config.learner
    if replay.min_group > config.rollout.group_size:
        yield (
            f"replay.min_group={replay.min_group} is above rollout.group_size={config.rollout.group_size}: "
            "no group could ever be trained on"
        )
    if replay.batch_groups < learner.num_ranks:
        yield (
            f"replay.batch_groups={replay.batch_groups} is below learner.num_ranks={learner.num_ranks}: "
            "a rank would have no group"
        )
    if config.weights.broadcast_interval > replay.max_staleness + 1:
        yield (
            f"weights.broadcast_interval={config.weights.broadcast_interval} with replay.max_staleness="
            f"{replay.max_staleness}: the engines' weights would be too old for every batch before the next "
            "broadcast"
        )


def _judging(config: Config) -> Iterator[str]:
    prompt = config.judge.prompt
    modes = {"judge.mode": config.judge.mode}
    if config.evaluate.heldout_judge.mode is not None:
        modes["evaluate.heldout_judge.mode"] = config.evaluate.heldout_judge.mode
    for key, mode in modes.items():
        if config.judge.temperature == 0 and mode in (JudgeMode.expected, JudgeMode.likelihood):
            yield (
                f"judge.temperature=0 with {key}={mode.name}: probabilities need a temperature; only sample "
                "and text have a greedy judge"
            )
        try:
            check_placeholders(prompt, ALWAYS)
            if mode in (JudgeMode.expected, JudgeMode.sample):
                check_placeholders(prompt, WITH_LETTERS)
        except PromptError as error:
            yield f"{error} ({key}={mode.name})"
    if not prompt.abstain.strip():
        yield "judge.prompt.abstain must be a text: it is an option of every question"


def _rating(config: Config) -> Iterator[str]:
    heldout = config.evaluate.heldout_judge
    if heldout.mode is JudgeMode.rate:
        yield "evaluate.heldout_judge.mode=rate: what is held out are questions; take another mode"
    if config.judge.mode is not JudgeMode.rate:
        return
    if heldout.model and heldout.mode is None:
        yield (
            "judge.mode=rate with evaluate.heldout_judge.model: that one answers questions; set "
            "evaluate.heldout_judge.mode"
        )
    if config.reward.blind is not Blind.off:
        yield f"judge.mode=rate with reward.blind={config.reward.blind.name}: no question is asked"
    if config.data.adaptive_questions:
        yield "judge.mode=rate with data.adaptive_questions=true: no question is asked"


def _endpoint(config: Config) -> Iterator[str]:
    endpoint = config.judge.endpoint
    if not endpoint.url:
        return
    yield from endpoint_clashes(config.judge)
    key = endpoint.api_key_env
    if key and config.ring.address == "local" and not os.environ.get(key):
        yield f"judge.endpoint.api_key_env={key}: there is no environment variable of that name"
    longest = patience_s(endpoint)
    if longest > config.replay.lease_timeout_s:
        yield (
            f"judge.endpoint.timeout_s={endpoint.timeout_s:g} and .retries={endpoint.retries} let one "
            f"request take {longest:.0f} s, but replay.lease_timeout_s={config.replay.lease_timeout_s:g} "
            "gives the work to another before: lower these, or raise that"
        )


def _heldout(config: Config) -> Iterator[str]:
    data, evaluate = config.data, config.evaluate
    if data.heldout and data.heldout == data.train:
        yield f"data.heldout and data.train are the same file, {data.train}: nothing would be held out"
    if not data.heldout:
        if evaluate.interval:
            yield f"evaluate.interval={evaluate.interval} needs data.heldout, which is empty"
        if evaluate.heldout_judge.model:
            yield "evaluate.heldout_judge.model needs data.heldout, which is empty"
    if evaluate.heldout_judge.data and not evaluate.heldout_judge.model:
        yield "evaluate.heldout_judge.data needs evaluate.heldout_judge.model, which is empty"
    trained_by = "" if config.judge.endpoint.url else config.judge.model
    if evaluate.heldout_judge.model and evaluate.heldout_judge.model == trained_by:
        yield (
            "evaluate.heldout_judge.model and judge.model are the same folder: a judge that training uses "
            "is not held out"
        )
