"""The paper's comparisons in miniature: their data, every arm's conf, and what the table says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tool_kit import TOOLS, load_tool

from caprl_async import conf, tiny
from caprl_async.data.examples import Example, read_examples

TRAIN = Path(tiny.__file__).parent / "data" / "train.parquet"


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("reproduce_small")


@pytest.fixture(scope="module")
def data(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    made_from = tool.small_data
    made_from.write_captions(made / "sparse.parquet", "sparse", 6, 0)
    made_from.write_captions(made / "dense.parquet", "dense", 6, 0)
    made_from.write_unfiltered(TRAIN, made / "unfiltered.parquet", 0.3, 0)
    made_from.write_answers(TRAIN, made / "answers.parquet", 3)
    made_from.write_answers(TRAIN, made / "asked.parquet", 2)
    for name in ("init", "larger"):
        (made / name).symlink_to(TRAIN.parent.parent / "models" / "policy")
    (made / "rater" / "run").mkdir(parents=True)
    (made / "rater" / "run" / "model").symlink_to(TRAIN.parent.parent / "models" / "policy")
    for name in ("by-start", "by-caprl-0"):
        (made / name).mkdir()
    return made


def test_kinds_of_captions_are_of_the_same_images(data: Path) -> None:
    sparse, dense = (list(read_examples(data / f"{kind}.parquet")) for kind in ("sparse", "dense"))
    assert len(sparse) == len(dense) == 6
    for one, other in zip(sparse, dense, strict=True):
        assert isinstance(one, Example)
        assert isinstance(other, Example)
        assert one.image == other.image
    assert sum(len(one.texts[0]) for one in dense) > sum(len(one.texts[0]) for one in sparse)


def test_three_in_ten_answers_are_wrong(data: Path) -> None:
    def answers(path: Path) -> list[str]:
        rows = pq.read_table(path, columns=["reward_model"]).to_pylist()
        return [q["answer"] for row in rows for q in row["reward_model"]["ground_truth"]]

    right, shown = answers(TRAIN), answers(data / "unfiltered.parquet")
    assert sum(a != b for a, b in zip(right, shown, strict=True)) / len(right) == pytest.approx(0.3, abs=0.01)


def test_answers_are_words(data: Path) -> None:
    (first, *others) = read_examples(data / "answers.parquet")
    assert len(others) == 3 * 8 - 1
    assert isinstance(first, Example)
    assert first.prompt.endswith("?")
    assert first.texts[0].isalpha()


def test_every_arm_has_a_conf_that_runs(tool: Any, data: Path, tmp_path: Path) -> None:
    for arm in tool.ARMS:
        filled = [one.replace("{data}", str(data)).replace("{seed}", "0") for one in arm.overrides]
        assert conf.load([*filled, f"run_dir={tmp_path / arm.name}"]).job in ("train", "sft", "pretrain")


def test_every_claim_is_about_two_arms(tool: Any) -> None:
    names = {"start", *(arm.name for arm in tool.ARMS)}
    assert len(names) == len(tool.ARMS) + 1
    for claim in tool.CLAIMS:
        assert {claim.better, claim.worse} <= names


def test_intervals_are_students(tool: Any) -> None:
    mean, low, high = tool.interval([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees at 97.5 %, from a table
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)
    assert tool.interval([0.1]) == (0.1, -math.inf, math.inf)


def by_seed(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: {str(seed): value for seed, value in enumerate(found)} for name, found in values.items()}


def test_the_table_says_who_agrees(tool: Any) -> None:
    values = {
        "start": [0.48, 0.49, 0.47],
        "caprl": [0.80, 0.82, 0.81],
        "unfiltered": [0.81, 0.80, 0.82],
        "pretrain-caprl": [0.5, 0.51, 0.52],
        "pretrain-none": [0.4, 0.41, 0.42],
    }
    text = tool.table(tool.ARMS, by_seed(values))
    (beats,) = [line for line in text.splitlines() if "RL beats its start" in line]
    assert "48.3 against 39.9" in beats
    assert beats.endswith("| yes |")
    assert "| `caprl` | RL, the judge's probabilities | 81.0 % | 80.0 %, 82.0 %, 81.0 % |" in text
    values |= {"questions-2": [0.80, 0.82, 0.81], "questions-3": [0.81, 0.81, 0.82]}
    (alike,) = [x for x in tool.table(tool.ARMS, by_seed(values)).splitlines() if "as good as two" in x]
    assert alike.endswith("| no difference seen |")
    values["questions-3"] = [0.90, 0.92, 0.91]
    (alike,) = [x for x in tool.table(tool.ARMS, by_seed(values)).splitlines() if "as good as two" in x]
    assert alike.endswith("| no |")
    (filtered,) = [line for line in text.splitlines() if "filtered questions" in line]
    assert filtered.endswith("| open |")
    (captions,) = [line for line in text.splitlines() if "captions help" in line]
    assert "-0.10 nats" in captions, "of a loss the smaller is the better"
    assert captions.endswith("| no |")


def test_a_finished_arm_is_not_run_again(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.small_rater, "program", lambda *arguments: pytest.fail("it ran"))
    folder = tmp_path / "caprl-0"
    folder.mkdir()
    (folder / "result.json").write_text(
        '{"start": {"heldout_judge": 0.4}, "trained": {"heldout_judge": 0.8}}'
    )
    (arm,) = [arm for arm in tool.ARMS if arm.name == "caprl"]
    assert tool.run_arm(arm, 0, tmp_path, tmp_path, []) == {"start": 0.4, "caprl": 0.8}
    assert (TOOLS / "small_data.py").is_file()


def test_results_of_elsewhere_are_taken(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text('{"start": {"0": 0.4, "1": 0.5}, "caprl": {"0": 0.8, "1": 0.9}}')
    monkeypatch.setattr(tool, "make_data", lambda folder: None)
    monkeypatch.setattr(tool.small_rater, "program", lambda *arguments: pytest.fail("it ran"))
    assert tool.main(["--seeds", "0", "1", "--only", "caprl", "--out", str(out)]) == 0
    assert "| 85.0 % | 80.0 %, 90.0 % |" in (out / "table.md").read_text()
    table = tool.table(tool.ARMS, {"start": {"0": 0.4, "1": 0.5}, "caprl": {"1": 0.9, "2": 0.8}})
    (beats,) = [line for line in table.splitlines() if "RL beats its start" in line]
    assert "| +40.0 points | 1 | open |" in beats, "of the one seed that both have"
