"""The order of the rows and the store of the images."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay_kit import png

from caprl_async.data.images import BadImage, ImageStore
from caprl_async.data.rows import DataError, Dataset, Row
from caprl_async.data.sampler import PromptSampler


def dataset(n: int) -> Dataset:
    return Dataset(Path("d"), tuple(Row(str(i), b"", "", ()) for i in range(n)))


@given(st.integers(1, 20), st.integers(0, 3), st.integers(0, 70))
def test_every_epoch_has_every_row_once_and_any_point_can_be_resumed(n: int, seed: int, start: int) -> None:
    sampler = PromptSampler(dataset(n), seed, shuffle=True)
    order = [sampler.next() for _ in range(4 * n)]
    assert [index for index, _ in order] == list(range(4 * n))
    for epoch in range(4):
        rows = [row.row_id for _, row in order[epoch * n : (epoch + 1) * n]]
        assert sorted(rows, key=int) == [str(i) for i in range(n)]
    resumed = PromptSampler(dataset(n), seed, shuffle=True)
    resumed.cursor = start % (4 * n)
    assert resumed.next() == order[start % (4 * n)]


def test_seed_and_epoch_change_the_order() -> None:
    one, other = (PromptSampler(dataset(50), seed, shuffle=True) for seed in (0, 1))
    first = [one.row_at(i).row_id for i in range(50)]
    assert first != [other.row_at(i).row_id for i in range(50)]
    assert first != [one.row_at(50 + i).row_id for i in range(50)]
    plain = PromptSampler(dataset(5), 0, shuffle=False)
    assert [plain.row_at(i).row_id for i in range(7)] == ["0", "1", "2", "3", "4", "0", "1"]


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError):
        PromptSampler(dataset(0), 0, shuffle=True).next()


def test_images_are_kept_once_by_content(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    (tmp_path / "i.png").write_bytes(png(3))
    first, second = store.put(png(3)), store.put(tmp_path / "i.png")
    assert first == second
    assert Path(first.path).read_bytes() == png(3)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) == 1


@pytest.mark.parametrize("data", [b"", b"no image", png(1)[:40]])
def test_what_cannot_be_decoded_is_refused(tmp_path: Path, data: bytes) -> None:
    store = ImageStore(tmp_path)
    with pytest.raises(BadImage):
        store.put(data)
    with pytest.raises(BadImage, match=r"none\.png"):
        store.put(tmp_path / "none.png")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
