"""Names of the metrics that people are shown, and of their file; learner, hub and supervisor give them."""

from __future__ import annotations

from collections.abc import Mapping

METRICS = "metrics.jsonl"
"""The file of a run folder that holds them, from the moment at which training begins."""

REWARD = "reward_mean"
ACCURACY = "accuracy_mean"
LENGTH = "caption_length_mean"
CAPTIONS_PER_S = "captions_per_s"
STALENESS = "staleness_mean"
STALENESS_MAX = "staleness_max"
LOGPROB_GAP = "logprob_gap_mean"
LOGPROB_GAP_FRESH = "logprob_gap_fresh_mean"
WAIT_S = "learner_wait_s"
STEP_S = "learner_step_s"
SYNC_S = "weight_sync_s"

QUEUE = {
    "generating": "queue_generating",
    "to judge": "queue_waiting_judge",
    "judging": "queue_judging",
    "ready": "queue_ready",
}
"""Where groups are in the hub, in the order of their way through it."""

STAGES = ("rollout", "judge", "learner")


def idle(metrics: Mapping[str, float | None], stage: str) -> float | None:
    """Share of the time in which a stage had nothing to do, 0..1; None if the metrics do not say."""
    if (share := metrics.get(f"idle_{stage}")) is not None:
        return share
    wait, busy = metrics.get(WAIT_S), metrics.get(STEP_S)
    if stage == "learner" and wait is not None and busy is not None and wait + busy > 0:
        return wait / (wait + busy)
    return None
