"""Where the rollouts and judges are that a ring has beyond those it starts with."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import ray
from ray.util.placement_group import placement_group

from caprl_async.config import Config
from caprl_async.ring.actors import ActorSpec, actor_spec

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_LOOK_S = 2.0
ROLES = ("rollout", "judge")


class Extras:
    """Each has a placement group of its own. To an autoscaler one that waits is demand; one whose node is
    lost waits for another, and Ray starts the actor there again.

    `wanted` is the number of actors of each role, those that the ring starts with included.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._first = {"rollout": config.rollout.num_actors, "judge": config.judge.num_actors}
        most = {"rollout": config.rollout.max_actors, "judge": config.judge.max_actors}
        self.wanted = Counter({role: max(self._first[role], most[role]) for role in ROLES})
        self._given_up: set[str] = set()
        self._waiting: dict[str, tuple[ActorSpec, PlacementGroup]] = {}
        self._placed: dict[str, PlacementGroup] = {}
        self._next = 0.0

    def want(self, role: str, number: int) -> None:
        """
        Raises:
            ValueError: a ring keeps those that it has started with.
        """
        if number < self._first[role]:
            raise ValueError(
                f"{number} {role}s wanted, but the ring has started with {self._first[role]} and keeps them"
            )
        self.wanted[role] = number
        self._given_up.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._placed

    def placed(self, now: float) -> list[tuple[ActorSpec, PlacementGroup]]:
        """Those that have got a place since it was last asked; asks for the places of others meanwhile.

        Does not block; looks every two seconds of `now`.
        """
        if now < self._next:
            return []
        self._next = now + _LOOK_S
        for name, spec in self._names().items():
            if name not in self._waiting and name not in self._placed and name not in self._given_up:
                self._waiting[name] = (
                    spec,
                    placement_group(
                        [spec.resources], name=f"caprl-{name}", bundle_label_selector=[dict(spec.label)]
                    ),
                )
        ready = [name for name, (_, group) in self._waiting.items() if group.wait(0)]
        found = [self._waiting.pop(name) for name in ready]
        self._placed.update({spec.name: group for spec, group in found})
        return found

    def unwanted(self) -> list[str]:
        """Actors that have a place and should leave; places that are not wanted any more are given back."""
        names = self._names()
        for name in [name for name in self._waiting if name not in names]:
            _remove(self._waiting.pop(name)[1])
        return [name for name in self._placed if name not in names]

    def release(self, name: str, *, for_good: bool = False) -> None:
        """Gives an actor's place back; `for_good`: it is not tried again before another number is wanted."""
        _remove(self._placed.pop(name))
        if for_good:
            self._given_up.add(name)

    def close(self) -> None:
        """Gives all places back."""
        for group in [*self._placed.values(), *(group for _, group in self._waiting.values())]:
            _remove(group)
        self._placed.clear()
        self._waiting.clear()

    def _names(self) -> dict[str, ActorSpec]:
        specs = [
            actor_spec(self._config, role, index, 0)
            for role in ROLES
            for index in range(self._first[role], self.wanted[role])
        ]
        return {spec.name: spec for spec in specs}


def _remove(group: PlacementGroup) -> None:
    ray.util.remove_placement_group(group)
