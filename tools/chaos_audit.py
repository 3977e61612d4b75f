"""Whether a run kept its promises: no prompt lost or trained on twice, no false reward.

It reads the ledger and the recorded batches, makes every trained reward again from its verdicts, and has a
fresh judge of the same model judge captions again, those trained on soon after a kill first.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from caprl_async.config import Blind, Config
from caprl_async.data.load import load_rows
from caprl_async.data.sampler import PromptSampler
from caprl_async.judge.judge import Judge
from caprl_async.replay.events import Event, EventRow, surviving
from caprl_async.replay.ledger import audit_file, open_ledger, read_rows
from caprl_async.replay.lives import Life, Prepared, new_life, score_group
from caprl_async.replay.samples import recorded_batch
from caprl_async.types import Outcome, Question, ScoredGroup, TrainBatch, Verdict, Version

_SOON = 2  # steps after a kill whose captions are judged again first
_STUCK = 20  # steps without a sign of a prompt, and ...
_PATIENCE = 2.0  # ... this many times `replay.lease_timeout_s`: it is lost
_SAME = 1e-3  # scores in float32 of other batch sizes differ by less


@dataclass
class Audit:
    """What was found, in words; all lists are empty if all is well."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    false_rewards: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    steps: int = 0
    groups: int = 0  # whose rewards were made again
    judged_again: int = 0  # captions

    def by_kind(self) -> tuple[tuple[str, list[str]], ...]:
        return (
            *(("lost", self.lost), ("doubled", self.doubled), ("false reward", self.false_rewards)),
            ("other", self.other),
        )


@dataclass(frozen=True)
class Known:
    """What the ledger says of one judged group."""

    rotation: int
    questions: tuple[Question, ...]
    texts: tuple[str, ...]  # of all captions
    rewards: tuple[float | None, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]  # with `reward.blind` one row more, first


def audit(
    folder: Path, config: Config, kills: Sequence[float] = (), *, rejudge: int = 400, seed: int = 0
) -> Audit:
    """Audits the run in `folder`, which need not have ended.

    Args:
        kills: when something was killed.
        rejudge: how many captions are judged again; 0: none, and no judge is loaded.
    """
    found = Audit()
    rows = read_rows(folder / "ledger.sqlite")
    kept = surviving(rows)
    _prompts(folder, config, kept, found)
    batches = _batches(folder, kept, found)
    known = _known(folder, kept)
    _rewards(config, batches, known, found)
    if rejudge:
        chosen = choose(batches, kept, kills, rejudge, seed)
        _judge_again(config, chosen, known, found)
    return found


def _prompts(folder: Path, config: Config, kept: Sequence[EventRow], found: Audit) -> None:
    told = audit_file(folder / "ledger.sqlite", config.replay.max_staleness)
    found.other += told["violations"]
    found.lost += [f"one of {told['lost']} prompts that were passed over"] * told["lost"]
    trained = Counter(row.index for row in kept if row.event is Event.TRAINED)
    found.doubled += [f"prompt {i} is trained on {count} times" for i, count in trained.items() if count > 1]
    found.steps = len({row.version for row in kept if row.event is Event.TRAINED})
    found.lost += stuck(kept, _PATIENCE * config.replay.lease_timeout_s)


def stuck(kept: Sequence[EventRow], patience_s: float) -> list[str]:
    """Prompts that nobody works on any more though training goes on.

    Args:
        kept: rows that survive.
    """
    last: dict[int, EventRow] = {}
    steps: list[int] = []
    began = EventRow(0, "", None, None, Event.EPOCH, Version(0, 0), {})
    for row in kept:
        if row.event is Event.EPOCH:
            began = row
        elif row.event is Event.STEP:
            steps.append(row.seq)
        elif row.index is not None:
            last[row.index] = row
    texts = []
    for index, row in last.items():
        if row.event in (Event.TRAINED, Event.EVICTED):
            continue
        # A rollback takes up a prompt anew without a row of its own.
        since = max(row, began, key=lambda r: r.seq)
        waited = kept[-1].time - since.time
        passed = sum(seq > since.seq for seq in steps)
        if passed >= _STUCK and waited > patience_s:
            texts.append(f"prompt {index} is {row.event.value} for {passed} steps and {waited:.0f} s")
    return texts


def _batches(folder: Path, kept: Sequence[EventRow], found: Audit) -> dict[Version, TrainBatch]:
    """The recorded batches of the line that survives, compared with the ledger's."""
    trained: dict[Version, set[tuple[str, int | None]]] = defaultdict(set)
    for row in kept:
        if row.event is Event.TRAINED:
            trained[row.version].add((row.key, row.attempt))
    batches: dict[Version, TrainBatch] = {}
    prompts: Counter[int] = Counter()
    for version, expected in sorted(trained.items()):
        path = folder / "batches" / f"{version.epoch:03d}-{version.step:06d}.msgpack"
        try:
            batch = recorded_batch(path)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            found.other.append(f"batch {version} is missing: {error}")
            continue
        groups = [(scored.group.key, scored.group.attempt) for scored in batch.groups]
        if batch.version != version or set(groups) != expected:
            found.other.append(f"{path.name} holds {sorted(groups)}, the ledger says {sorted(expected)}")
        batches[version] = batch
        prompts.update(scored.index for scored in batch.groups)
    found.doubled += [f"prompt {i} is in {count} batches" for i, count in prompts.items() if count > 1]
    gaps = sorted(set(range(len(trained))) - {version.step for version in trained})
    if gaps:
        found.other.append(f"no batch leads on from steps {gaps}")
    return batches


