"""What a training conf needs of GPUs, before anything starts: memory, time, bottleneck, a better split.

Reads the conf and the checkpoints' configs alone; nothing is loaded and nothing is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from caprl_async.conf import ConfError
from caprl_async.config import Config
from caprl_async.planning.estimate import (
    GPUS,
    Gpu,
    Learning,
    Rates,
    Split,
    Work,
    best_split,
    engine_gib,
    judge_s,
    learner_gib,
    learner_s,
    rollout_s,
    split,
    sync_s,
)
from caprl_async.planning.model import Shape, read_shape

ROLES = ("rollout", "judge", "learner")


def run(config: Config) -> None:
    """
    Raises:
        ConfError: a checkpoint's config cannot be read, or a role does not fit its GPUs.
    """
    console = Console()
    policy = _shape(config.policy.model, "policy.model")
    judge = _largest_judge(config) if not config.judge.endpoint.url else None
    gpu, work = GPUS[config.plan.gpu], work_of(config, policy)
    gpus = gpus_of(config)
    memory = memory_of(config, policy, judge, work)
    alone = seconds_of(config, policy, judge, work, gpu)
    console.print(_memory_table(memory, gpu, config.plan.gpu))
    now = split(gpus, alone) if all(gpus[role] for role in alone) else None
    if now is None:
        console.print(
            "The conf gives GPUs to no role or not to all (ring.gpus_per_*): as it is, it runs on CPUs."
        )
    learning = learning_of(config, policy)

    def fits(role: str, count: int) -> bool:
        return role != "learner" or learner_gib(policy, replace(learning, ranks=count)) <= gpu.memory_gib

    best = best_split(config.plan.gpus, units_of(config, alone), alone, fits)
    console.print(_split_table(now, best, work, config))
    seconds = sync_s(policy, config.plan.link_gb_s, config.rollout.num_actors)
    console.print(
        f"A weight sync moves {policy.parameters * 2 / 1e9:.1f} GB: about {seconds:.1f} s at "
        f"{config.plan.link_gb_s:g} GB/s."
    )
    if not_fitting := [role for role, gib in memory.items() if gib > gpu.memory_gib]:
        told = "; ".join(f"{role} needs {memory[role]:.0f} GiB" for role in not_fitting)
        raise ConfError(f"a {config.plan.gpu} has {gpu.memory_gib:.0f} GiB: {told}. {_advice(not_fitting)}")
    sharing = [role for role in memory if 0 < getattr(config.ring, f"gpus_per_{role}") < 1]
    if (together := sum(memory[role] for role in sharing)) > gpu.memory_gib:
        raise ConfError(
            f"a {config.plan.gpu} has {gpu.memory_gib:.0f} GiB: {', '.join(sharing)} share GPUs "
            f"(ring.gpus_per_*) and need {together:.0f} GiB together. {_advice(sharing)}"
        )


_TIME_TOKENS = 10  # [mm:ss] and what stands around a picture


def work_of(config: Config, policy: Shape) -> Work:
    """A batch of the conf, with images as large, and videos as long, as they may be."""
    plan, frames = config.plan, config.data.frames
    image = policy.image_tokens(config.policy.max_pixels) * max(1, frames)
    return Work(
        groups=config.replay.batch_groups,
        group_size=config.rollout.group_size,
        prompt_tokens=image + plan.prompt_tokens + _TIME_TOKENS * frames,
        image_tokens=image,
        caption_tokens=min(plan.caption_tokens, config.rollout.max_tokens),
        questions=plan.questions,
        question_tokens=plan.question_tokens * config.judge.permutations,
    )


def gpus_of(config: Config) -> dict[str, float]:
    """GPUs of each role, as the conf gives them; shares of them where roles share one."""
    ring = config.ring
    return {
        "rollout": config.rollout.num_actors * ring.gpus_per_rollout,
        "judge": 0.0 if config.judge.endpoint.url else config.judge.num_actors * ring.gpus_per_judge,
        "learner": config.learner.num_ranks * ring.gpus_per_learner,
    }


def units_of(config: Config, alone: dict[str, float]) -> dict[str, int]:
    """The fewest GPUs that a role can have, and have more of."""
    units = {
        "rollout": config.rollout.engine.tensor_parallel_size,
        "judge": config.judge.engine.tensor_parallel_size,
        "learner": 1,
    }
    return {role: units[role] for role in alone}


def learning_of(config: Config, policy: Shape) -> Learning:
    """What of the conf decides the learner's memory."""
    learner = config.learner
    return Learning(
        ranks=learner.num_ranks,
        zero_stage=max(learner.zero_stage, 1 if learner.dtype == "bfloat16" else 0),
        bytes_per_parameter=2 if learner.dtype == "bfloat16" else 4,
        offload=learner.offload_optimizer,
        adapters=2 * learner.lora.rank * policy.layers * (4 * policy.hidden + 3 * policy.inner),
        checkpointing=learner.gradient_checkpointing,
        micro_batch_tokens=learner.micro_batch_tokens,
        logprob_chunk=learner.logprob_chunk,
        frozen=policy.tower if learner.freeze_vision else 0,
        reference=learner.kl.coef > 0 and not learner.lora.rank,
    )


