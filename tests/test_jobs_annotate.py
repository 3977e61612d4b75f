"""The job that captions a data set, as a user meets it: sources, broken images, deaths, bad confs."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint_kit import FakeServer, Tokens, says, serving
from engine_kit import noise_image
from process_kit import left_running

from caprl_async import processes
from caprl_async.ring.errors import RingFailed
from caprl_async.run import main
from caprl_async.stream import stage
from caprl_async.stream.sources import open_images, table_of

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "caprl_async.run", "conf=conf/annotate_demo.yaml"]


def echo(prompt: str) -> Tokens:
    return {" a picture": 1.0}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(echo) as fake:
        yield fake


def captions(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("captions/captions-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)


# ---------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from caprl_async.config import RingConfig
    from caprl_async.ring import cluster
    from caprl_async.stream import hush

    cluster.connect(RingConfig(), log_level="ERROR")
    hush("ERROR")
    yield
    cluster.disconnect()


def pictures(folder: Path, n: int) -> list[Path]:
    folder.mkdir()
    return [Path(noise_image(folder, 56, 56, seed=seed).path) for seed in range(n)]


def as_folder(folder: Path, files: list[Path]) -> str:
    (folder / "deep").mkdir()
    for file in files[1:]:
        shutil.copy(file, folder / "deep" / file.name)
    shutil.copy(files[0], folder / files[0].name)
    (folder / "notes.txt").write_text("no image")
    return str(folder)


def as_parquet(folder: Path, files: list[Path]) -> str:
    rows = [{"id": file.stem, "image": {"bytes": file.read_bytes(), "path": None}} for file in files]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    return str(folder)


def as_tar(folder: Path, files: list[Path]) -> str:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, file in enumerate(files):
            for name, data in ((f"{number}.png", file.read_bytes()), (f"{number}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder / "a.tar")


def as_arrow(folder: Path, files: list[Path]) -> str:
    rows = [{"image": {"bytes": file.read_bytes(), "path": file.name}} for file in files]
    table = pa.Table.from_pylist(rows)
    file = str(folder / "data-00000-of-00001.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("make", [as_folder, as_parquet, as_tar, as_arrow])
def test_sources_give_every_image_once(make: Any, tmp_path: Path, local_ray: None) -> None:
    files = pictures(tmp_path / "made", 5)
    folder = tmp_path / "source"
    folder.mkdir()
    found = open_images(make(folder, files))
    rows = found.rows.take_all()
    assert found.total in (None, 5)
    assert len({row["id"] for row in rows}) == 5
    data = [row["data"] if row["data"] is not None else Path(row["path"]).read_bytes() for row in rows]
    assert sorted(data) == sorted(file.read_bytes() for file in files)
    assert not any(row["problem"] for row in rows)


@pytest.mark.slow
def test_a_file_whose_name_is_no_text_costs_itself_alone(tmp_path: Path, local_ray: None) -> None:
    good, bad = pictures(tmp_path / "made", 2)
    bad.rename(os.fsdecode(os.fsencode(bad.parent) + b"/caf\xe9.png"))
    rows = {row["id"]: row for row in open_images(str(good.parent)).rows.take_all()}
    assert rows[good.name]["problem"] is None
    assert rows[r"caf\xe9.png"]["problem"] == "its name is not UTF-8: rename the file"
    assert len(rows) == 2


# ---------------------------------------------------------------- the job


class Dying:
    """A stage whose engine dies at every batch."""

    async def __call__(self, batch: pa.Table) -> pa.Table:
        os._exit(1)


@pytest.mark.slow
def test_an_actor_that_always_dies_ends_the_job(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_RESTARTS", 1)
    rows = table_of([{"id": str(number)} for number in range(8)])
    with pytest.raises(RingFailed, match=r"died.*resume=true"), stage.explained():
        list(stage.on_actors(rows, Dying, (), 4, 1, 0.0).iter_batches(batch_size=None))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_broken_images_cost_only_themselves_and_a_resume_makes_the_rest(tmp_path: Path) -> None:
    source = tmp_path / "images"
    files = pictures(source, 6)
    files[0].write_bytes(b"no image")
    files[1].write_bytes(files[1].read_bytes()[:100])
    folder = tmp_path / "run"
    few = [f"data.images={source}", f"run_dir={folder}", "annotate.captions=2", "annotate.rows_per_file=3"]
    first = job(*few)
    assert first.returncode == 3, first.stderr
    assert first.stderr.splitlines()[-1].startswith("4 images captioned, 2 failed")
    made = captions(folder)
    assert {row["id"] for row in made} == {file.name for file in files[2:]}
    assert all(len(row["captions"]) == 2 and all(row["captions"]) for row in made)
    lost = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert {row["id"] for row in lost} == {file.name for file in files[:2]}

    refused = job(*few)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr

    noise_image(source, 56, 56, seed=0)
    noise_image(source, 56, 56, seed=1)
    again = job(*few, "resume=true")
    assert again.returncode == 0, again.stderr
    rows = captions(folder)
    assert sorted(row["id"] for row in rows) == sorted(file.name for file in files)
    assert [row for row in rows if row["id"] in {one["id"] for one in made}] == made
    assert (folder / "failures.jsonl").read_text() == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_resumed_each_image_is_in_the_output_once(tmp_path: Path, server: FakeServer) -> None:
    source = tmp_path / "images"
    files = pictures(source, 40)
    folder = tmp_path / "run"
    served = [
        f"captioner.endpoint.url={server.url}",
        "captioner.max_tokens=1",
        "captioner.endpoint.max_in_flight=1",
    ]
    few = [
        f"data.images={source}",
        f"run_dir={folder}",
        "annotate.rows_per_file=4",
        "captioner.batch_rows=4",
        *served,
    ]
    server.delay_s = 0.2
    before = processes.descendants()
    run = subprocess.Popen([*COMMAND, *few], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not captions(folder):
            assert run.poll() is None, run.stderr and run.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(run.pid, signal.SIGINT)
        _, error = run.communicate(timeout=90)
    finally:
        run.kill()
    assert run.returncode == 130, error
    assert left_running(before, patience_s=10.0) == []
    some = len(captions(folder))
    assert 0 < some < 40

    server.always = says(503, "gone")
    away = job(*few, "resume=true", "captioner.refusals=3", "captioner.endpoint.retries=0")
    assert away.returncode == 1
    assert "has not answered" in away.stderr
    assert "resume=true" in away.stderr
    assert "Traceback" not in away.stderr

    server.always, server.delay_s = None, 0.0
    again = job(*few, "resume=true")
    assert again.returncode == 0, again.stderr
    assert sorted(row["id"] for row in captions(folder)) == sorted(file.name for file in files)


# ---------------------------------------------------------------- conf


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data.images="], "data.images"),
        (["data.images=/nowhere"], "/nowhere"),
        (["captioner.model="], "captioner.model"),
        (["captioner.model=pkg:tiny/models/judge"], "vision_config"),
        (["captioner.batch_rows=0"], "captioner.batch_rows"),
        (["annotate.captions=0"], "annotate.captions"),
    ],
)
def test_a_wrong_conf_is_one_clear_error(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["conf=conf/annotate_demo.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_a_source_that_holds_no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(Exception, match="holds no image"):
        open_images(str(tmp_path))
    pq.write_table(pa.table({"id": ["1"], "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(Exception, match="no column image"):
        open_images(str(tmp_path))
