"""Rows through a model that writes: the one stage that jobs put between their sources and their outputs.

Ray Data makes the actors, feeds them and starts them again. A batch's asks go to the model together and
several batches are under way at one time, so that the engine is never short of work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeAlias

import pyarrow as pa

from caprl_async.conf import ConfError
from caprl_async.config import WriterConfig
from caprl_async.data.rows import DataError
from caprl_async.engine.types import EngineDied
from caprl_async.judge.verdicts import JudgeConfigError
from caprl_async.ring.errors import RingFailed
from caprl_async.writer.types import Ask, Text, Unwritten, WriterError, Written
from caprl_async.writer.writer import Writer, load_writer

_AT_ONCE = 4  # batches of an actor
_RESTARTS = 10  # of an actor; one that dies at every batch ends the job

log = logging.getLogger(__name__)

Row: TypeAlias = dict[str, Any]


class Work(Protocol):
    """What a job does with a row; sent to the actors. A ValueError or OSError is the row's problem."""

    def asks(self, row: Row) -> Sequence[Ask]:
        """What the row asks."""

    def take(self, row: Row, answers: Sequence[tuple[Text, ...]]) -> Row:
        """What the answers to each of its asks add to the row."""


class ModelAway(RuntimeError):
    """A model answers nothing any more; what is done is kept, and the job can go on later."""


class WriterStage:
    """Asks one model about every row. A row that cannot be answered keeps the reason in `problem`."""

    def __init__(self, config: WriterConfig, key: str, seed: int, what: Work, out: pa.Schema) -> None:
        self._writer: Writer = load_writer(config, key, seed)
        self._key = key
        self._what = what
        self._out = out
        self._refused = 0  # rows in a row that were refused by a fault that is not theirs
        self._patience = config.refusals

    async def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Row] = batch.to_pylist()
        made = await asyncio.to_thread(lambda: [self._made(row) for row in rows])
        flat = [ask for asks in made for ask in asks]
        try:
            answers = iter(await self._writer.write(flat))
        except EngineDied as error:
            end_process(self._key, error)
        for row, asks in zip(rows, made, strict=True):
            self._answered(row, [next(answers) for _ in asks])
        return pa.Table.from_pylist(rows, schema=self._out)

    def _made(self, row: Row) -> Sequence[Ask]:
        if row["problem"]:
            return ()
        try:
            return self._what.asks(row)
        except (ValueError, OSError) as error:
            row["problem"] = f"{type(error).__name__}: {error}"
            return ()

    def _answered(self, row: Row, answers: Sequence[Written]) -> None:
        """
        Raises:
            ModelAway: so many rows one after the other have no answer, by no fault of theirs.
        """
        if row["problem"]:
            return
        failures = [answer for answer in answers if isinstance(answer, Unwritten)]
        self._refused = self._refused + 1 if failures and all(one.again for one in failures) else 0
        if self._refused > self._patience:
            raise ModelAway(
                f"{self._key} has not answered {self._refused} rows in a row: {failures[0].reason}"
            )
        if failures:
            row["problem"] = failures[0].reason
            return
        try:
            row.update(
                self._what.take(row, [answer for answer in answers if not isinstance(answer, Unwritten)])
            )
        except (ValueError, OSError) as error:
            row["problem"] = f"{type(error).__name__}: {error}"


def end_process(key: str, error: EngineDied) -> NoReturn:
    """Ends an actor whose engine died: Ray starts a fresh one, which takes the batch again."""
    log.critical("%s: the engine died: %s", key, error)
    logging.shutdown()
    os._exit(1)


@contextmanager
def explained() -> Iterator[None]:
    """What ends a job whose rows go through stages, in one line.

    Raises:
        ConfError: the source cannot be read.
        RingFailed: a model could not be started or answers no more, or Ray could not go on.
    """
    from ray.exceptions import RayError

    try:
        yield
    except DataError as error:
        raise ConfError(str(error)) from error
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        said = str(cause).partition("\n")[0]  # what follows are Ray's hints
        if isinstance(cause, DataError | WriterError | JudgeConfigError):
            raise ConfError(said) from error
        raise RingFailed(f"{said}; what is done is kept: go on with resume=true") from error


def asking(config: WriterConfig, key: str, seed: int, what: Work, out: pa.Schema) -> Callable[[Any], Any]:
    """Makes of a ray.data.Dataset the one behind a `WriterStage`, with the columns of `out`."""
    made = (config, key, seed, what, out)
    return lambda rows: on_actors(
        rows, WriterStage, made, config.batch_rows, config.num_actors, config.gpus_per_actor
    )


def on_actors(
    rows: Any, stage: type, made: tuple[Any, ...], batch_rows: int, actors: int, gpus: float
) -> Any:
    """The rows through a stage that is made with `made` in each of its actors.

    A block is a batch: what a task has made comes out when its block is through, and four are under way in an
    actor at one time.
    """
    from ray.data import ActorPoolStrategy

    pool = ActorPoolStrategy(
        size=actors, max_tasks_in_flight_per_actor=2 * _AT_ONCE, max_concurrent_calls_per_actor=_AT_ONCE
    )
    with warnings.catch_warnings():
        # Ray Data restarts without end unless told otherwise, and has no named parameter to tell it.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return rows.repartition(target_num_rows_per_block=batch_rows).map_batches(
            stage,
            fn_constructor_args=made,
            batch_size=batch_rows,
            batch_format="pyarrow",
            compute=pool,
            num_cpus=0.1,
            num_gpus=gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
