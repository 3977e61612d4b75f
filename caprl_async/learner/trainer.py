"""One learner rank's work on a batch, free of Ray and sockets: plan, compute, correct, update, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from caprl_async.config import Config, KLPlace, Proximal
from caprl_async.data.processor import PolicyProcessor
from caprl_async.learner.batch import (
    NotFinite,
    TrainSequence,
    make_sequences,
    split_updates,
    with_advantages,
)
from caprl_async.learner.corrections import proximal_logprobs
from caprl_async.learner.engine import (
    GradientNotFinite,
    TrainEngine,
    gather_rows,
    learning_rate,
    ranks_where,
)
from caprl_async.learner.lora import adapters_off, add_adapters
from caprl_async.learner.losses import TokenStats, kl_estimate, policy_loss
from caprl_async.learner.model import (
    PolicyModel,
    checkpoint_activations,
    choose_prefix,
    collator,
    freeze,
    load_policy,
)
from caprl_async.learner.pixels import PixelCache
from caprl_async.learner.plan import Captions, Plan, costs_of, make_plan
from caprl_async.learner.statistics import summarise
from caprl_async.learner.tensors import MicroTensors
from caprl_async.types import TrainBatch

_OF_FIRST = ("logprob_gap", "kl_behaviour", "effective_samples_raw")
_REMEDY = "the weights may have diverged: go on from an earlier checkpoint with a lower learner.lr"


class Trainer:
    """The policy, its optimizer and the reference model of one rank; needs the default process group."""

    def __init__(self, config: Config, processor: PolicyProcessor, rank: int, world: int) -> None:
        self.config = config
        self.rank = rank
        self.world = world
        self.advantages: dict[str, float] = {}  # of the last batch, by caption; those left out are not in it
        torch.manual_seed(config.seed)
        self.hf = load_policy(config.policy.model, config.learner.dtype)
        self.prefix, self.notice = choose_prefix(self.hf, config.learner.prefix)
        self.costs = costs_of(self.hf, self.prefix)
        self.collate = collator(self.hf, processor.image_token_id, PixelCache(processor), self.prefix)
        self.banned = frozenset(processor.banned_token_ids)
        freeze(self.hf, config.learner)
        if config.learner.lora.rank:
            add_adapters(self.hf, config.learner.lora)
        if config.learner.gradient_checkpointing:
            checkpoint_activations(self.hf, config.learner)
        policy = self._scored(self.hf)
        self.engine = TrainEngine(policy, config.learner)
        self.device = self.engine.device
        self.reference = self._reference()
        policy.train() if config.learner.gradient_checkpointing else policy.eval()

    def _reference(self) -> Callable[[MicroTensors], tuple[Tensor, Tensor]] | None:
        """The policy that training started from; with adapters it needs no copy."""
        if self.config.learner.kl.coef == 0.0:
            return None
        if self.config.learner.lora.rank:
            return self._without_adapters
        frozen = load_policy(self.config.policy.model, self.config.learner.dtype)
        return self._scored(frozen).requires_grad_(False).eval().to(self.device)

    def _without_adapters(self, tensors: MicroTensors) -> tuple[Tensor, Tensor]:
        with adapters_off(self.hf):
            return self.engine.forward(tensors)

    def _scored(self, hf: Any) -> PolicyModel:
        temperature, chunk = self.config.rollout.temperature, self.config.learner.logprob_chunk
        return PolicyModel(hf, self.banned, temperature, chunk, self.prefix)

    def _plan(self, sequences: Sequence[TrainSequence]) -> Plan:
        return make_plan(sequences, self.world, self.config.learner.micro_batch_tokens, self.costs)

    # ------------------------------------------------------------ a batch

    def train(self, batch: TrainBatch) -> dict[str, float]:
        """Trains on one batch; returns its metrics, the same on every rank.

        A batch in which no group has anything to learn moves nothing.

        Raises:
            BadBatch, PixelsDiffer, NotFinite: see there.
        """
        began = time.perf_counter()
        learner = self.config.learner
        sequences = make_sequences(batch, self.banned)
        metrics: dict[str, float] = {}
        penalty: dict[str, float] = {}
        if self.reference is not None and learner.kl.place is KLPlace.reward:
            sequences, penalty = self._penalised(sequences)
        sequences = with_advantages(sequences, learner.advantage, self.config.reward)
        self.advantages = {s.name: s.advantage for s in sequences}
        sum_length = learner.sum_length or self.config.rollout.max_tokens
        parts = split_updates(sequences, learner.updates_per_batch, learner.aggregation, sum_length)
        plans = [self._plan(part) for part in parts]
        metrics |= _batch_metrics(batch, plans)
        lr = metrics["lr"] = learning_rate(batch.version.step, self.config.steps, learner)
        # Before the first update the policy is the proximal one: only later parts need a pass of their own.
        anchors = [None, *(self._anchor(plan) for plan in plans[1:])]
        updates = [self._update(plan, anchor, lr) for plan, anchor in zip(plans, anchors, strict=False)]
        metrics |= _over_updates(updates)
        metrics |= penalty
        metrics["train_s"] = time.perf_counter() - began
        return metrics

    def _penalised(self, sequences: Sequence[TrainSequence]) -> tuple[list[TrainSequence], dict[str, float]]:
        """Takes `kl.coef * sum_t KL_t` off each reward, KL of the policy that sampled it; and its metrics.

        Raises:
            NotFinite: on every rank, if a penalty is NaN or infinite.
        """
        places = {s.name: i for i, s in enumerate(sequences)}
        plan = self._plan([replace(s, weight=1.0) for s in sequences])
        found = torch.zeros(len(sequences), dtype=torch.float64, device=self.device)
        for micro in plan.ranks[self.rank]:
            tensors = self._tensors(micro)
            reference = self._reference_logprobs(tensors)
            assert reference is not None
            kl = kl_estimate(tensors.behaviour, reference, self.config.learner.kl.estimator).double()
            kl = kl.masked_fill(tensors.weights == 0, 0.0)  # filler
            rows = torch.tensor([places[name] for name in tensors.names], device=self.device)
            found.index_add_(0, rows[tensors.token_rows], kl)
        kl = gather_rows(found.unsqueeze(1)).sum(1)
        penalties = (self.config.learner.kl.coef * kl).tolist()
        wrong = [s.name for s, penalty in zip(sequences, penalties, strict=True) if not isfinite(penalty)]
        if wrong:
            raise NotFinite(f"the KL to the reference of {', '.join(wrong[:8])} is not finite", wrong)
        metrics = {
            "kl": kl.sum().item() / sum(len(s.caption) for s in sequences),
            "kl_penalty_mean": sum(penalties) / len(penalties),
        }
        return [
            replace(s, reward=s.reward - penalty) for s, penalty in zip(sequences, penalties, strict=True)
        ], metrics

    def _anchor(self, plan: Plan) -> list[Tensor] | None:
        """Log-probabilities of this rank's micro-batches from the weights before any update, if needed."""
        if self.config.learner.correction.proximal is not Proximal.recompute:
            return None
        with torch.no_grad():
            return [self.engine.forward(self._tensors(micro))[0] for micro in plan.ranks[self.rank]]

    def _update(self, plan: Plan, anchor: list[Tensor] | None, lr: float) -> dict[str, float]:
        """One optimizer step over the micro-batches of this rank."""
        learner = self.config.learner
        micros = plan.ranks[self.rank]
        rows: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        wrong: list[str] = []
        for i, micro in enumerate(micros):
            tensors = self._tensors(micro)
            # Before the policy's own pass: ZeRO-3 expects the backward right behind that.
            reference = self._reference_logprobs(tensors) if learner.kl.place is KLPlace.loss else None
            current, entropy = self.engine.forward(tensors)
            proximal = proximal_logprobs(
                learner.correction.proximal,
                current,
                anchor[i] if anchor is not None else None,
                tensors.behaviour,
                tensors.staleness,
            )
            loss, stats = policy_loss(current, entropy, proximal, tensors.loss_tokens, learner, reference)
            wrong += _not_finite(tensors, current, stats, loss)
            self.engine.backward(loss, last=i == len(micros) - 1)
            total += loss.detach()
            rows.append(_stat_rows(stats, tensors.weights > 0))
        self._stop_if(wrong)
        try:
            norm = self.engine.step(lr)
        except GradientNotFinite as error:
            every = [s.name for micro in plan.micros for s in micro if s.weight]
            found = f"{error}, of the {len(every)} captions of this update"
            raise NotFinite(f"{found}; {_REMEDY}", every) from error
        everywhere = gather_rows(torch.cat(rows, dim=1))
        losses = gather_rows(total.reshape(1, 1))
        return {
            "loss": losses.sum().item(),
            "grad_norm": norm,
            **summarise(TokenStats(*everywhere.unbind(0))),
        }

    def _tensors(self, micro: Captions) -> MicroTensors:
        return self.collate(micro).to(self.device)

    def _reference_logprobs(self, tensors: MicroTensors) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.reference(tensors)[0]

    def _stop_if(self, wrong: list[str]) -> None:
        """All ranks stop together, before any optimizer moves.

        Raises:
            NotFinite: on every rank if it happened on one.
        """
        ranks = ranks_where(bool(wrong), self.device)
        if ranks:
            named = ", ".join(wrong[:8]) or "captions of other ranks, see their errors"
            raise NotFinite(
                f"loss, weights or log-probabilities are not finite on ranks {ranks}: {named}; {_REMEDY}",
                wrong,
            )


