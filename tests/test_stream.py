"""Stage and outputs of the jobs that stream images through models; with Ray: test_jobs_annotate.py."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_kit import png
from endpoint_kit import FakeServer, Tokens, says, serving
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caprl_async.choices import Form
from caprl_async.config import EndpointConfig, WriterConfig
from caprl_async.data.examples import Example, read_examples
from caprl_async.data.images import FORMATS, media_type
from caprl_async.data.rows import DataError
from caprl_async.stream import shards as shards_module
from caprl_async.stream.captioning import Captioned
from caprl_async.stream.done import Done
from caprl_async.stream.shards import CAPTIONED, FORMS, Parquet, Shards
from caprl_async.stream.stage import ModelAway, WriterStage
from caprl_async.stream.texts import asked_as

# ---------------------------------------------------------------- ids


@given(st.lists(st.text()), st.lists(st.text()))
def test_done_is_a_set(ids: list[str], others: list[str]) -> None:
    done = Done(ids)
    assert done.has([*ids, *others]).tolist() == [True] * len(ids) + [other in ids for other in others]


# ---------------------------------------------------------------- outputs

ABOUT = {"captioner": "tiny", "prompt": "what?"}


def row(row_id: str, **changes: Any) -> dict[str, Any]:
    base = {
        "id": row_id, "path": f"{row_id}.png", "sha256": "x", "prompt": "what?",
        "captions": ["a red dot", "a dot"], "finish": ["stop", "length"], "tokens": [3, 2],
    }  # fmt: skip
    return base | changes


def opened(form: Form, folder: Path, rows: int = 2) -> Shards:
    return FORMS[form](folder, "captions", rows, ABOUT)


@pytest.mark.parametrize("form", list(Form))
def test_outputs_hold_each_row_once_over_starts(form: Form, tmp_path: Path) -> None:
    data = {"data": png()} if form is Form.webdataset else {}
    shards = opened(form, tmp_path)
    for name in ("a", "b", "c"):
        shards.add(row(name, **data))
    assert list(shards.ids()) == ["a", "b"]  # the third waits for its shard to fill
    (tmp_path / ".part-captions-000001.x").write_bytes(b"half")  # and a start that died left this
    again = opened(form, tmp_path)
    assert list(again.ids()) == ["a", "b"]
    again.add(row("c", **data))
    again.flush()
    assert list(again.ids()) == ["a", "b", "c"]
    assert len(again.files()) == 2
    assert not list(tmp_path.glob(".part-*"))


def test_parquet_says_how_it_was_made(tmp_path: Path) -> None:
    shards = opened(Form.parquet, tmp_path)
    shards.add(row("a"))
    shards.flush()
    (file,) = shards.files()
    table = pq.read_table(file)
    assert table.to_pylist() == [row("a")]
    assert json.loads(pq.read_schema(file).metadata[b"caprl_async"]) == ABOUT


def test_conversations_are_those_of_sharegpt(tmp_path: Path) -> None:
    shards = opened(Form.sharegpt, tmp_path)
    shards.add(row("a"))
    shards.flush()
    first, second = (json.loads(line) for line in shards.files()[0].read_text().splitlines())
    assert first == {
        "id": "a",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "a red dot"},
        ],
    }
    assert second["conversations"][1]["value"] == "a dot"
    assert json.loads((tmp_path / "_about.json").read_text()) == ABOUT


def test_webdataset_holds_the_images(tmp_path: Path) -> None:
    shards = opened(Form.webdataset, tmp_path)
    shards.add(row("a", data=png()))
    shards.flush()
    with tarfile.open(shards.files()[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    keys = {name.partition(".")[0] for name in members}
    assert len(keys) == 1
    (key,) = keys
    assert members[f"{key}.png"] == png()
    assert members[f"{key}.txt"] == b"a red dot"
    assert json.loads(members[f"{key}.json"])["about"] == ABOUT


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PPM", "TIFF", "JPEG2000", "WEBP"])
def test_what_is_written_with_its_image_can_be_trained_on(form: str, tmp_path: Path) -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (28, 28))]} if form == "MPO" else {}
    encoded = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(encoded, form, **more)
    assert media_type(encoded.getvalue()) in ("image/jpeg", *map(Image.MIME.get, FORMATS))
    shards = opened(Form.webdataset, tmp_path)
    shards.add(row("a", data=encoded.getvalue()))
    shards.flush()
    (example,) = read_examples(tmp_path)
    assert isinstance(example, Example)
    assert (example.image, example.texts) == (encoded.getvalue(), ("a red dot", "a dot"))


def test_what_was_made_otherwise_is_not_mixed(tmp_path: Path) -> None:
    shards = opened(Form.parquet, tmp_path)
    shards.add(row("a"))
    shards.flush()
    with pytest.raises(DataError, match=r"captioner 'tiny', now 'large'"):
        FORMS[Form.parquet](tmp_path, "captions", 2, ABOUT | {"captioner": "large"})


@pytest.mark.parametrize("form", list(Form))
def test_a_damaged_output_is_named(form: Form, tmp_path: Path) -> None:
    shards = opened(form, tmp_path)
    (tmp_path / f"captions-000000{shards.suffix}").write_bytes(b"x" * 700)
    with pytest.raises(DataError, match="captions-000000"):
        list(shards.ids())


# ---------------------------------------------------------------- the stage


def say_hello(prompt: str) -> Tokens:
    return {" hello": 1.0}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(say_hello) as fake:
        yield fake


def stage(server: FakeServer, empty: bool = False, **changes: Any) -> WriterStage:
    endpoint = EndpointConfig(url=server.url, retries=0, timeout_s=5.0, max_in_flight=1)
    config = WriterConfig(endpoint=endpoint, max_tokens=1, **changes)
    what = Captioned("what?", captions=1, seed=0, empty=empty)
    return WriterStage(config, "captioner", 0, what, CAPTIONED)


def batch(*rows: dict[str, Any]) -> pa.Table:
    base = {"id": "x", "path": None, "data": None, "problem": None}
    return pa.Table.from_pylist([base | one for one in rows])


def through(made: WriterStage, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    return list(asyncio.run(made(batch(*rows))).to_pylist())


def test_a_row_that_cannot_be_asked_or_answered_costs_only_itself(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    server.faults = [says(400, "too large")]
    found = through(
        stage(server),
        {"id": "refused", "data": png("blue")},
        {"id": "lost", "path": str(tmp_path / "none.png")},
        {"id": "known", "problem": "the row has no image"},
        {"id": "good", "path": str(tmp_path / "a.png")},
    )
    problems = {one["id"]: one["problem"] for one in found}
    assert "too large" in problems["refused"]
    assert "none.png" in problems["lost"]
    assert problems["known"] == "the row has no image"
    assert problems["good"] is None
    assert found[-1]["captions"] == ["hello"]
    assert len(server.bodies) == 2


def test_an_empty_caption_is_none_unless_it_is_measured(server: FakeServer) -> None:
    server.tokens = lambda prompt: {" ": 1.0}
    (found,) = through(stage(server), {"data": png()})
    assert "wrote nothing" in found["problem"]
    (found,) = through(stage(server, empty=True), {"data": png()})
    assert (found["problem"], found["captions"]) == (None, [""])


def test_a_model_that_is_away_ends_the_job_and_one_bad_row_does_not(server: FakeServer) -> None:
    made = stage(server, refusals=2)
    server.faults = [says(500), says(500)]
    found = through(made, *({"id": str(n), "data": png()} for n in range(3)))
    assert [bool(one["problem"]) for one in found] == [True, True, False]
    server.always = says(503, "gone")
    with pytest.raises(ModelAway, match=r"captioner.*3 rows.*gone"):
        through(made, *({"id": str(n), "data": png()} for n in range(4)))


def test_what_is_asked_depends_on_the_row_alone() -> None:
    what = Captioned("what?", captions=3, seed=1)
    asks = [what.asks({"id": name, "data": png(), "path": None})[0] for name in ("a", "a", "b")]
    assert asks[0] == asks[1]
    assert asks[0].seed != asks[2].seed
    assert asks[0].n == 3


# ---------------------------------------------------------------- files for others


def test_a_folder_of_parquet_files_is_a_data_set(tmp_path: Path) -> None:
    """Whatever the rows of one file lack, all files have the same columns; and nothing else is in the way."""
    for number, path in enumerate((None, "/a.png")):
        shards = Parquet(tmp_path, "captions", 1, {})
        shards.add({"id": str(number), "path": path, "problem": None, "captions": ["a"], "tokens": [1]})
        shards.flush()
    rows = pq.read_table(tmp_path).to_pylist()
    assert [(row["id"], row["path"]) for row in rows] == [("0", None), ("1", "/a.png")]
    assert "problem" not in rows[0]


def test_images_do_not_wait_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_FLUSH_BYTES", 2500)
    monkeypatch.setattr(shards_module, "_GROUP_BYTES", 1500)
    schema = pa.schema([("id", pa.string()), ("image", pa.struct([("bytes", pa.binary())]))])
    shards = Parquet(tmp_path, "questions", 1000, {}, schema)
    for number in range(6):
        shards.add({"id": str(number), "image": {"bytes": bytes(1000)}})
    assert [pq.read_metadata(file).num_row_groups for file in shards.files()] == [3, 3]
    assert [row["id"] for row in shards.read()] == list("012345")


@given(st.text(), st.lists(st.text(), max_size=3))
def test_a_row_is_known_by_what_is_asked(row_id: str, texts: list[str]) -> None:
    name = asked_as(row_id, texts)
    assert name == asked_as(row_id, list(texts))
    assert name != asked_as(row_id, [*texts, ""])
    assert name.startswith(f"{row_id} ")
