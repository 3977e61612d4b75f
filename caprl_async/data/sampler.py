"""The order in which the ring meets the rows; the head of the ring."""

from __future__ import annotations

import random

from caprl_async.data.rows import DataError, Dataset, Row


class PromptSampler:
    """Endless passes over a data set in an order that depends on (seed, epoch) alone.

    `cursor` is the index that `next` gives next; setting it is all that a resume needs.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool) -> None:
        self._dataset = dataset
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, list[int]] = {}
        self.cursor = 0

    def next(self) -> tuple[int, Row]:
        """The next index and its row."""
        index = self.cursor
        self.cursor += 1
        return index, self.row_at(index)

    def row_at(self, index: int) -> Row:
        """The row at any index, whatever the cursor.

        Raises:
            DataError: the data set is empty.
        """
        if not len(self._dataset):
            raise DataError(f"{self._dataset.path}: no usable row")
        epoch, position = divmod(index, len(self._dataset))
        return self._dataset.rows[self._order(epoch)[position]]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._dataset)))
            if self._shuffle:
                random.Random(f"{self._seed}/{epoch}").shuffle(order)
            if len(self._orders) > 2:  # work in flight spans two epochs at most, other than in tiny sets
                self._orders.clear()
            self._orders[epoch] = order
        return self._orders[epoch]
