"""Settings of the loss that contradict each other or could never act; part of conf_checks.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from caprl_async.config import (
    AdvantageKind,
    Aggregation,
    Beyond,
    Config,
    ImportanceLevel,
    KLPlace,
    Proximal,
    TrustRegion,
)

_PREFIX = "learner.correction"


def problems(config: Config) -> Iterator[str]:
    """A sentence for each pair of keys that clash."""
    yield from _importance(config)
    yield from _trust_region(config)
    yield from _updates(config)
    yield from _terms(config)
    yield from _bands(config)


def _importance(config: Config) -> Iterator[str]:
    correction = config.learner.correction
    importance, kind = correction.importance, correction.trust_region.kind
    if importance.level is ImportanceLevel.none:
        return
    if correction.proximal is Proximal.behaviour:
        yield (
            f"{_PREFIX}.proximal=behaviour with {_PREFIX}.importance.level={importance.level.name}: the "
            "weight from a policy to itself is always 1; use importance.level=none, or proximal=recompute"
        )
    elif kind is TrustRegion.gspo and importance.level is ImportanceLevel.token:
        yield (
            f"{_PREFIX}.trust_region.kind=gspo with {_PREFIX}.importance.level=token: a caption's one ratio "
            "takes gradient through all its tokens, so a token's own weight could not mask it; use "
            "importance.level=sequence or none"
        )
    if importance.beyond is Beyond.mask and not (importance.low > 0 or importance.high > 0):
        yield (
            f"{_PREFIX}.importance.beyond=mask with {_PREFIX}.importance.low=0 and .high=0: nothing lies "
            "beyond; set a bound, or beyond=truncate"
        )


def _trust_region(config: Config) -> Iterator[str]:
    correction, updates = config.learner.correction, config.learner.updates_per_batch
    region = correction.trust_region
    if correction.proximal is Proximal.interpolate and region.kind is TrustRegion.reinforce:
        yield (
            f"{_PREFIX}.proximal=interpolate with {_PREFIX}.trust_region.kind=reinforce: no ratio is left "
            "between the interpolated and the current policy; use proximal=recompute"
        )
    chosen = {
        f"kind={region.kind.name}": region.kind in (TrustRegion.gspo, TrustRegion.cispo),
        f"dual_clip={region.dual_clip:g}": region.dual_clip > 0,
    }
    if correction.proximal is Proximal.recompute and updates == 1:
        for setting, is_chosen in chosen.items():
            if is_chosen:
                yield (
                    f"{_PREFIX}.trust_region.{setting} with {_PREFIX}.proximal=recompute and learner."
                    "updates_per_batch=1: the ratio to the weights before the batch is then always 1, so "
                    "it could never act; use proximal=behaviour, or more updates"
                )
    if region.dual_clip > 0 and region.kind is not TrustRegion.ppo:
        yield (
            f"{_PREFIX}.trust_region.dual_clip={region.dual_clip:g} with {_PREFIX}.trust_region.kind="
            f"{region.kind.name}: only ppo has a dual clip"
        )
    if 0 < region.dual_clip <= 1 + region.clip_high:
        yield (
            f"{_PREFIX}.trust_region.dual_clip={region.dual_clip:g} must be above 1 + {_PREFIX}.trust_region."
            f"clip_high={region.clip_high:g}: the floor would cut inside the trust region"
        )


def _updates(config: Config) -> Iterator[str]:
    learner, groups = config.learner, config.replay.batch_groups
    if learner.updates_per_batch > groups:
        yield (
            f"learner.updates_per_batch={learner.updates_per_batch} is above replay.batch_groups={groups}: "
            "an update takes whole groups"
        )
    if learner.sum_length and learner.aggregation is not Aggregation.sequence_sum:
        yield (
            f"learner.sum_length={learner.sum_length} with learner.aggregation={learner.aggregation.name}: "
            "only sequence_sum divides by it"
        )


def _terms(config: Config) -> Iterator[str]:
    learner = config.learner
    if not learner.advantage.per_term:
        return
    if learner.advantage.kind is not AdvantageKind.mean_std:
        yield (
            f"learner.advantage.per_term=true with learner.advantage.kind={learner.advantage.kind.name}: "
            "only mean_std brings the terms to one scale; without it their sum is the same"
        )
    if learner.kl.coef and learner.kl.place is KLPlace.reward:
        yield (
            "learner.advantage.per_term=true with learner.kl.place=reward: the penalty is no term of the "
            "reward; use learner.kl.place=loss"
        )


def _bands(config: Config) -> Iterator[str]:
    bands = config.observe.bands
    for band in dataclasses.fields(bands):
        values = getattr(bands, band.name)
        if values and (len(values) != 2 or not values[0] <= values[1]):
            yield f"observe.bands.{band.name}={values} must be [low, high], or [] for no alarm"
    if bands.kl and config.learner.kl.coef == 0:
        yield (
            f"observe.bands.kl={bands.kl} with learner.kl.coef=0: there is no reference model to measure the "
            "KL to; set a weight, or take the band away"
        )
