"""Images with texts for supervised training: every form, bad rows, the index, and the order of steps."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caprl_async import tiny
from caprl_async.data.examples import Example, read_examples
from caprl_async.data.index import IndexSpec, make_index, rows_of_step
from caprl_async.data.processor import PolicyProcessor
from caprl_async.data.rows import DataError, Reject

MODEL = Path(tiny.__file__).parent / "models" / "policy"


def png(color: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (112, 112), color).save(data, "PNG")
    return data.getvalue()


def examples(path: Path) -> list[Example]:
    found = list(read_examples(path))
    assert not [one for one in found if isinstance(one, Reject)]
    return [one for one in found if isinstance(one, Example)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_parquet_with_captions_and_chats(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": {"bytes": png(), "path": None}, "captions": ["one", " two "], "prompt": None},
        {"id": None, "image": {"bytes": png(), "path": None}, "captions": ["three"],
         "prompt": [{"role": "user", "content": "<image> what is it ?"}]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    parts = [{"type": "image"}, {"type": "text", "text": "what color ?"}]
    chat = {"image": "a.png", "prompt": [{"role": "user", "content": parts}], "caption": "red"}
    (third,) = examples(write_jsonl(tmp_path / "y.jsonl", [chat]))
    assert third.prompt == "what color ?"
    first, second = examples(tmp_path / "x.parquet")
    assert (first.row_id, first.texts, first.prompt) == ("a", ("one", "two"), "")
    assert (second.row_id, second.prompt) == ("x:2", "what is it ?")


def test_jsonl_with_paths_and_conversations(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nwhat color ?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "what shape ?"},
        {"from": "gpt", "value": "circle"},
    ]
    rows = [
        {"id": 7, "image": "im/a.png", "caption": "x"},
        {"id": 8, "image": "im/a.png", "conversations": turns},
    ]
    first, *others = examples(write_jsonl(tmp_path / "x.jsonl", rows))
    assert first.image == tmp_path / "im/a.png"
    assert [(one.row_id, one.prompt, one.texts) for one in others] == [
        ("8#0", "what color ?", ("red",)),
        ("8#1", "what shape ?", ("circle",)),
    ]


def test_webdataset_with_text_or_json_beside_each_image(tmp_path: Path) -> None:
    members = {
        "_about.json": b"{}",
        "0001.png": png(), "0001.txt": b"a red image",
        "0002.json": json.dumps({"id": "b", "captions": ["blue"], "image": "elsewhere.png"}).encode(),
        "0002.jpg": png("blue"),
    }  # fmt: skip
    first, second = examples(write_tar(tmp_path / "x.tar", members))
    assert (first.row_id, first.texts, first.image) == ("x.tar/0001", ("a red image",), png())
    assert (second.row_id, second.texts, second.image) == ("b", ("blue",), png("blue"))


def test_names_in_a_tar_file_end_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    members = {
        f"./v1.0/{i}.{kind}": data for i in (1, 2) for kind, data in (("PNG", png()), ("TXT", b"red ."))
    }
    found = examples(write_tar(tmp_path / "x.tar", members))
    assert [one.row_id for one in found] == ["x.tar/./v1.0/1", "x.tar/./v1.0/2"]


def test_captions_of_annotated_files_are_examples(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = {"id": "a", "path": str(tmp_path / "a.png"), "prompt": "describe", "captions": ["red", "all red"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (found,) = examples(tmp_path / "x.parquet")
    assert (found.image, found.texts) == (tmp_path / "a.png", ("red", "all red"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": "x"}, "no_image"),
        ({"image": "a.png"}, "no_text"),
        ({"image": "a.png", "caption": "  "}, "no_text"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}, "no_text"),
        ({"image": "a.png", "conversations": ["x"]}, "malformed_turn"),
        ({"image": "a.png", "caption": "\ud800"}, "not_unicode"),
        ({"image": "a.png", "caption": "x", "prompt": {"role": "user"}}, "malformed_prompt"),
        ('{"image": ', "malformed_json"),
        ("[]", "malformed_json"),
    ],
)
def test_a_bad_row_costs_itself_alone(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"image": "a.png", "caption": "good"}
    first, bad, last = read_examples(write_jsonl(tmp_path / "x.jsonl", [good, row, good]))
    assert isinstance(bad, Reject)
    assert bad.reason == reason
    assert isinstance(first, Example)
    assert isinstance(last, Example)


def test_what_is_no_file_of_examples_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.parquet, \.jsonl, \.tar"):
        list(read_examples(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
        list(read_examples(tmp_path))


@pytest.fixture(scope="module")
def processor() -> PolicyProcessor:
    return PolicyProcessor(str(MODEL), 12544, 12544)


def test_the_index_holds_what_can_be_used_and_is_made_once(
    tmp_path: Path, processor: PolicyProcessor
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:50])
    rows = [
        {"id": "a", "image": "a.png", "captions": ["topleft red circle .", "red . red . red . red . red ."]},
        {"id": "b", "image": "broken.png", "caption": "red ."},
        {"id": "c", "image": "a.png", "caption": "quixotic zebras"},
        {"id": "d", "image": "gone.png", "caption": "red ."},
        {"id": "e", "image": "a\0.png", "caption": "red ."},
        {"id": "f", "image": "\udce9.png", "caption": "red ."},
    ]
    spec = IndexSpec(str(write_jsonl(tmp_path / "x.jsonl", rows)), "describe the image .", 6)
    rejects, path = tmp_path / "rejects.jsonl", tmp_path / "sft" / "train.parquet"
    index = make_index(path, spec, processor, tmp_path / "images", rejects)
    assert len(index) == 1
    ready = index[0]
    assert (ready.row_id, ready.image.path) == ("a", str(tmp_path / "a.png"))
    assert [processor.tokenizer.decode(ids[:-1]) for ids in ready.texts] == ["topleft red circle ."]
    assert ready.texts[0][-1] == processor.eos_token_id
    expanded = processor.expanded(ready.prompt, ready.grids)
    assert expanded.count(processor.image_token_id) == processor.image_tokens(ready.grids[0]) == 16
    reasons = [json.loads(line)["reason"] for line in rejects.read_text().splitlines()]
    assert Counter(reasons) == {"bad_image": 4, "not_in_vocabulary": 1}

    written = path.stat().st_mtime_ns
    make_index(path, spec, processor, tmp_path / "images", rejects)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:99])  # a loss of power: it is made again
    make_index(path, spec, processor, tmp_path / "images", rejects)
    assert path.stat().st_mtime_ns != written
    made = path.stat().st_mtime_ns
    make_index(path, spec, processor, tmp_path / "moved", rejects)  # it names the files that are kept
    assert path.stat().st_mtime_ns != made
    other = IndexSpec(spec.data, spec.prompt, 40)
    assert len(make_index(path, other, processor, tmp_path / "images", rejects)[0].texts) == 2


def test_an_index_of_nothing_is_an_error_with_the_reason(tmp_path: Path, processor: PolicyProcessor) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"image": "gone.png", "caption": "red ."}])
    with pytest.raises(DataError, match=r"no example can be used .* bad_image"):
        make_index(
            tmp_path / "i.parquet",
            IndexSpec(str(file), "x", 9),
            processor,
            tmp_path,
            tmp_path / "rejects.jsonl",
        )


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3))
def test_steps_pass_over_all_rows_again_and_again(total: int, batch: int, seed: int) -> None:
    steps = -(-3 * total // batch)
    met = [row for step in range(steps) for row in rows_of_step(step, batch, total, seed)]
    assert len(met) == steps * batch
    for epoch in range(3):
        assert sorted(met[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert met[:batch] == rows_of_step(0, batch, total, seed)
