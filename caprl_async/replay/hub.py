"""The hub of the ring: one event loop that owns every prompt, leases work to peers and cuts batches.

`ReplayQueue` is made a Ray actor by the supervisor. Its methods are the control plane (small, plain values);
prompts, captions, verdicts and batches come and go over the socket alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from caprl_async.config import Config
from caprl_async.data.images import BadImage, ImageStore, image_folder
from caprl_async.data.load import load_rows
from caprl_async.data.rows import REJECTS, Dataset, Reject, Row, append_rejects
from caprl_async.data.sampler import PromptSampler
from caprl_async.data.video import FrameLimits, check_videos, keep_row
from caprl_async.judge.panel import FIRST, panel
from caprl_async.process import call_me, whereabouts
from caprl_async.replay.dispatch import Dispatch
from caprl_async.replay.eval_spec import EvalResult, EvalSpec
from caprl_async.replay.events import LedgerError, epoch_bases
from caprl_async.replay.examiner import Examiner
from caprl_async.replay.flow import Cut, Prepared, TrainFlow
from caprl_async.replay.ledger import Ledger
from caprl_async.replay.samples import append_samples, record_batch
from caprl_async.replay.saved import Saved, read_saved, recover, restore, save, write_note
from caprl_async.replay.status import Rates, status
from caprl_async.replay.transport import HubAddress, HubKeys, HubSocket, encode
from caprl_async.types import BatchReply, BatchRequest, PeerMessage, Role, Version

_TICK_S = 0.02  # commits, acknowledgements, time-outs
_PREPARED_AT_ONCE = 4  # rows: the frames of a video take a second or more
_PROBE = "probe"
_SHOWN = 1000  # characters of an error, which may come from a peer


class HubAsleep(RuntimeError):
    """The hub has been started again after its death and waits for `start`; ask again."""


class HubFailed(RuntimeError):
    """The hub's own machinery has stopped; nothing will move any more."""


