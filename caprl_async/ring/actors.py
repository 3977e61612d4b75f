"""Which actors a ring has, where they are placed and how Ray treats their deaths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from caprl_async.config import Config

if TYPE_CHECKING:
    from ray.actor import ActorHandle

HUB = "replay-queue"


@dataclass(frozen=True)
class ActorSpec:
    """One actor: its name in the ring and on the dashboard, and what it reserves."""

    name: str
    bundle: int  # index into the placement group
    cpus: float
    gpus: float
    restarts: bool  # Ray starts it again; a learner rank, which cannot go on alone, is not
    concurrency: int  # control calls it may run at one time
    label: Mapping[str, str] = field(default_factory=dict)  # of the nodes that it may be placed on

    @property
    def role(self) -> str:
        return self.name.rpartition("-")[0] if self.name != HUB else HUB

    @property
    def index(self) -> int:
        """Among the actors of its role."""
        return int(self.name.rpartition("-")[2]) if self.name != HUB else 0

    @property
    def resources(self) -> dict[str, float]:
        """The placement bundle of this actor."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Roster:
    """All actors of a ring, in the order of their bundles."""

    hub: ActorSpec
    rollouts: tuple[ActorSpec, ...]
    judges: tuple[ActorSpec, ...]
    heldout_judges: tuple[ActorSpec, ...]
    learners: tuple[ActorSpec, ...]

    @property
    def all(self) -> tuple[ActorSpec, ...]:
        return (self.hub, *self.rollouts, *self.judges, *self.heldout_judges, *self.learners)

    @property
    def labels(self) -> list[dict[str, str]]:
        """Of each bundle."""
        return [dict(spec.label) for spec in self.all]

    def plus(self, spec: ActorSpec) -> Roster:
        """With one more rollout or judge."""
        if spec.role == "rollout":
            return replace(self, rollouts=(*self.rollouts, spec))
        return replace(self, judges=(*self.judges, spec))

    def minus(self, name: str) -> Roster:
        """Without this rollout or judge."""
        return replace(
            self,
            rollouts=tuple(spec for spec in self.rollouts if spec.name != name),
            judges=tuple(spec for spec in self.judges if spec.name != name),
        )


def roster(config: Config, *, first_bundle: int = 0) -> Roster:
    """The actors that a ring starts with. `first_bundle` skips the bundles of whoever drives it."""
    bundles = iter(range(first_bundle, 1 << 30))

    def group(role: str, number: int) -> tuple[ActorSpec, ...]:
        return tuple(actor_spec(config, role, i, next(bundles)) for i in range(number))

    return Roster(
        hub=ActorSpec(HUB, next(bundles), config.ring.cpus_per_actor, 0.0, True, 100),
        rollouts=group("rollout", config.rollout.num_actors),
        judges=group("judge", config.judge.num_actors),
        heldout_judges=group("heldout-judge", int(bool(config.evaluate.heldout_judge.model))),
        learners=group("learner", config.learner.num_ranks),
    )


def actor_spec(config: Config, role: str, index: int, bundle: int) -> ActorSpec:
    """One actor of a role, in a bundle of its placement group."""
    ring = config.ring
    gpus, label = {
        "rollout": (ring.gpus_per_rollout, ring.rollout_label),
        "judge": (0.0 if config.judge.endpoint.url else ring.gpus_per_judge, ring.judge_label),
        "heldout-judge": (ring.gpus_per_judge, ring.judge_label),
        "learner": (ring.gpus_per_learner, ring.learner_label),
    }[role]
    learns = role == "learner"
    return ActorSpec(
        f"{role}-{index}",
        bundle,
        ring.cpus_per_actor,
        gpus,
        restarts=not learns,
        concurrency=6 if learns else 100,  # threads: a rank sends a snapshot while it trains; else asyncio
        label=dict([label.split("=", 1)]) if label else {},
    )


def reserve(actors: Roster, timeout_s: float) -> tuple[PlacementGroup, bool]:
    """The placement group for the roster and whether it is ours to remove (in Tune it is the trial's).

    Raises:
        TimeoutError: the cluster has not the resources.
    """
    current = get_current_placement_group()
    if current is not None:
        return current, False
    bundles = [spec.resources for spec in actors.all]
    labels = actors.labels
    group = placement_group(bundles, strategy="PACK", name="caprl-ring", bundle_label_selector=labels)
    if not group.wait(timeout_s):
        nodes = [node["Labels"] for node in ray.nodes() if node["Alive"]]
        where = f" on nodes labelled {labels} (there are {nodes})" if any(labels) else ""
        raise TimeoutError(
            f"no place for the ring: it needs {bundles}{where}, the cluster has {ray.cluster_resources()}; "
            "use fewer actors (rollout.num_actors, judge.num_actors, learner.num_ranks) or a larger cluster"
        )
    return group, True


def spawn(
    spec: ActorSpec, group: PlacementGroup, actor_class: type, *args: Any, life: int = 1
) -> ActorHandle:
    """Starts one actor in its bundle; returns at once. `life` counts those that we started for this place."""
    handle: Any = (
        ray.remote(actor_class)
        .options(
            name=f"caprl-{ray.get_runtime_context().get_job_id()}-{spec.name}-{life}",
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            max_restarts=-1 if spec.restarts else 0,
            max_task_retries=0,
            max_concurrency=spec.concurrency,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=spec.bundle
            ),
        )
        .remote(*args)
    )
    return handle
