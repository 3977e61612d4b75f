"""Ten thousand broken rows among good ones, in every form: the good survive, each bad one is counted."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bad_rows_kit import (
    ABSTAIN,
    IMAGES,
    bad_openrlhf,
    bad_questions,
    bad_record,
    broken_line,
    good_record,
    openrlhf_record,
    question,
)
from replay_kit import png, write_data

from caprl_async.data.load import load_rows
from caprl_async.data.rows import MAX_ID, MAX_TEXT, DataError, Dataset
from caprl_async.replay.transport import encode

BAD_ROWS = 2600  # of each form


def check(data: Dataset, good: list[str], bad: dict[str, str], folder: Path, path: Path) -> None:
    """Exactly the good rows are there, every bad one (place -> id) is rejected and says why."""
    used = [row for row in data if row.row_id not in set(good)]
    assert not used, f"{path}: {len(used)} bad rows are used, as {used[0]!r:.500}"
    assert [row.row_id for row in data] == good
    named = {reject.row_id for reject in data.rejects}
    lost = [place for place, name in bad.items() if not {place, name} & named]
    assert not lost, f"{path}: neither used nor rejected: {lost[:5]}"
    assert not named & set(good)
    for reject in data.rejects:
        assert reject.reason
        assert reject.column or reject.reason == "malformed_json", reject
        assert len(reject.row_id) <= MAX_ID
        assert len(reject.detail) <= 300
    for row in data:
        assert encode((row.row_id, row.prompt, row.questions, row.reference_caption, row.facts))
    kept = folder / "rejects.jsonl"
    for _ in range(2):
        data.write_rejects(kept)
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").split("\n")[:-1]]
    assert {line["row_id"] for line in lines if line["file"] == str(path)} == named
    assert len({json.dumps(line) for line in lines}) == len(lines)


@pytest.mark.parametrize("form", ["verl", "openrlhf"])
def test_broken_lines_among_good_ones(form: str, tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(1))
    whole, broken = (good_record, bad_record) if form == "verl" else (openrlhf_record, bad_openrlhf)
    for seed in range(2):
        chance = random.Random(f"{form}/{seed}")
        lines: list[bytes] = []
        good: list[str] = []
        bad: dict[str, str] = {}
        while len(bad) < BAD_ROWS // 2 + 100:
            name, place = f"row-{len(lines)}", f"d{seed}:{len(lines) + 1}"
            if chance.random() < 0.1:
                good.append(name)
                lines.append(json.dumps(whole(name)).encode() + b"\r" * chance.randrange(2))
                continue
            bad[place] = name
            if chance.random() < 0.3:
                lines.append(broken_line(json.dumps(whole(name)).encode(), chance))
            else:
                lines.append(json.dumps(broken(name, chance)).encode())
        path = tmp_path / f"d{seed}.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" * seed + b"\n".join(lines))  # one file with, one without a BOM
        check(load_rows(path, ABSTAIN), good, bad, tmp_path, path)


ENTRY = pa.struct(
    {"question": pa.string(), "choices": pa.list_(pa.string()), "answer": pa.string(), "weight": pa.float64()}
)
TYPED = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "reward_model": pa.struct({"ground_truth": pa.list_(ENTRY)}),
        "facts": pa.string(),
    }
)
TEXTS = pa.schema(
    {**{f.name: f.type for f in TYPED}, "reward_model": pa.struct({"ground_truth": pa.string()})}
)


def _fits(value: Any, wanted: pa.Field, good: Any) -> bool:
    """Whether a column with good values can hold this one too."""
    try:
        pa.array([good, value], wanted.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _parquet_rows(schema: pa.Schema, chance: random.Random) -> Iterator[tuple[dict[str, Any], bool]]:
    """(row, whether it is good); whatever of the broken values its types can hold."""
    texts = schema is TEXTS
    while True:
        name = f"row-{chance.randrange(10**12)}"
        truth: Any = [question()]
        good = {
            "id": name,
            "image": {"bytes": png(1), "path": None},
            "reward_model": {"ground_truth": json.dumps(truth) if texts else truth},
        }
        row = dict(good)
        if chance.random() < 0.1:
            yield row, True
            continue
        match chance.randrange(6):
            case 0:
                row["id"] = chance.choice([None, "", "x" * (MAX_ID + 1)])
            case 1:
                row["image"] = chance.choice([v for v in IMAGES if v is None or isinstance(v, dict)])
            case 2:
                row["reward_model"] = chance.choice([None, {}, {"ground_truth": None}])
            case 3:
                row["facts"] = "x" * (MAX_TEXT + 1)
            case _:
                truth = bad_questions(chance)
                if '"weight": true' in json.dumps(truth) and not texts:
                    continue  # a column of numbers makes it 1
                if texts and not isinstance(truth, str):
                    truth = json.dumps(truth)
                row["reward_model"] = {"ground_truth": truth}
        if all(_fits(row.get(field.name), field, good.get(field.name)) for field in schema):
            yield row, False


@pytest.mark.parametrize("schema", [TYPED, TEXTS], ids=["typed", "texts"])
def test_broken_parquet_rows_among_good_ones(schema: pa.Schema, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    good: list[str] = []
    bad: dict[str, str] = {}
    for row, is_good in _parquet_rows(schema, random.Random(schema is TEXTS)):
        rows.append(row)
        if is_good:
            good.append(row["id"])
        else:
            bad[f"d:{len(rows)}"] = row["id"]
        if len(bad) == BAD_ROWS:
            break
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=700)
    check(load_rows(path, ABSTAIN), good, bad, tmp_path, path)


def test_values_that_python_cannot_hold_cost_their_row_alone(tmp_path: Path) -> None:
    anything = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    for column, empty in (("id", "missing_id"), ("prompt", ""), ("facts", ""), ("reference_caption", "")):
        names = [f"{column}-{i}".encode() for i in range(300)]
        values = [b"\xff" + name if i % 3 == 0 else name for i, name in enumerate(names)]
        table = pq.read_table(write_data(tmp_path / "d.parquet", 300, id=[name.decode() for name in names]))
        at = table.schema.get_field_index(column)
        table = table.set_column(at, column, pc.cast(pa.array(values), options=anything))
        pq.write_table(table, tmp_path / "d.parquet")
        data = load_rows(tmp_path / "d.parquet", ABSTAIN)
        assert [row.row_id for row in data] == [f"{column}-{i}" for i in range(300) if i % 3]
        assert data.reject_counts == {"unreadable": 100}, empty
        assert {reject.column for reject in data.rejects} == {column}


def loaded(path: Path, case: str) -> tuple[Dataset | None, str]:
    """The rows, or the DataError, which names the file."""
    try:
        return load_rows(path, ABSTAIN), ""
    except DataError as error:
        text = str(error)
    except BaseException as error:
        pytest.fail(f"{case}: {type(error).__name__}: {error}")
    assert str(path) in text, case
    return None, text


def test_columns_of_wrong_types(tmp_path: Path) -> None:
    """Every row of such a file is used or rejected."""
    path = tmp_path / "d.parquet"
    columns = [pa.array([value] * 3) for value in (1, 0, 1.5, True, b"x", [1], [[]], {"a": 1}, None, "x")]
    columns += [
        pa.array([2**62] * 3, unit) for unit in (pa.timestamp("us"), pa.time64("ns"), pa.duration("s"))
    ]
    columns += [pa.array(["x"] * 3).dictionary_encode(), pa.array([{"bytes": "x", "path": b"x"}] * 3)]
    for name in ("id", "image", "prompt", "reward_model", "reference_caption", "facts"):
        for column in columns:
            table = pq.read_table(write_data(path, 3))
            pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), path)
            data, refusal = loaded(path, f"{name} of {column.type}")
            if data is None:
                assert re.search(r"no usable row \(3 \w+\)", refusal), (name, column.type, refusal)
            else:
                assert len(data) + len([r for r in data.rejects if r.question is None]) == 3


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write_data(tmp_path / "whole.parquet", 60).read_bytes()
    path = tmp_path / "d.parquet"
    whole_again = 0
    for seed in range(300):
        chance = random.Random(seed)
        data = bytearray(whole)
        at = chance.randrange(len(data))
        match seed % 4:
            case 0:
                del data[at:]
            case 1:
                for _ in range(chance.randrange(1, 8)):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 2:
                data[at : at + 200] = bytes(len(data[at : at + 200]))
            case _:
                data = bytearray(chance.randbytes(at))
        path.write_bytes(data)
        whole_again += loaded(path, f"seed {seed}")[0] is not None
    assert whole_again < 100


def test_files_that_hold_no_rows_are_named(tmp_path: Path) -> None:
    contents = [
        b"",
        b"\n\n",
        b"\0" * 1000,
        b"{}",
        b"{}\n{}",
        b"[]",
        b"\xff\xfe",
        b"PAR1",
        b"PAR1" * 2,
        png(1),
    ]
    contents += [
        b"id,image\na,i.png\n" * 50,
        bytes(range(256)) * 40,
        b'{"id": 1}',
        b'{"\\ud800": 1}',
        b"{" * 99_999,
    ]
    for name in ("d.jsonl", "d.parquet"):
        path = tmp_path / name
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                load_rows(path, ABSTAIN)
        path.unlink()
        path.mkdir()
        with pytest.raises(DataError):
            load_rows(path, ABSTAIN)
