"""What each number of a conf may be; used by conf_checks.py alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Bound: TypeAlias = tuple[str, Callable[[Any], bool]]
_POSITIVE: Bound = ("above 0", lambda v: v > 0)
_NOT_NEGATIVE: Bound = ("0 or more", lambda v: v >= 0)
_AT_LEAST_1: Bound = ("1 or more", lambda v: v >= 1)
_SHARE: Bound = ("between 0 and 1", lambda v: 0 <= v <= 1)

WRITERS = ("captioner", "answerer", "grader")
"""Keys of models that write."""

_ENGINE: dict[str, Bound] = {
    "max_model_len": _AT_LEAST_1,
    "max_num_seqs": _AT_LEAST_1,
    "max_num_batched_tokens": _AT_LEAST_1,
    "kv_cache_gib": _POSITIVE,
    "gpu_memory_utilization": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "tensor_parallel_size": _AT_LEAST_1,
    "threads": _NOT_NEGATIVE,
}
_ENDPOINT: dict[str, Bound] = {
    "timeout_s": _POSITIVE,
    "retries": _NOT_NEGATIVE,
    "max_in_flight": _AT_LEAST_1,
}
_WRITER: dict[str, Bound] = {
    "min_pixels": _AT_LEAST_1,
    "max_pixels": _AT_LEAST_1,
    "temperature": ("0 (greedy) or 0.01 or more, vLLM's least", lambda v: v == 0 or v >= 0.01),
    "max_tokens": _AT_LEAST_1,
    "num_actors": _AT_LEAST_1,
    "gpus_per_actor": _NOT_NEGATIVE,
    "batch_rows": _AT_LEAST_1,
    "refusals": _NOT_NEGATIVE,
    **{f"engine.{name}": bound for name, bound in _ENGINE.items()},
    **{f"endpoint.{name}": bound for name, bound in _ENDPOINT.items()},
}
BOUNDS: dict[str, Bound] = {
    "steps": _AT_LEAST_1,
    "begin": _NOT_NEGATIVE,
    "seed": ("in [0, 2^31)", lambda v: 0 <= v < 2**31),
    "data.questions_per_image": _NOT_NEGATIVE,
    "policy.min_pixels": _AT_LEAST_1,
    "policy.max_pixels": _AT_LEAST_1,
    "rollout.num_actors": _AT_LEAST_1,
    "rollout.temperature": _POSITIVE,
    "rollout.max_tokens": _AT_LEAST_1,
    "rollout.max_requests_in_flight_per_actor": _AT_LEAST_1,
    **{f"rollout.engine.{name}": bound for name, bound in _ENGINE.items()},
    "judge.num_actors": _AT_LEAST_1,
    "judge.permutations": _AT_LEAST_1,
    "judge.draws": _AT_LEAST_1,
    "judge.text_tokens": _AT_LEAST_1,
    "judge.temperature": ("0 (greedy) or 0.01 or more, vLLM's least", lambda v: v == 0 or v >= 0.01),
    "judge.max_requests_in_flight_per_actor": _AT_LEAST_1,
    "judge.cache_size": _NOT_NEGATIVE,
    **{f"judge.endpoint.{name}": bound for name, bound in _ENDPOINT.items()},
    **{f"judge.engine.{name}": bound for name, bound in _ENGINE.items()},
    "reward.length_free": _NOT_NEGATIVE,
    "reward.length_cost": _NOT_NEGATIVE,
    "reward.absent": _NOT_NEGATIVE,
    "reward.blind_limit": _SHARE,
    "reward.quorum": _SHARE,
    "replay.batch_groups": _AT_LEAST_1,
    "replay.max_staleness": _NOT_NEGATIVE,
    "replay.min_group": ("2 or more, because an advantage compares captions", lambda v: v >= 2),
    "replay.max_attempts": _AT_LEAST_1,
    "replay.lease_timeout_s": _POSITIVE,
    "replay.peer_timeout_s": ("2 or more: peers give a sign of life twice a second", lambda v: v >= 2),
    "replay.judge_failures": _AT_LEAST_1,
    "replay.judge_outage_s": _POSITIVE,
    "replay.min_reward_spread": _POSITIVE,
    "replay.max_evicted_batches": _POSITIVE,
    "learner.num_ranks": _AT_LEAST_1,
    "learner.lr": _POSITIVE,
    "learner.warmup_steps": _NOT_NEGATIVE,
    "learner.min_lr_ratio": _SHARE,
    "learner.betas": ("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v)),
    "learner.weight_decay": _NOT_NEGATIVE,
    "learner.grad_norm": _POSITIVE,
    "learner.updates_per_batch": _AT_LEAST_1,
    "learner.advantage.clip": _NOT_NEGATIVE,
    "learner.sum_length": _NOT_NEGATIVE,
    "learner.entropy_coef": _NOT_NEGATIVE,
    "learner.kl.coef": _NOT_NEGATIVE,
    "learner.correction.importance.low": (
        "in [0, 1]: above 1 it would raise tokens that are not stale at all",
        lambda v: 0 <= v <= 1,
    ),
    "learner.correction.importance.high": (
        "0 (no bound) or at least 1: below 1 it would shrink tokens that are not stale at all",
        lambda v: v == 0 or v >= 1,
    ),
    "learner.correction.trust_region.clip_low": ("in (0, 1]", lambda v: 0 < v <= 1),
    "learner.correction.trust_region.clip_high": _POSITIVE,
    "learner.correction.trust_region.dual_clip": ("0 (none) or above 1", lambda v: v == 0 or v > 1),
    "learner.micro_batch_tokens": _AT_LEAST_1,
    "learner.logprob_chunk": _AT_LEAST_1,
    "learner.zero_stage": ("0, 1, 2 or 3", lambda v: 0 <= v <= 3),
    "learner.lora.rank": _NOT_NEGATIVE,
    "learner.lora.alpha": _POSITIVE,
    "learner.threads": _NOT_NEGATIVE,
    "weights.broadcast_interval": _AT_LEAST_1,
    "weights.timeout_s": _POSITIVE,
    "evaluate.interval": _NOT_NEGATIVE,
    "evaluate.images": _NOT_NEGATIVE,
    "evaluate.probe_images": _NOT_NEGATIVE,
    "evaluate.temperature": _NOT_NEGATIVE,
    **{f"{who}.{name}": bound for who in WRITERS for name, bound in _WRITER.items()},
    "prism.captions": _AT_LEAST_1,
    "prism.limit": _NOT_NEGATIVE,
    "annotate.captions": _AT_LEAST_1,
    "annotate.rows_per_file": _AT_LEAST_1,
    "checkpoint.interval": _AT_LEAST_1,
    "checkpoint.keep": _AT_LEAST_1,
    "ring.object_store_mb": ("80 or more (Ray's own minimum)", lambda v: v >= 80),
    "ring.cpus_per_actor": _NOT_NEGATIVE,
    "ring.gpus_per_rollout": _NOT_NEGATIVE,
    "ring.gpus_per_judge": _NOT_NEGATIVE,
    "ring.gpus_per_learner": _NOT_NEGATIVE,
    "ring.start_timeout_s": _POSITIVE,
    "ring.hang_timeout_s": ("5 or more: a sign of life comes every second", lambda v: v >= 5),
    "ring.driver_restarts": _NOT_NEGATIVE,
    "ring.restarts": _NOT_NEGATIVE,
    "replay.ledger_mb": _NOT_NEGATIVE,
    "observe.samples_per_step": _NOT_NEGATIVE,
    "observe.gallery_images": _NOT_NEGATIVE,
}
