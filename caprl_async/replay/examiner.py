"""The hub's measurements on held-out images: evaluations that someone awaits, a probe beside each batch."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from caprl_async.config import Config
from caprl_async.data.load import load_rows
from caprl_async.data.rows import REJECTS, Dataset, Row
from caprl_async.data.video import check_videos
from caprl_async.replay.eval_spec import EvalError, EvalResult, EvalSpec, heldout_spec
from caprl_async.replay.evaluation import EvalRun
from caprl_async.replay.lives import Prepared
from caprl_async.replay.probe import Probe
from caprl_async.replay.work import Work

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_PROBE = "probe "  # begins the names of probes, which no evaluation can have


class Examiner:
    """Runs beside training, in the hub's event loop; `runs` are what the hub hands out work of."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        put: Callable[[Dataset, int, Row], Prepared],
        pump: Callable[[], Awaitable[None]],
        check: Callable[[], None],
        revoke: Callable[[Callable[[Work], bool]], None],
        on_error: Callable[[str, str], None],
    ) -> None:
        """`put` places an image in the store, `pump` hands out work, `check` raises if the hub has failed."""
        self._config = config
        self._run_dir = run_dir
        self._put = put
        self._pump = pump
        self._check = check
        self._revoke = revoke
        self._on_error = on_error
        self._evals: dict[str, tuple[EvalRun, asyncio.Event]] = {}
        self._data: dict[str, Dataset] = {}
        self._probe = Probe(config.reward.absent, config.evaluate.probe_images)
        self._probes = 0  # begun
        self._probed: list[Row] | None = None  # the images that they take turns with
        self._probing: asyncio.Task[None] | None = None

    @property
    def runs(self) -> list[EvalRun]:
        return [run for run, _ in self._evals.values()]

    @property
    def awaited(self) -> list[EvalRun]:
        """Those that someone waits for."""
        return [run for run in self.runs if not run.spec.name.startswith(_PROBE)]

    def tell(self) -> None:
        """Ends those that are complete."""
        for run, done in self._evals.values():
            if run.done:
                done.set()

    def give_up(self) -> None:
        """The hub has failed: nobody need wait any longer."""
        for _, done in self._evals.values():
            done.set()

    async def evaluate(self, spec: EvalSpec) -> EvalResult:
        """See `ReplayQueue.evaluate`."""
        if not _NAME.fullmatch(spec.name):
            raise EvalError(f"evaluation name {spec.name!r} is no plain file name")
        data = await self._questions_of("judge")
        run = await self._measure(spec, data, _first_rows(data, spec))
        await asyncio.to_thread(run.write, self._run_dir / "evals" / f"{spec.name}.jsonl")
        return run.result()

    async def references(self) -> int:
        """How many held-out rows come with a reference caption."""
        rows = (await self._questions_of("judge")).rows
        return sum(row.reference_caption is not None for row in rows)

    async def _measure(self, spec: EvalSpec, data: Dataset, rows: Sequence[Row]) -> EvalRun:
        questions = {judge: await self._questions_of(judge) for judge in spec.judges}
        prepared = await asyncio.to_thread(lambda: [self._put(data, i, row) for i, row in enumerate(rows)])
        run, done = EvalRun(spec, self._config, prepared, questions, self._on_error), asyncio.Event()
        # Who lost a learner meanwhile asks again, and waits no more for what was asked before.
        if earlier := self._evals.get(spec.name):
            earlier[1].set()
        self._evals[spec.name] = (run, done)
        try:
            self._check()
            await self._pump()
            await done.wait()
            self._check()
            if not self._is_asked(run):
                raise EvalError(f"evaluation {spec.name!r} has been asked for again")
        finally:
            if self._is_asked(run):
                del self._evals[spec.name]
            self._revoke(lambda work: work.owner is run)
        return run

    def _is_asked(self, run: EvalRun) -> bool:
        return self._evals.get(run.spec.name, (None, None))[0] is run

    async def _questions_of(self, judge: str) -> Dataset:
        data, heldout = self._config.data, self._config.evaluate.heldout_judge
        if judge == "heldout" and not heldout.model:
            raise EvalError("there is no held-out judge: set evaluate.heldout_judge.model")
        if judge not in ("judge", "heldout"):
            raise EvalError(f"no judge is called {judge!r}; there are 'judge' and 'heldout'")
        path = heldout.data if judge == "heldout" and heldout.data else data.heldout
        if not path:
            raise EvalError("there are no held-out questions: set data.heldout")
        if path not in self._data:
            dataset = await asyncio.to_thread(load_rows, path, self._config.judge.prompt.abstain)
            check_videos(dataset, self._config)
            dataset.write_rejects(self._run_dir / REJECTS)
            self._data[path] = dataset
        return self._data[path]

    # ------------------------------------------------------------ the probe

    def probe(self, guard: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]]) -> None:
        """Begins the next probe, if there are to be any and none is under way."""
        wanted = self._config.data.heldout and self._config.evaluate.probe_images
        if wanted and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(guard(self._probe_once()))

    def stop_probe(self) -> list[asyncio.Task[None]]:
        """Ends the probe under way; returns its task, if there is one."""
        if self._probing is None:
            return []
        self._probing.cancel()
        return [self._probing]

    def trained_on(self, accuracy: float) -> None:
        """See `Probe.trained_on`."""
        self._probe.trained_on(accuracy)

    def metrics(self) -> dict[str, float]:
        """See `Probe.metrics`."""
        return self._probe.metrics()

    def state(self) -> dict[str, Any]:
        """Plain data to go on from."""
        return {"begun": self._probes, **self._probe.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a `state`."""
        self._probes = state["begun"]
        self._probe.restore(state)

    async def _probe_once(self) -> None:
        """Captions the next few held-out images with the weights of the moment and has every judge ask."""
        count = self._config.evaluate.probe_images
        spec = heldout_spec(self._config, f"{_PROBE}{self._probes}")
        seed = self._config.seed + count * self._probes  # new numbers for an image that comes again
        sampling = replace(spec.sampling, seed=seed, temperature=self._config.rollout.temperature)
        spec = replace(spec, sampling=sampling)
        data = await self._questions_of("judge")
        if self._probed is None:
            others = [await self._questions_of(judge) for judge in spec.judges]
            rows = _first_rows(data, spec)
            self._probed = [row for row in rows if all(other.get(row.row_id) for other in others)]
        known = self._probed
        first = count * self._probes
        chosen = [known[(first + i) % len(known)] for i in range(min(count, len(known)))]
        self._probes += 1
        if chosen:
            self._probe.take((await self._measure(spec, data, chosen)).answers())


def _first_rows(data: Dataset, spec: EvalSpec) -> tuple[Row, ...]:
    return data.rows[: spec.images] if spec.images else data.rows
