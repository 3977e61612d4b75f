"""RLlib's methods and names set the keys of the conf; what names none is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from omegaconf import OmegaConf

from caprl_async.conf import ConfError
from caprl_async.config import Config
from caprl_async.rllib_names import METHODS, put


@pytest.fixture
def conf() -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.structured(Config()), enum_to_str=True)
    return dict(found)


def test_every_name_is_that_of_a_key(conf: dict[str, Any]) -> None:
    for rooms, names in METHODS.values():
        assert set(rooms) <= set(conf)
        for key in names.values():
            value: Any = conf
            for part in key.split("."):
                value = value[part]


def test_names_of_rllib_and_of_the_conf(conf: dict[str, Any]) -> None:
    put(conf, "training", {"lr": 1e-5, "kl_coeff": 0.1, "broadcast_interval": 2, "max_staleness": 4})
    put(conf, "env_runners", {"num_env_runners": 8, "group_size": 4})
    put(conf, "training", {"correction": {"trust_region": {"kind": "gspo"}}})
    assert conf["learner"]["lr"] == 1e-5
    assert conf["learner"]["kl"]["coef"] == 0.1
    assert (conf["weights"]["broadcast_interval"], conf["replay"]["max_staleness"]) == (2, 4)
    assert (conf["rollout"]["num_actors"], conf["rollout"]["group_size"]) == (8, 4)
    assert conf["learner"]["correction"]["trust_region"]["kind"] == "gspo"
    assert conf["learner"]["correction"]["trust_region"]["clip_low"] == 0.2, "the room's other keys stay"


def test_what_tune_draws_is_kept_for_it(conf: dict[str, Any]) -> None:
    put(conf, "training", {"lr": {"grid_search": [1e-5, 1e-6]}, "kl": {"coef": {"grid_search": [0, 1]}}})
    assert conf["learner"]["lr"] == {"grid_search": [1e-5, 1e-6]}
    assert conf["learner"]["kl"]["coef"] == {"grid_search": [0, 1]}


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("training", {"learning_rate": 1}, r"training\(\) has no argument 'learning_rate'"),
        ("env_runners", {"num_env_runner": 1}, "did you mean num_env_runners"),
        ("environment", {"env": "CartPole-v1"}, r"environment\(\) has no argument 'env'"),
        ("training", {"kl": {"cof": 1}}, r"no key learner\.kl\.cof; did you mean coef"),
    ],
)
def test_a_wrong_name_is_told_and_sets_nothing(
    method: str, values: dict[str, Any], says: str, conf: dict[str, Any]
) -> None:
    before = copy.deepcopy(conf)
    with pytest.raises(ConfError, match=says):
        put(conf, method, {"prompt": "x", **values} if method == "environment" else values)
    assert conf == before