# ---------------------------------------------------------------- metrics


def _stat_rows(stats: TokenStats, real: Tensor) -> Tensor:
    """Per-token statistics [k, T] without filler."""
    return torch.stack([getattr(stats, f.name).float() for f in fields(TokenStats)])[:, real]


def _over_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a batch from those of its updates: means, largest of the largest, least of the least.

    What compares with the sampling policy is of the first update: the later ones see their forerunners too.
    """
    metrics = {}
    for name in updates[0] if updates else ():
        values = [update[name] for update in updates]
        if name.startswith(_OF_FIRST):
            metrics[name] = values[0]
        elif name.endswith("_max"):
            metrics[name] = max(values)
        else:
            metrics[name] = min(values) if name.endswith("_min") else sum(values) / len(values)
    return metrics


def _not_finite(tensors: MicroTensors, logprobs: Tensor, stats: TokenStats, loss: Tensor) -> list[str]:
    """Names of the rows with a number that is none, even behind a bound; all if only the loss is none."""
    finite = logprobs.isfinite() & stats.raw.isfinite() & stats.ratio.isfinite()
    if bool(loss.isfinite()) and bool(finite.all()):
        return []
    rows = tensors.token_rows[~finite].unique().tolist()
    return [tensors.names[row] for row in rows] or list(tensors.names)


def _batch_metrics(batch: TrainBatch, plans: list[Plan]) -> dict[str, float]:
    rewards = [p.total for g in batch.groups for p in g.rewards if p.total is not None]
    lengths = [len(c.token_ids) for g in batch.groups for c in g.group.captions]
    trained = {s.group for plan in plans for micro in plan.micros for s in micro}
    values = torch.tensor(rewards or [0.0], dtype=torch.float64)
    return {
        "reward_mean": values.mean().item(),
        "reward_std": values.std(correction=0).item(),
        "caption_tokens_mean": sum(lengths) / max(1, len(lengths)),
        "caption_tokens": float(sum(lengths)),
        "groups": float(len(batch.groups)),
        "groups_skipped": float(len(batch.groups) - len(trained)),
        "micro_batches": float(sum(len(plan.ranks[0]) for plan in plans)),
        "fillers": float(sum(plan.fillers for plan in plans)),
        "computed_tokens": float(sum(plan.tokens for plan in plans)),
        "padding": sum(plan.padding for plan in plans) / max(1, len(plans)),
    }
