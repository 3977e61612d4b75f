"""Confs with a judge behind an API: what they need not name, and what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.config import Config

URL = "judge.endpoint.url=http://127.0.0.1:8000/v1"
NO_HELDOUT = ["evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="]
CUDA = ["learner.device=cuda", "weights.backend=nccl", "ring.gpus_per_rollout=1", "ring.gpus_per_learner=1"]


def _conf(tmp_path: Path, *overrides: str) -> Config:
    return conf.load(["conf=conf/demo.yaml", f"run_dir={tmp_path}", "judge.mode=expected", *overrides])


def test_a_conf_with_an_endpoint_needs_no_judge_model_and_no_gpu_for_it(tmp_path: Path) -> None:
    from caprl_async.ring.actors import roster

    config = _conf(tmp_path, URL, "judge.model=", *NO_HELDOUT, *CUDA)
    assert [spec.gpus for spec in roster(config).judges] == [0.0] * config.judge.num_actors
    assert _conf(tmp_path, URL, "judge.model=nowhere", *NO_HELDOUT).judge.endpoint.url
    with pytest.raises(ConfError, match=r"ring\.gpus_per_judge=0"):  # the held-out judge has an engine
        _conf(tmp_path, URL, *CUDA)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["judge.endpoint.url=localhost:8000"], ["judge.endpoint.url=localhost:8000", "http://"]),
        (["judge.endpoint.url=http://me:secret@host/v1"], ["no user, password or query", "api_key_env"]),
        (["judge.endpoint.url=http://host/v1?api-key=1"], ["no user, password or query"]),
        (
            [URL, "judge.endpoint.api_key_env=NOT_SET_ANYWHERE"],
            ["judge.endpoint.api_key_env=NOT_SET_ANYWHERE"],
        ),
        ([URL, "judge.endpoint.timeout_s=200"], ["timeout_s=200", "lease_timeout_s=300"]),
        (
            [URL, "data.questions_per_image=2", "data.adaptive_questions=true", "reward.blind=weigh"],
            ["biased"],
        ),
        ([URL, "judge.mode=likelihood"], ["judge.mode=likelihood", "judge.endpoint.url"]),
        ([URL, "judge.temperature=1.2"], ["judge.temperature=1.2", "judge.mode=expected"]),
        ([URL, "judge.endpoint.prefill=true", "judge.prompt.prefill="], ["judge.endpoint.prefill=true"]),
        ([URL, "judge.endpoint.timeout_s=0"], ["judge.endpoint.timeout_s=0", "above 0"]),
        ([URL, "judge.endpoint.retries=-1"], ["judge.endpoint.retries=-1", "0 or more"]),
        ([URL, "judge.endpoint.max_in_flight=0"], ["judge.endpoint.max_in_flight=0", "1 or more"]),
        (["judge.model="], ["judge.model is empty", "judge.endpoint.url"]),
    ],
)
def test_confs_that_an_endpoint_cannot_run(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfError) as error:
        _conf(tmp_path, *overrides)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:hidden@host/v1", "no user, password"),
        ("host:8000/v1", "must begin with http://"),
        ("http://[::1/v1", "IPv6"),
        ("http://me:hidden@\u2100host/v1", "cannot be read"),
    ],
)
def test_a_writer_behind_an_endpoint_has_no_secret_in_its_url(tmp_path: Path, url: str, words: str) -> None:
    changes = [f"run_dir={tmp_path}", f"data.images={tmp_path}", f"captioner.endpoint.url={url}"]
    with pytest.raises(ConfError, match=r"captioner\.endpoint\.url.*" + words) as error:
        conf.load(["conf=conf/annotate.yaml", *changes])
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    "job",
    [
        ["conf=conf/curate.yaml", "questioner.endpoint.url=http://host/v1"],
        ["conf=conf/evaluate.yaml", "prism.benchmark=caprl_qa", "captioner.endpoint.url=http://host/v1"],
    ],
)
def test_a_job_that_asks_a_served_judge_hears_at_once_what_does_not_suit_it(
    tmp_path: Path, job: list[str]
) -> None:
    judge = ["judge.mode=expected", "judge.endpoint.url=http://me:hidden@host/v1"]
    with pytest.raises(ConfError, match=r"judge\.endpoint\.url must hold no user, password") as error:
        conf.load([*job, *judge, f"run_dir={tmp_path}", f"data.images={tmp_path}", f"prism.data={tmp_path}"])
    assert "hidden" not in str(error.value)