class ReplayQueue:
    """See the module; one instance per ring.

    Raises:
        DataError: the training data cannot be used.
        LedgerError: the ledger in `run_dir` cannot be read.
    """

    def __init__(self, config: Config, run_dir: str) -> None:
        self._config = config
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._abstain = config.judge.prompt.abstain
        # A ring that learns from other data only evaluates.
        self._train = load_rows(config.data.train, self._abstain) if config.data.train else Dataset(Path())
        check_videos(self._train, config)
        self._rejects = self._run_dir / REJECTS
        self._rejecting = threading.Lock()
        self._train.write_rejects(self._rejects)
        self._sampler = PromptSampler(self._train, config.seed, config.data.shuffle)
        self._images = ImageStore(image_folder(config, self._run_dir))
        self._ledger = Ledger(self._run_dir / "ledger.sqlite")
        self._inherited = self._ledger.position > 0
        self._errors: deque[dict[str, Any]] = deque(maxlen=20)
        self._error_counts: Counter[str] = Counter()
        self._flow = TrainFlow(config, self._ledger, self._on_error)
        self._flow.cut_listener = self._on_cut
        first_lease = self._ledger.count_up("hubs") << 32
        self._dispatch = Dispatch(config.replay, self._on_error, first_lease, panel(config.judge))
        self._socket = HubSocket()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None
        self._learners: dict[bytes, Version] = {}  # who waits for which batch
        self._rates = Rates()
        self._reading: tuple[Version, asyncio.Task[dict[str, float]]] | None = None  # of the last cut
        self._examiner = Examiner(
            config,
            self._run_dir,
            put=self._put,
            pump=self._pump,
            check=self._check,
            revoke=self._dispatch.revoke,
            on_error=self._on_error,
        )

    def __repr__(self) -> str:
        return "replay-queue"

    # ------------------------------------------------------------ life

    async def start(
        self, keys: HubKeys, bind_host: str = "127.0.0.1", port: int = 0, again: bool = False
    ) -> HubAddress:
        """Begins to listen; "auto" binds this node's address. The result is secret.

        Args:
            again: this hub takes the place of one of the same run that died, and goes on where that was.
        """
        if again:
            await self._go_on()
        address = self._socket.start(bind_host, keys, port)
        call_me("replay-queue")
        for loop in (self._receive(), self._tick(), *([self._prepare()] if len(self._train) else [])):
            task = asyncio.create_task(self._guard(loop))
            self._tasks.append(task)
        return address

    async def _go_on(self) -> None:
        self._inherited = False
        live = self._ledger.lives.live
        rows = [(index, self._sampler.row_at(index)) for index in live]
        again = await asyncio.to_thread(lambda: [self._put(self._train, index, row) for index, row in rows])
        self._dispatch.inherit(recover(self._flow, again), time.time())
        if (probe := self._ledger.read_note(_PROBE)) is not None:
            self._examiner.restore(probe)

    async def health(self) -> dict[str, Any]:
        """A sign of life; a hub that has not been started after its death has `started` false."""
        return {"name": "replay-queue", "started": bool(self._tasks), **whereabouts()}

    async def stop(self) -> None:
        """Closes the socket and the ledger; may be called twice."""
        self._tasks += self._examiner.stop_probe()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
            self._tasks = []
            self._ledger.close()
        self._socket.close()

    async def open_admission(self) -> None:
        """Lets prompts flow. A resumed run without a checkpoint begins at the beginning.

        Raises:
            LedgerError: `run_dir` holds another run, which was neither restored nor is to be resumed.
        """
        self._check()
        if self._inherited and not self._config.resume:
            raise LedgerError(
                f"{self._ledger.path} holds another run; go on with it by resume=true or take another run_dir"
            )
        if self._inherited:
            self._ledger.roll_back(0, self._flow.version)
            self._inherited = False
        self._flow.is_open = True
        await self._pump()

    async def dismiss(self, name: str) -> None:
        """A rollout or judge has left for good, and its process is gone: others get its work at once."""
        self._check()
        self._dispatch.dismiss(name, time.time())
        await self._pump()

    async def pause_admission(self) -> None:
        """No prompt is leased to rollouts any more; what is under way goes on."""
        self._check()
        self._flow.is_open = False

    async def finish(self) -> None:
        """Training is over: whoever asks for a batch hears so, and what is under way is let go."""
        self._check()
        self._flow.finished = True
        self._dispatch.revoke(lambda work: work.owner is self._flow)
        await self._pump()

    async def _guard(self, loop: Coroutine[Any, Any, None]) -> None:
        try:
            await loop
        except Exception as error:
            if self._failure is None:
                self._failure = error
            self._examiner.give_up()

    def _check(self) -> None:
        if not self._tasks:
            raise HubAsleep("the replay queue has not been started yet")
        if self._failure is not None:
            raise HubFailed(f"the replay queue has stopped: {self._failure!r}") from self._failure

    # ------------------------------------------------------------ loops

    async def _receive(self) -> None:
        while True:
            identity, message = await self._socket.receive()
            self._take(identity, message)
            await self._pump()

    def _take(self, identity: bytes, message: PeerMessage) -> None:
        now = time.time()
        if not isinstance(message, BatchRequest):
            self._dispatch.take(identity, message, now)
            return
        peer = self._dispatch.leases.heard(identity, now)
        if peer is None or peer.hello.role is not Role.LEARNER:
            self._dispatch.unexpected += 1  # its next Hello is under way, or it has lost its way
            return
        try:
            self._flow.advance(message.version)
        except LedgerError as error:
            self._on_error("learner", str(error))
            return
        self._learners[identity] = message.version

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._commit()
            acks, self._dispatch.acks = self._dispatch.acks, []
            for identity, data in acks:
                await self._socket.send(identity, data)
            now = time.time()
            self._dispatch.expire(self._waiting_judges(), self._needed_judges(), now)
            self._rates.tick(now, self._flow.captions_sampled)
            await self._pump()

    def _commit(self) -> None:
        if self._ledger.dirty:
            write_note(self._flow)
            self._ledger.commit()

    def _waiting_judges(self) -> set[str]:
        return self._flow.waiting_judges().union(*(run.waiting_judges() for run in self._examiner.runs))

    def _needed_judges(self) -> set[str]:
        """Without a held-out judge the run goes on, unless an evaluation that someone awaits needs it."""
        return set(panel(self._config.judge)).union(*(run.waiting_judges() for run in self._examiner.awaited))

    async def _prepare(self) -> None:
        """Puts the images of the next prompts into the store, some at a time, ahead of their admission."""
        while True:
            if not self._flow.wants_prepared:
                await asyncio.sleep(_TICK_S)
                continue
            first = self._flow.next_wanted
            rows = [(index, self._sampler.row_at(index)) for index in range(first, first + _PREPARED_AT_ONCE)]
            puts = (asyncio.to_thread(self._put, self._train, index, row) for index, row in rows)
            for prepared in await asyncio.gather(*puts):
                self._flow.offer(prepared)
            await self._pump()

    def _put(self, data: Dataset, index: int, row: Row) -> Prepared:
        try:
            return Prepared(index, row, keep_row(self._images, row, FrameLimits.of(self._config)))
        except BadImage as error:
            with self._rejecting:
                append_rejects(self._rejects, data.path, [Reject(row.row_id, None, "bad_image", str(error))])
            return Prepared(index, row, None, str(error))

    async def _pump(self) -> None:
        """Hands out work, answers learners, ends evaluations; called whenever something has changed."""
        now = time.time()
        runs = self._examiner.runs
        self._dispatch.hand_out([(run, run.waiting) for run in runs], self._flow, now)
        outbox = self._dispatch.outbox
        while outbox:
            await self._socket.send(*outbox.popleft())
        for identity in list(self._learners):
            # Sending lets other tasks in, which may have answered in the meantime.
            version = self._learners.get(identity)
            data = self._batch_reply(version, now) if version is not None else None
            if data is not None:
                del self._learners[identity]
                self._commit()  # a learner must never have a batch that a restarted hub does not know
                await self._socket.send(identity, data)
        self._examiner.tell()

    def _batch_reply(self, version: Version, now: float) -> bytes | None:
        if self._flow.finished:
            return encode(BatchReply(batch=None))
        cut = self._flow.cut(version, now)
        return cut.reply if cut is not None else None

    def _on_cut(self, cut: Cut) -> None:
        try:
            append_samples(self._run_dir / "samples.jsonl", cut, self._config.observe.samples_per_step)
        except OSError as error:  # they are for people to read: training does not need them
            self._on_error("samples.jsonl", str(error))
        if self._config.observe.record_batches:
            record_batch(self._run_dir / "batches", cut)
        # While the learner trains: it would wait for its end otherwise.
        self._reading = (cut.batch.version, self._read(cut.batch.version))
        numbers = self._flow.measured(cut.batch.version).numbers
        # Of the judge that the probe asks too: others of `judge.also` may be more generous.
        asked = f"accuracy_{FIRST}" if self._config.judge.also else "accuracy_all_mean"
        if asked in numbers:
            self._examiner.trained_on(numbers[asked])
        self._ledger.write_note(_PROBE, self._examiner.state())
        self._examiner.probe(self._guard)

    def _on_error(self, source: str, text: str) -> None:
        self._errors.append({"time": time.time(), "source": source, "error": text[:_SHOWN]})
        self._error_counts[source.partition("/")[0]] += 1

    # ------------------------------------------------------------ training

    async def trained(
        self,
        version: Version,
        started: float,
        finished: float,
        advantages: Sequence[Sequence[float]] = (),
    ) -> None:
        """The learner has reached `version`, in a step between these times; harmless a second time.

        Args:
            advantages: [group][caption] of the batch.
        """
        self._check()
        self._flow.advance(version, advantages)
        self._ledger.record_step(version, started, finished)
        await self._pump()

    async def step_metrics(self, version: Version) -> dict[str, float]:
        """Measures of the batch cut at `version` (see replay/metrics.py), flat.

        Without those of its captions if the hub has been restarted since.
        """
        self._check()
        cut, reading = self._reading or (None, None)
        if cut != version and self._flow.has_measured(version):
            reading = self._read(version)
        return {
            **(await reading if reading is not None else {}),
            **self._examiner.metrics(),
            "captions_sampled": float(self._flow.captions_sampled),
            "captions_trained": float(self._flow.captions_trained),
        }

    def _read(self, version: Version) -> asyncio.Task[dict[str, float]]:
        return asyncio.create_task(asyncio.to_thread(self._flow.measured(version).metrics))

    async def status(self) -> dict[str, Any]:
        """What happens now, in plain values; `metrics` are flat numbers for a chart."""
        self._check()
        return {
            **status(self._flow, self._dispatch, self._ledger, self._rates, self._socket),
            "evaluations": {run.spec.name: run.waiting for run in self._examiner.runs},
            "errors": list(self._errors),
            "error_counts": dict(self._error_counts),
            "rejects": self._train.reject_counts,
        }

    async def audit(self) -> dict[str, Any]:
        """Reads the ledger afresh; see `events.audit_rows`."""
        self._check()
        self._commit()
        return self._ledger.audit(self._config.replay.max_staleness)

    async def save(self, folder: str) -> None:
        """Writes what a checkpoint keeps of the queue; call it between two learner steps.

        Raises:
            OSError: it could not be written.
        """
        self._check()
        write_note(self._flow)
        saved = replace(save(self._flow), probe=self._examiner.state())
        await asyncio.to_thread(saved.write, Path(folder))

    async def next_epoch(self) -> int:
        """The number of the epoch that a rollback would begin."""
        self._check()
        return 1 + max([0, *(epoch for epoch in epoch_bases(self._ledger.rows()))])

    async def trim(self, oldest: str) -> None:
        """Keeps the ledger within `replay.ledger_mb`; `oldest` is the oldest checkpoint kept."""
        self._check()
        if self._ledger.megabytes() > self._config.replay.ledger_mb:
            saved = await asyncio.to_thread(read_saved, Path(oldest))
            if saved.ledger == self._ledger.identity:
                self._commit()  # with the note that belongs to the rows
                self._ledger.fold(saved.position)

    async def restore(self, folder: str | None, version: Version) -> None:
        """Goes back to what `save` wrote, or to the start; `version` begins a new epoch.

        Raises:
            LedgerError: the checkpoint is damaged, or the ledger in run_dir does not hold what it says.
        """
        self._check()
        saved = read_saved(Path(folder)) if folder else Saved(ledger=self._ledger.identity)
        self._dispatch.revoke(lambda work: work.owner is self._flow)
        self._learners.clear()
        rows = [(index, self._sampler.row_at(index)) for index in saved.outstanding]
        again = await asyncio.to_thread(lambda: [self._put(self._train, index, row) for index, row in rows])
        # What has been handed out meanwhile is of the line that ends here; nothing may come in between.
        self._dispatch.revoke(lambda work: work.owner is self._flow)
        restore(self._flow, saved, version, again)
        self._examiner.stop_probe()  # of weights that are rolled back
        if saved.probe is not None:
            self._examiner.restore(saved.probe)
        self._reading = None
        self._rates = Rates()
        self._inherited = False
        self._commit()
        await self._pump()

    # ------------------------------------------------------------ evaluation

    async def evaluate(self, spec: EvalSpec) -> EvalResult:
        """Measures captions of held-out images; writes run_dir/evals/<name>.jsonl. Training goes on.

        Raises:
            EvalError: it cannot be done as asked.
            DataError: a file of questions cannot be used.
        """
        self._check()
        return await self._examiner.evaluate(spec)

    async def references(self) -> int:
        """How many held-out rows come with a reference caption."""
        self._check()
        return await self._examiner.references()
