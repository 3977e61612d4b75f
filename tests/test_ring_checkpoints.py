"""Which checkpoints of a run stay, also after damage and rollbacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from caprl_async.ring.checkpoints import MANIFEST, Checkpoints


def write(checkpoints: Checkpoints, step: int) -> Path:
    folder = checkpoints.begin(step)
    (folder / "state").write_text(str(step))
    return checkpoints.finish(folder, {})


@pytest.mark.parametrize("keep", [1, 2])
def test_a_new_checkpoint_outlives_damaged_later_ones(keep: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (50, 100, 150):
        write(checkpoints, step)
    for folder in checkpoints.all():
        (folder / MANIFEST).write_text("{")
    assert checkpoints.newest_sound(lambda _: None) is None  # so the ring goes back to the start
    for step in (50, 100):
        assert checkpoints.newest_sound(lambda _: None) != write(checkpoints, step)
        newest = checkpoints.newest_sound(lambda _: None)
        assert newest is not None
        assert newest.name == f"step-{step:06d}"
    assert [folder.name for folder in checkpoints.all()] == [f"step-{n:06d}" for n in (50, 100)[-keep:]]


def test_the_oldest_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        write(checkpoints, step)
    assert [folder.name for folder in checkpoints.all()] == ["step-000002", "step-000003"]
