"""The face that RLlib users know, over the ring; the only module that imports RLlib.

`CapRL` keeps RLlib's own set-up, result and Tune machinery and replaces what samples and learns: no env
runners, no RL module, and a learner group that stands for the whole ring.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from pyarrow.fs import LocalFileSystem
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_LEARNER_GROUP, COMPONENT_RL_MODULE
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, NUM_ENV_STEPS_TRAINED_LIFETIME
from ray.tune import PlacementGroupFactory
from ray.util.placement_group import get_current_placement_group

from caprl_async import conf, conf_checks
from caprl_async.config import Config
from caprl_async.replay.eval_spec import heldout_spec
from caprl_async.ring.actors import roster
from caprl_async.ring.supervisor import Supervisor
from caprl_async.rllib_names import RLLIBS_OWN, Named, as_dict

# It would advise every user on choosing between RLlib's old and new interfaces, of which neither is used.
logging.getLogger("ray.rllib.algorithms.algorithm_config").setLevel(logging.ERROR)


class CapRLConfig(Named, AlgorithmConfig):
    """The conf, by RLlib's methods and names, from Python:

    CapRLConfig().environment(train="qa.parquet").training(lr=1e-6).env_runners(num_env_runners=8).build_algo()

    `conf` takes a whole one. A value may be one of Tune's (`tune.grid_search`).
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or CapRL)
        self._is_online = False  # no env runners: prompts come from a data set
        self.caprl: dict[str, Any] = as_dict(Config())

    def conf(self, config: Config) -> CapRLConfig:
        """Takes a whole conf, as `caprl_async.conf.load` gives it."""
        self.caprl = as_dict(config)
        self.debugging(seed=config.seed, log_level=config.observe.log_level, log_sys_usage=False)
        return self

    @property
    def as_conf(self) -> Config:
        """The conf as the dataclasses of `caprl_async.config`.

        Raises:
            ConfError: a value has the wrong type, or its key is not known.
        """
        return conf.from_mapping(self.caprl)

    def validate(self) -> None:
        """
        Raises:
            ConfError: the ring cannot run with it.
        """
        super().validate()
        conf_checks.check(self.as_conf)

    def update_from_dict(self, config_dict: dict[str, Any]) -> CapRLConfig:
        # RLlib would hand these of its own, which mean nothing here, to the methods below.
        own = {name: value for name, value in config_dict.items() if not name.startswith(RLLIBS_OWN)}
        super().update_from_dict(own)
        return self

    def get_multi_rl_module_spec(self, **_: Any) -> MultiRLModuleSpec:
        return MultiRLModuleSpec(rl_module_specs={})

    def build_learner_group(self, **_: Any) -> RingGroup:
        return RingGroup()


class RingGroup(Checkpointable):
    """Stands where RLlib expects a learner group; its state is the ring's checkpoint folder.

    With `in_background`, `save_to_path` returns when the state is copied; `ring.saved` tells when it is on
    the disk.
    """

    def __init__(self) -> None:
        self.ring: Supervisor | None = None
        self.in_background = False

    def get_state(self, components: Any = None, *, not_components: Any = None, **_: Any) -> dict[str, Any]:
        """Nothing but the keys that RLlib reads: weights never pass through the driver."""
        return {COMPONENT_LEARNER: {COMPONENT_RL_MODULE: {}}}

    def set_state(self, state: dict[str, Any]) -> None:
        """There is nothing to set; `restore_from_path` restores."""

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {}

    def save_to_path(self, path: Any = None, **_: Any) -> str:
        assert self.ring is not None, "the ring has not been started"
        self.ring.save(pathlib.Path(path), wait=not self.in_background)
        return str(path)

    def restore_from_path(self, path: Any, **_: Any) -> None:
        assert self.ring is not None, "the ring has not been started"
        self.ring.restore(pathlib.Path(path))

    def shutdown(self) -> None:
        if self.ring is not None:
            self.ring.stop()


class CapRL(Algorithm):
    """CapRL as an RLlib algorithm: `train()` is one learner batch.

    `on_message`, if set before `build_algo`, hears what the ring says while it starts.
    """

    on_message: Callable[[str], None] = staticmethod(lambda _: None)

    @classmethod
    def get_default_config(cls) -> CapRLConfig:
        return CapRLConfig()

    def _setup_logdir(self) -> None:
        # Outside Tune, RLlib would make a folder in the user's home.
        if self._storage:
            super()._setup_logdir()
        else:
            self._logdir = self.config.caprl["run_dir"]
            pathlib.Path(self._logdir).mkdir(parents=True, exist_ok=True)

    def setup(self, config: AlgorithmConfig) -> None:
        super().setup(config)
        assert isinstance(self.config, CapRLConfig)
        in_trial = get_current_placement_group() is not None  # Tune's; this actor is in its first bundle
        self.conf = self.config.as_conf
        if in_trial:  # what a ring writes stays within its trial, also when Tune starts it again
            folder = self._trial_folder()
            self.conf = dataclasses.replace(
                self.conf, run_dir=folder, resume=conf.has_run(pathlib.Path(folder))
            )
        self.ring = Supervisor(self.conf, say=type(self).on_message, first_bundle=1 if in_trial else 0)
        self.learner_group.ring = self.ring
        try:
            self.ring.start()
        except BaseException:
            self.ring.stop()
            raise

    def _trial_folder(self) -> str:
        """Where Tune keeps the trial's results; with a storage that is no file system, its working folder."""
        storage: Any = self._storage
        local = storage is not None and isinstance(storage.storage_filesystem, LocalFileSystem)
        return str(storage.trial_fs_path if local else pathlib.Path(self.logdir).resolve())

    def training_step(self) -> None:
        self.ring.open_admission()
        self.step_metrics = self.ring.step()
        step = self.step_metrics
        for name, value in step.items():
            self.metrics.log_value(("caprl", name), value, reduce="mean", window=1)
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, step["captions_sampled"], reduce="max")
        self.metrics.log_value(NUM_ENV_STEPS_TRAINED_LIFETIME, step["captions_trained"], reduce="max")

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Accuracy of every judge on held-out images, from the newest weights' captions; see `EvalResult`.

        Raises:
            RingFailed: there are no held-out questions (`data.heldout`), or an actor could not go on.
        """
        return {"caprl": self.ring.evaluate(heldout_spec(self.conf, str(self.ring.version)))}

    def set_state(self, state: dict[str, Any]) -> None:
        # The ring restores itself by its folder; what is left is RLlib's own counting.
        super().set_state({k: v for k, v in state.items() if k != COMPONENT_LEARNER_GROUP})

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        Checkpointable.restore_from_path(self, path, *args, **kwargs)

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        return [(COMPONENT_LEARNER_GROUP, self.learner_group)]

    @classmethod
    def _should_create_evaluation_env_runners(cls, eval_config: AlgorithmConfig) -> bool:
        return False

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        filled = cls.get_default_config().update_from_dict(config)
        assert isinstance(filled, CapRLConfig)
        actors = roster(filled.as_conf, first_bundle=1)
        bundles = [{"CPU": 0.1}, *(spec.resources for spec in actors.all)]
        return PlacementGroupFactory(bundles, bundle_label_selector=[{}, *actors.labels])
