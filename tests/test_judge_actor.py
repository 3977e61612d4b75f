"""Which judge answers what: by its model and mode."""

from __future__ import annotations

from caprl_async.choices import JudgeMode
from caprl_async.config import Config
from caprl_async.judge.actor import judge_config


def test_the_held_out_judge_has_its_own_model_and_where_it_is_set_its_own_mode() -> None:
    config = Config()
    config.judge.model, config.judge.mode = "/one", JudgeMode.sample
    config.judge.endpoint.url = "http://127.0.0.1:1/v1"
    config.evaluate.heldout_judge.model = "/other"
    heldout = judge_config(config, "heldout")
    assert (heldout.model, heldout.mode, heldout.endpoint.url) == ("/other", JudgeMode.sample, "")
    config.evaluate.heldout_judge.mode = JudgeMode.likelihood
    assert judge_config(config, "heldout").mode is JudgeMode.likelihood
    assert judge_config(config, "judge").mode is JudgeMode.sample
