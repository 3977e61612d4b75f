"""Settings of the learner's memory and adapters that contradict each other; part of conf_checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from caprl_async.config import Config


def problems(config: Config) -> Iterator[str]:
    """A sentence for each pair of keys that clash."""
    learner = config.learner
    if learner.offload_optimizer and learner.zero_stage == 0:
        yield (
            "learner.offload_optimizer=true with learner.zero_stage=0: DeepSpeed offloads only what ZeRO "
            "partitions; use zero_stage=1, 2 or 3"
        )
    lora = learner.lora
    if lora.targets and not lora.rank:
        yield (
            f"learner.lora.targets={lora.targets} with learner.lora.rank=0: there are no adapters; "
            "set a rank, as 16"
        )
    if lora.rank and learner.train_only:
        yield (
            f"learner.train_only={learner.train_only} with learner.lora.rank={lora.rank}: with adapters only "
            "these are trained; set one or the other"
        )
    if not all(target.strip(". ") for target in lora.targets):
        yield f"learner.lora.targets={lora.targets}: each must be the ending of a layer's name, as q_proj"
