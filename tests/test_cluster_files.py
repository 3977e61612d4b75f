"""The files of cluster/: valid for Ray, guarded by a token, of the versions that the project asks for."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHED = ("gpu.yaml", "onprem.yaml")


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def starts(config: dict[str, Any]) -> list[str]:
    every = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [command for command in every if "ray start" in command]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_is_behind_a_token_and_the_dashboard_on_the_head_alone(name: str) -> None:
    config = read(name)
    head, worker = starts(config)
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_USAGE_STATS_ENABLED=0" in command
        assert "caprl_async/.venv/bin" in command
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "$RAY_HEAD_IP" in worker
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN=", str(config)), "no token is in a file that is committed"


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_gets_this_project_and_sets_it_up(name: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/caprl_async"] == "."
    assert {".venv", "runs", ".git"} <= set(config["rsync_exclude"])
    assert any("make setup EXTRA=gpu" in command for command in config["setup_commands"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["cluster"]) <= set(extras["dev"]), "the set-up brings the dashboard and submitted jobs"


def test_versions_of_ray_are_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (rllib,) = [one for one in project["dependencies"] if one.startswith("ray[")]
    (default,) = project["optional-dependencies"]["cluster"]
    assert default.removeprefix("ray[default]") == rllib.removeprefix("ray[rllib]")
    version = read("kuberay.yaml")["spec"]["rayClusterSpec"]["rayVersion"]
    assert re.search(r">=(\d+\.\d+)", rllib)[1] == version.rpartition(".")[0]  # type: ignore[index]


def test_the_job_on_kubernetes_is_behind_a_token_and_its_pods_are_alike() -> None:
    job = read("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    limits = pods[1]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    assert "ring.address=auto" in job["spec"]["entrypoint"]


def test_the_slurm_script_is_sound_and_keeps_its_token_to_itself(tmp_path: Path) -> None:
    script = CLUSTER / "slurm.sh"
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = script.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "umask 077" in text
    assert "--dashboard-host=127.0.0.1" in text
    assert 'run "$@"' in text
    assert not re.search(r"RAY_AUTH_TOKEN=", text), "an environment of a command line can be read by others"


def test_the_slurm_script_starts_a_head_and_workers_and_runs_the_job(tmp_path: Path) -> None:
    """With stand-ins for Slurm's and Ray's programs, which write down how they were called."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    log = tmp_path / "calls"
    for name, answer in {
        "srun": 'case "$*" in *hostname*) echo 127.0.0.1 10.0.0.5;; *) shift $(($# - $#));; esac',
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "ray": "exit 0",
        "python": "exit 0",
    }.items():
        program = programs / name
        program.write_text(f'#!/usr/bin/env bash\necho {name} "$@" >>{log}\n{answer}\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh"), "conf=/shared/my.yaml", "steps=3"],
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    calls = log.read_text()
    assert "-w n1 ray start --head --node-ip-address=10.0.0.5 --port=20007" in calls
    assert "--nodes=2 --ntasks=2 --overlap -w n2,n3 ray start --address=10.0.0.5:20007 --block" in calls
    assert "python -m caprl_async.run conf=/shared/my.yaml steps=3 ring.address=10.0.0.5:20007" in calls
    assert not list(tmp_path.glob(".caprl-token*")), "the token goes with the job"


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_port_is_in_the_docs(name: str) -> None:
    ports = set(re.findall(r"--port=(\d+)", str(read(name)))) | {"8265"}
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert all(port in text for port in ports)
