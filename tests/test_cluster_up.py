"""`ray up` of cluster/onprem.yaml, on hosts that have nothing in common but a network and a file system."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hosts_kit import Hosts

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).parent / "ray"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path / "hosts")
    try:
        made.start()
    except (PermissionError, FileNotFoundError, subprocess.CalledProcessError) as error:
        made.stop()
        pytest.skip(f"needs the right to make namespaces and networks: {error}")
    yield made
    made.stop()


def _filled_in(hosts: Hosts) -> dict[str, Any]:
    """cluster/onprem.yaml as its user would fill it in; the project is installed already."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text())
    config["provider"] |= {"head_ip": hosts.ips[0], "worker_ips": hosts.ips[1:]}
    config["auth"] = {"ssh_user": "root"}
    config["min_workers"] = config["max_workers"] = 1
    config["setup_commands"] = [
        f"ln -sfn {Path(sys.prefix)} ~/caprl_async/.venv",
        *(command for command in config["setup_commands"] if ".bashrc" in command),
    ]
    return config


def _on_head(hosts: Hosts) -> list[str]:
    """Command lines of Ray's daemon on the first host."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [
        line for line in lines if "raylet/raylet " in line and f"--node_ip_address={hosts.ips[0]} " in line
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_is_submitted_trains_across_the_hosts(hosts: Hosts, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(_filled_in(hosts)))

    def ray(*arguments: str) -> str:
        done = subprocess.run(
            [str(RAY), *arguments],
            cwd=ROOT,
            env=hosts.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-6000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    ray("get-auth-token", "--generate")
    ray("up", "-y", "--no-config-cache", str(file))
    python = hosts.home(0) / "caprl_async" / ".venv" / "bin" / "python"
    run = tmp_path / "shared" / "run"
    job = [
        *(str(python), "-m", "caprl_async.run", f"conf={ROOT}/conf/demo.yaml", f"run_dir={run}", "steps=3"),
        *("ring.address=auto", "replay.batch_groups=4", "data.heldout=", "ring.cpus_per_actor=0.9"),
        *("evaluate.heldout_judge.model=", "evaluate.heldout_judge.data=", "evaluate.dense_policy="),
    ]
    submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--", *job]
    on_head = "export RAY_AUTH_MODE=token; "
    ray("exec", str(file), on_head + shlex.join(submit))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert (run / "model" / "model.safetensors").is_file()

    listed = tmp_path / "actors.json"
    ray("exec", str(file), f"{on_head} ray list actors --format json >{listed}")
    actors = json.loads(listed.read_text())
    ours = {one["name"]: one["node_id"] for one in actors if (one["name"] or "").startswith("caprl-")}
    assert len(ours) == 4
    assert len(set(ours.values())) == 2, "the ring's actors were on both hosts"
    assert _on_head(hosts)
    ray("down", "-y", str(file))
    assert not _on_head(hosts), "workers follow when they have missed the head for a minute"