def memory_of(config: Config, policy: Shape, judge: Shape | None, work: Work) -> dict[str, float]:
    """GiB of one GPU of each role, at most."""
    engines = config.rollout.engine, config.judge.engine
    held = work.prompt_tokens + work.caption_tokens
    found = {"rollout": engine_gib(policy, held * 8, engines[0].tensor_parallel_size)}
    if judge is not None:
        held = work.caption_tokens + work.questions * work.question_tokens
        found["judge"] = engine_gib(judge, held * 8, engines[1].tensor_parallel_size)
    return {**found, "learner": learner_gib(policy, learning_of(config, policy))}


def seconds_of(config: Config, policy: Shape, judge: Shape | None, work: Work, gpu: Gpu) -> dict[str, float]:
    """Of a batch, on one GPU."""
    plan = config.plan
    rates = Rates(plan.train_share, plan.prefill_share, plan.decode_share)
    found = {"rollout": rollout_s(policy, work, gpu, rates, config.rollout.engine.max_num_seqs)}
    if judge is not None:
        found["judge"] = judge_s(judge, work, gpu, rates)
    found["learner"] = learner_s(policy, work, gpu, rates, config.learner.freeze_vision)
    return found


def _largest_judge(config: Config) -> Shape:
    judges = [_shape(config.judge.model, "judge.model")]
    judges += [_shape(folder, "judge.also") for folder in config.judge.also]
    return max(judges, key=lambda shape: shape.parameters)


def _shape(folder: str, key: str) -> Shape:
    try:
        return read_shape(Path(folder))
    except (ValueError, OSError, AttributeError) as error:
        raise ConfError(f"{key}={folder}: its config.json cannot be read: {error}") from error


def _advice(roles: list[str]) -> str:
    ways = {
        "learner": "learner.gradient_checkpointing, fewer learner.micro_batch_tokens, learner.zero_stage "
        "over more learner.num_ranks, learner.offload_optimizer or learner.lora.rank",
        "rollout": "rollout.engine.tensor_parallel_size",
        "judge": "judge.engine.tensor_parallel_size, or a smaller judge",
    }
    return "What helps: " + "; ".join(ways[role] for role in roles)


def _memory_table(memory: dict[str, float], gpu: Gpu, name: str) -> Table:
    table = Table(title=f"Memory of one GPU ({name}: {gpu.memory_gib:.0f} GiB)")
    for column in ("role", "needs, GiB", ""):
        table.add_column(column, justify="right" if column == "needs, GiB" else "left")
    for role, gib in memory.items():
        table.add_row(role, f"{gib:.1f}", "fits" if gib <= gpu.memory_gib else "[bold red]does not fit[/]")
    return table


def _split_table(now: Split | None, best: Split | None, work: Work, config: Config) -> Table:
    table = Table(
        title=f"A batch of {work.groups} x {work.group_size} captions of {work.caption_tokens:g} tokens"
    )
    table.add_column("")
    sides = {"as the conf says": now, f"best of {config.plan.gpus} GPUs": best}
    shown = {title: found for title, found in sides.items() if found is not None}
    for title in shown:
        table.add_column(title, justify="right")
    for role in ROLES:
        cells = [
            f"{found.gpus[role]:g} GPUs, {found.seconds[role]:.1f} s" if role in found.seconds else "served"
            for found in shown.values()
        ]
        table.add_row(role, *cells)
    table.add_row("bottleneck", *(found.bottleneck for found in shown.values()))
    table.add_row(
        "captions per second", *(f"{work.captions / found.batch_s:.1f}" for found in shown.values())
    )
    tokens = [work.captions * work.caption_tokens / found.batch_s for found in shown.values()]
    table.add_row("caption tokens per second", *(f"{one:,.0f}" for one in tokens))
    return table
