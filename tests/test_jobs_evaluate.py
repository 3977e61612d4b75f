"""Prism as a user meets it: captions, answers from captions alone, scores; resumes; captions of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_kit import in_text, png, write_tsv
from endpoint_kit import FakeServer, Tokens, serving

from caprl_async.data.rows import DataError
from caprl_async.run import main
from caprl_async.stream.captions import Caption, read_captions
from caprl_async.stream.shards import WebDataset

CONF = "conf=conf/evaluate.yaml"


def captioner(prompt: str) -> Tokens:
    return {"fourteen bars": 1.0}


def answerer(prompt: str) -> Tokens:
    """Knows what the caption says, and nothing else."""
    if "Right answer:" in prompt:
        return {"\\boxed{0.5}": 1.0}
    return {"\\boxed{14}" if "fourteen bars" in prompt else "\\boxed{unknown}": 1.0}


@pytest.fixture
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    with serving(captioner) as one, serving(answerer) as other:
        yield one, other


def arguments(folder: Path, servers: tuple[FakeServer, FakeServer], *more: str) -> list[str]:
    one, other = servers
    return [
        CONF,
        f"run_dir={folder}",
        f"captioner.endpoint.url={one.url}",
        *(f"{who}.endpoint.url={other.url}" for who in ("answerer", "grader")),
        *(f"{who}.max_tokens=1" for who in ("captioner", "answerer", "grader")),
        *("prism.captions=2", "captioner.temperature=1.0", *more),
    ]


def chartqa(folder: Path) -> Path:
    rows = [
        {"question": "How many bars?", "answer": "14"},
        {"question": "How many bars?", "answer": "20", "image": in_text(png("blue"))},
        {"question": "And here?", "answer": "14.5", "image": "2"},
        {"question": "", "answer": "1"},
    ]
    return write_tsv(folder / "ChartQA.tsv", *rows)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_questions_are_answered_from_captions_alone(
    tmp_path: Path, servers: tuple[FakeServer, FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    asked = arguments(folder, servers, "prism.benchmark=chartqa", f"prism.data={chartqa(tmp_path)}")
    assert main(asked) == 0, capsys.readouterr().err
    result = json.loads((folder / "result.json").read_text())
    told = [result[name] for name in ("items", "images", "unscored", "captions_per_image")]
    assert told == [3, 2, 0, 2]
    assert result["mean"]["mean"] == pytest.approx(2 / 3)
    assert result["best"] == pytest.approx(2 / 3)
    assert result["blind"]["mean"] == 0
    captions = result["captions"]
    assert (captions["captions"], captions["words_mean"], captions["words_95th"]) == (4, 2, 2)
    assert captions["truncated"] == 1, "one token each"
    seen, answering = servers
    assert len(seen.bodies) == 2
    assert all(body["n"] == 2 for body in seen.bodies)
    assert len(answering.bodies) == 3 * (2 + 1)  # two captions and none
    assert not any("image_url" in json.dumps(body) for body in answering.bodies)
    assert sum("fourteen bars" in prompt and "How many" in prompt for prompt in answering.prompts) == 2 * 2
    assert sum("cannot see the image" in prompt for prompt in answering.prompts) == 3
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects] == ["missing_column"]

    assert main(asked) == 2
    assert "resume=true" in capsys.readouterr().err
    assert main([*asked, "resume=true"]) == 0
    assert len(seen.bodies) == 2, "nothing is asked again"
    assert len(answering.bodies) == 3 * (2 + 1)
    assert json.loads((folder / "result.json").read_text()) == result

    theirs = tmp_path / "captions.jsonl"
    refs = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    theirs.write_text(
        "".join(json.dumps({"sha256": ref["sha256"], "caption": "bars"}) + "\n" for ref in refs)
    )
    assert main([*asked, f"prism.captions_from={theirs}", "resume=true"]) == 0
    changed = json.loads((folder / "result.json").read_text())
    assert (changed["captioner"], changed["mean"]["mean"]) == (str(theirs), 0), (
        "other captions, other answers"
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_graded_benchmarks_and_captions_made_elsewhere(
    tmp_path: Path, servers: tuple[FakeServer, FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question": "What?", "answer": "a<AND>b", "capability": "ocr"},
        {"question": "Which?", "answer": "c", "image": in_text(png("blue"))},
    ]
    data = write_tsv(tmp_path / "MMVet.tsv", *rows)
    theirs = tmp_path / "captions.jsonl"
    theirs.write_text(json.dumps({"id": "1", "caption": "fourteen bars"}) + "\n")
    folder = tmp_path / "run"
    more = ["prism.benchmark=mmvet", f"prism.data={data}", f"prism.captions_from={theirs}"]
    with pytest.raises(SystemExit) as ended:
        main(arguments(folder, servers, *more))
    assert ended.value.code == 3
    result = json.loads((folder / "result.json").read_text())
    assert (result["items"], result["unscored"], result["mean"]["mean"]) == (1, 1, 0.5)
    assert result["categories"] == {"ocr": 0.5}
    assert not servers[0].bodies
    assert "1 questions are about images without a caption" in capsys.readouterr().err


def test_captions_of_any_form_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"sha256": "x", "caption": "one"},
        {"sha256": "x", "captions": ["two", "three"]},
        {"id": 7, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "four"}]},
        {"image": "a.png", "caption": "five"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_captions(tmp_path / "c.jsonl")
    image = hashlib.sha256(png()).hexdigest()
    texts = {key: [caption.text for caption in captions] for key, captions in found.items()}
    assert texts == {"x": ["one", "two", "three"], "7": ["four"], image: ["five"]}
    whole = [
        {"sha256": "y", "image": None, "captions": ["six"], "finish": ["length"]},
        {
            "sha256": None,
            "image": {"bytes": png("blue"), "path": None},
            "captions": ["seven"],
            "finish": ["stop"],
        },
    ]
    pq.write_table(pa.Table.from_pylist(whole), tmp_path / "d.parquet")
    more = read_captions(tmp_path)
    assert more["y"] == [Caption("six", True)]
    assert more[hashlib.sha256(png("blue")).hexdigest()] == [Caption("seven", False)]
    shards = WebDataset(tmp_path / "tars", "captions", 10, {})
    shards.add({"id": "z", "sha256": "z", "data": png(), "captions": ["eight"], "finish": ["stop"]})
    shards.flush()
    assert read_captions(tmp_path / "tars") == {"z": [Caption("eight", False)]}
    for bad in ('{"caption": "no image"}', '{"id": 1}', "[]", "{"):
        (tmp_path / "bad.jsonl").write_text(bad + "\n")
        with pytest.raises(DataError, match=r"bad\.jsonl"):
            read_captions(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"no \.parquet or \.jsonl"):
        read_captions(tmp_path / "none")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["prism.benchmark=nothing"], "known are ai2d"),
        (["prism.data=/nowhere"], "/nowhere"),
        (["answerer.endpoint.url="], "answerer.model"),
        (["prism.template=no caption"], "{caption}"),
        (["prism.benchmark=mmvet", "grader.endpoint.url="], "grader.model"),
    ],
)
def test_a_wrong_conf_is_one_clear_error(
    more: list[str], named: str, tmp_path: Path, servers: tuple[FakeServer, FakeServer],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = chartqa(tmp_path)
    begun = arguments(tmp_path / "run", servers, "prism.benchmark=chartqa", f"prism.data={data}")
    assert main([*begun, *more]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_tiny_judge_measures_captions_and_runs_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, both = (tmp_path / name for name in ("one", "other", "both"))
    asked = ["conf=conf/evaluate_demo.yaml", "prism.limit=64", "prism.captions=2"]
    assert main([*asked, f"run_dir={one}", "captioner.model=caprl_async/tiny/models/policy_dense"]) == 0
    dense = json.loads((one / "result.json").read_text())
    assert (dense["items"], dense["unscored"], dense["captions_per_image"]) == (64, 0, 2)
    assert dense["mean"]["mean"] > 0.8
    assert dense["ceiling"]["mean"] > 0.95
    assert dense["blind"]["mean"] < 0.4
    assert dense["caption_qa"]["mean"] > 0.8
    assert dense["categories"]["absent"] > 0.9
    assert dense["captions"]["words_mean"] > 8

    theirs = tmp_path / "captions.jsonl"
    theirs.write_text(
        "".join(
            json.dumps({"sha256": json.loads(line)["sha256"], "caption": ""}) + "\n"
            for line in (one / "images.jsonl").read_text().splitlines()
        )
    )
    assert main([*asked, f"run_dir={other}", f"prism.captions_from={theirs}"]) == 0
    empty = json.loads((other / "result.json").read_text())
    assert empty["mean"]["mean"] == pytest.approx(empty["blind"]["mean"]), "an empty caption is the floor"

    assert main(["conf=conf/compare.yaml", f"run_dir={both}", f"compare.runs=[{other},{one}]"]) == 0
    first, second = json.loads((both / "compare.json").read_text())
    assert (first["run"], second["shared_questions"]) == ("other", 64)
    better = dense["mean"]["mean"] - empty["mean"]["mean"]
    assert second["better_than_first"]["mean"] == pytest.approx(better)
    assert second["better_than_first"]["low"] > 0
    page = (both / "compare.html").read_text()
    assert page.count("<article") == 8
    assert "better by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "named"),
    [("[]", "compare.runs is empty"), ("[/nowhere]", "/nowhere"), ("[/a,/a]", "twice")],
)
def test_runs_that_cannot_be_compared_are_named(
    runs: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conf=conf/compare.yaml", f"run_dir={tmp_path / 'both'}", f"compare.runs={runs}"]) == 2
    assert named in capsys.readouterr().err
