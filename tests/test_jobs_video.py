"""Videos by the command line: supervised training on captions of them, then the ring from its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caprl_async.observe.metrics import read_metrics
from caprl_async.run import main
from caprl_async.tiny.video import write_videos

UNMEASURED = [
    *("data.heldout=", "evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
    *("evaluate.interval=0", "evaluate.program="),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_captioner_of_images_goes_on_with_videos(tmp_path: Path) -> None:
    clips, sft, rl = tmp_path / "clips", tmp_path / "sft", tmp_path / "rl"
    write_videos(clips, 0, train=24, heldout=2, sparse=24)
    learn = ["conf=conf/video_sft_demo.yaml", *UNMEASURED, f"sft.data={clips / 'sparse.parquet'}"]
    assert main([*learn, f"run_dir={sft}", "steps=3", "sft.batch=8", "sft.interval=100"]) == 0
    losses = [row["loss"] for row in read_metrics(sft)]
    assert losses[-1] < losses[0]  # type: ignore[operator]

    ring = ["conf=conf/video_demo.yaml", *UNMEASURED, f"data.train={clips / 'train.parquet'}"]
    small = ["steps=2", "replay.batch_groups=4", "replay.max_staleness=0", "checkpoint.interval=2"]
    assert main([*ring, *small, f"run_dir={rl}", f"policy.model={sft / 'model'}"]) == 0
    rows = read_metrics(rl)
    assert len(rows) == 2
    for row in rows:  # engine and learner have seen the same frames behind the same times
        assert abs(row["kl_behaviour"]) < 1e-3  # type: ignore[arg-type]
        assert row["ratio_max"] == pytest.approx(1.0, abs=1e-2)
    samples = [json.loads(line) for line in (rl / "samples.jsonl").read_text().splitlines()]
    assert all(Path(sample["image"]).is_file() for sample in samples)
    assert "<svg" in (rl / "report.html").read_text()