def _known(folder: Path, kept: Sequence[EventRow]) -> dict[tuple[str, int], Known]:
    ready = {row.seq: (row.key, row.attempt or 0) for row in kept if row.event is Event.READY}
    captions: dict[int, list[tuple[str, float | None]]] = defaultdict(list)
    known: dict[tuple[str, int], Known] = {}
    with closing(open_ledger(folder / "ledger.sqlite")) as db:
        for seq, text, reward in db.execute("select seq, text, reward from samples order by seq, position"):
            captions[seq].append((text, reward))
        for seq, rotation, questions, verdicts in db.execute(
            "select seq, rotation, questions, verdicts from judged"
        ):
            if seq in ready:
                known[ready[seq]] = Known(
                    rotation,
                    msgspec.json.decode(questions, type=tuple[Question, ...]),
                    tuple(text for text, _ in captions[seq]),
                    tuple(reward for _, reward in captions[seq]),
                    msgspec.msgpack.decode(verdicts, type=tuple[tuple[Verdict, ...], ...]),
                )
    return known


def _rewards(
    config: Config,
    batches: dict[Version, TrainBatch],
    known: dict[tuple[str, int], Known],
    found: Audit,
) -> None:
    """Makes every reward again from its verdicts, its row of the data and its caption."""
    sampler = PromptSampler(
        load_rows(config.data.train, config.judge.prompt.abstain), config.seed, config.data.shuffle
    )
    for version, batch in batches.items():
        for scored in batch.groups:
            found.groups += 1
            said = known.get((scored.group.key, scored.group.attempt))
            if said is None:
                found.other.append(f"{scored.group.key} of batch {version}: the ledger has no verdicts")
                continue
            row = sampler.row_at(scored.index)
            life = new_life(Prepared(scored.index, row, scored.image), scored.group.attempt, config, None)
            found.false_rewards += [
                f"{scored.group.key} of batch {version}: {text}"
                for text in wrong_rewards(life, scored, said, config)
            ]


def wrong_rewards(life: Life, scored: ScoredGroup, said: Known, config: Config) -> list[str]:
    """What in a trained group is not what its prompt, its verdicts and the ledger give."""
    wrong = []
    if life.row.row_id != scored.row_id:
        wrong.append(f"it is of row {scored.row_id}, the sampler says {life.row.row_id}")
    if life.questions != said.questions:
        wrong.append("other questions were asked than the row has")
    if any(verdict.outcome is Outcome.JUDGE_DOWN for row in scored.verdicts for verdict in row):
        wrong.append("a verdict that could not be had has made a reward")
    life.group = scored.group
    blind = () if config.reward.blind is Blind.off else (scored.blind,)
    again = score_group(life, (*blind, *scored.verdicts), config).scored
    if again is None or (again.rewards, again.weights) != (scored.rewards, scored.weights):
        wrong.append(f"rewards {_totals(again)} from its verdicts, trained on {_totals(scored)}")
    rated = [i for i, reward in enumerate(said.rewards) if reward is not None]
    if tuple(said.texts[i] for i in rated) != tuple(caption.text for caption in scored.group.captions):
        wrong.append("other captions were judged")
    elif [said.rewards[i] for i in rated] != _totals(scored):
        wrong.append(
            f"rewards {[said.rewards[i] for i in rated]} in the ledger, trained on {_totals(scored)}"
        )
    if tuple(said.verdicts[len(blind) :][i] for i in rated) != scored.verdicts:
        wrong.append("other verdicts are in the ledger")
    return wrong


def _totals(scored: ScoredGroup | None) -> list[float | None]:
    return [parts.total for parts in scored.rewards] if scored is not None else []


def choose(
    batches: dict[Version, TrainBatch],
    kept: Sequence[EventRow],
    kills: Sequence[float],
    captions: int,
    seed: int,
) -> list[ScoredGroup]:
    """Groups with about so many captions: those trained within two steps after a kill first, then others."""
    steps = [(row.time, row.version) for row in kept if row.event is Event.STEP]
    soon: set[Version] = set()
    for killed in kills:
        after = [version for at, version in steps if at > killed][:_SOON]
        soon.update(Version(v.epoch, v.step - 1) for v in after)
    rng = random.Random(seed)
    # The first batch of an epoch may be of the one before: its step tells.
    near = [g for v, batch in batches.items() for g in batch.groups if v in soon]
    far = [g for v, batch in batches.items() for g in batch.groups if v not in soon]
    rng.shuffle(near)
    rng.shuffle(far)
    chosen, count = [], 0
    for scored in (*near, *far):
        if count >= captions:
            break
        chosen.append(scored)
        count += len(scored.group.captions)
    return chosen


def _judge_again(
    config: Config, chosen: Sequence[ScoredGroup], known: dict[tuple[str, int], Known], found: Audit
) -> None:
    if not chosen:
        return
    judge = Judge.load(config.judge, config.seed)
    try:
        for scored in chosen:
            said = known.get((scored.group.key, scored.group.attempt))
            if said is None:
                continue  # told already
            texts = [caption.text for caption in scored.group.captions]
            again = judge.ask(texts, said.questions, said.rotation)
            found.judged_again += len(texts)
            found.false_rewards += [
                f"{scored.group.key}, caption {text!r}: {fault}"
                for text, old, new in zip(texts, scored.verdicts, again, strict=True)
                for fault in differences(old, new)
            ]
    finally:
        judge.close()


def differences(old: Sequence[Verdict], new: Sequence[Verdict]) -> list[str]:
    """Where two judgements of one caption differ by more than arithmetic."""
    texts = []
    for a, b in zip(old, new, strict=True):
        same = a.outcome is b.outcome
        if same and a.score is not None and b.score is not None:
            same = abs(a.score - b.score) <= _SAME
        if not same:
            texts.append(
                f"question {a.question_id}: {a.outcome.value} {a.score}, now {b.outcome.value} {b.score}"
            )
    return texts
