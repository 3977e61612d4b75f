"""RLlib's methods and names for the keys of the conf; a key that RLlib has no name for keeps its own.

Pure: the conf is a nested dictionary here, as RLlib's and Tune's configurations are, and a value may be one
that Tune has yet to draw.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from omegaconf import OmegaConf

from caprl_async.conf import ConfError
from caprl_async.config import Config

METHODS: dict[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "environment": (("data",), {}),
    "env_runners": (
        ("rollout",),
        {
            "num_env_runners": "rollout.num_actors",
            "num_gpus_per_env_runner": "ring.gpus_per_rollout",
            "max_requests_in_flight_per_env_runner": "rollout.max_requests_in_flight_per_actor",
        },
    ),
    "judges": (
        ("judge",),
        {
            "num_judges": "judge.num_actors",
            "num_gpus_per_judge": "ring.gpus_per_judge",
            "max_requests_in_flight_per_judge": "judge.max_requests_in_flight_per_actor",
        },
    ),
    "learners": (
        ("learner",),
        {"num_learners": "learner.num_ranks", "num_gpus_per_learner": "ring.gpus_per_learner"},
    ),
    "training": (
        ("learner", "reward", "replay", "weights", "policy"),
        {
            "grad_clip": "learner.grad_norm",
            "num_epochs": "learner.updates_per_batch",
            "entropy_coeff": "learner.entropy_coef",
            "kl_coeff": "learner.kl.coef",
            "clip_param": "learner.correction.trust_region.clip_low",
        },
    ),
    "evaluation": (("evaluate",), {"evaluation_interval": "evaluate.interval"}),
    "checkpointing": (("checkpoint",), {}),
    "fault_tolerance": (("ring",), {}),
}
"""Of each method: the rooms whose keys it takes by their own names, and RLlib's names for keys."""

RLLIBS_OWN = (
    "env_config",
    "exploration_config",
    "evaluation_",
    "model",
    "optimizer",
    "replay_buffer_config",
    "sample_collector",
)
"""Beginnings of RLlib's own settings, which mean nothing here."""


def as_dict(config: Config) -> dict[str, Any]:
    """A whole conf as a nested dictionary, enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


class Named:
    """The methods, over a conf as a nested dictionary; a name that they do not know raises ConfError."""

    caprl: dict[str, Any]

    def _put(self, method: str, values: dict[str, Any]) -> Self:
        put(self.caprl, method, values)
        return self

    def environment(self, train: str | None = None, **data: Any) -> Self:
        """The images and questions: keys of `data`."""
        return self._put("environment", data if train is None else {"train": train, **data})

    def env_runners(self, **rollout: Any) -> Self:
        """The rollout actors: keys of `rollout`, and num_env_runners, num_gpus_per_env_runner,
        max_requests_in_flight_per_env_runner."""
        return self._put("env_runners", rollout)

    def judges(self, **judge: Any) -> Self:
        """The judges: keys of `judge`, and num_judges, num_gpus_per_judge,
        max_requests_in_flight_per_judge."""
        return self._put("judges", judge)

    def learners(self, **learner: Any) -> Self:
        """The learner group: keys of `learner`, and num_learners, num_gpus_per_learner."""
        return self._put("learners", learner)

    def training(self, **values: Any) -> Self:
        """The algorithm: keys of `learner`, `reward`, `replay`, `weights` and `policy`, and grad_clip,
        num_epochs, entropy_coeff, kl_coeff, clip_param."""
        return self._put("training", values)

    def evaluation(self, **evaluate: Any) -> Self:
        """What is measured: keys of `evaluate`, and evaluation_interval."""
        return self._put("evaluation", evaluate)

    def checkpointing(self, **checkpoint: Any) -> Self:
        """What is kept: keys of `checkpoint`."""
        return self._put("checkpointing", checkpoint)

    def fault_tolerance(self, **ring: Any) -> Self:
        """Who is started again, and how often: keys of `ring`."""
        return self._put("fault_tolerance", ring)


def put(conf: dict[str, Any], method: str, values: Mapping[str, Any]) -> None:
    """Sets the keys of `conf` that a method's arguments name; a dictionary is a room within a room.

    Raises:
        ConfError: an argument names no key; nothing is set then.
    """
    places = {name: _place(conf, method, name) for name in values}
    for name, value in values.items():
        inner, leaf = _at(conf, places[name])
        if isinstance(inner[leaf], dict) and isinstance(value, Mapping) and not _drawn(value):
            _merge(inner[leaf], value, places[name])
        else:
            inner[leaf] = value


def _place(conf: Mapping[str, Any], method: str, name: str) -> str:
    rooms, names = METHODS[method]
    if name in names:
        return names[name]
    for room in rooms:
        if name in conf[room]:
            return f"{room}.{name}"
    known = [*names, *(key for room in rooms for key in conf[room])]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(known)}"
    raise ConfError(f"{method}() has no argument {name!r}{hint}")


def _at(conf: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *rooms, leaf = key.split(".")
    for room in rooms:
        conf = conf[room]
    return conf, leaf


def _merge(room: dict[str, Any], values: Mapping[str, Any], key: str) -> None:
    for name, value in values.items():
        if name not in room:
            near = difflib.get_close_matches(name, room, n=1)
            raise ConfError(f"no key {key}.{name}" + (f"; did you mean {near[0]}?" if near else ""))
        if isinstance(room[name], dict) and isinstance(value, Mapping) and not _drawn(value):
            _merge(room[name], value, f"{key}.{name}")
        else:
            room[name] = value


def _drawn(value: Mapping[str, Any]) -> bool:
    """Whether Tune has yet to choose the value."""
    return set(value) == {"grid_search"}
