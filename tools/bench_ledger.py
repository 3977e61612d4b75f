"""What the ledger costs: seconds and bytes of one group's whole life.

Writes the lives of groups of captions of a real size (admitted, generating, judging, ready, cut, trained,
with journal, verdicts and samples) as the hub does, with a commit after every `--per-commit` groups. The last
line is one JSON object; its `ratio` is the share of one core that the ledger takes at `--groups-per-s`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from caprl_async.replay.events import Event
from caprl_async.replay.ledger import Judged, Ledger
from caprl_async.replay.queue import Kept
from caprl_async.replay.transport import encode
from caprl_async.types import (
    Caption,
    CaptionGroup,
    Finish,
    Outcome,
    Question,
    RewardParts,
    Verdict,
    Version,
    VersionSpan,
)

_WORDS = ("the", "a", "red", "blue", "small", "chart", "shows", "left", "of", "bottle", "nine", "percent")


def questions(count: int) -> tuple[Question, ...]:
    text = "Which of the following describes the object to the left of the chart best?"
    return tuple(
        Question(question_id=f"row/{i}", stem=text, choices=("a red bottle", "a cup", "a book"), answer=0)
        for i in range(count)
    )


def group(index: int, captions: int, tokens: int) -> CaptionGroup:
    """A made-up group with texts, tokens, log-probabilities and two versions a caption."""
    luck = random.Random(index)
    version, half = Version(0, index // 64), tokens // 2
    spans = (VersionSpan(version, 0, half), VersionSpan(Version(0, version.step + 1), half, tokens))
    return CaptionGroup(
        key=f"train/{index}",
        attempt=0,
        prompt_token_ids=tuple(range(1200)),
        image_sha256="0" * 64,
        image_grid=((1, 48, 64),),
        captions=tuple(
            Caption(
                text=" ".join(luck.choices(_WORDS, k=tokens)),
                token_ids=tuple(luck.randrange(150_000) for _ in range(tokens)),
                logprobs=tuple(luck.uniform(-5.0, 0.0) for _ in range(tokens)),
                spans=spans,
                finish=Finish.STOP,
            )
            for _ in range(captions)
        ),
        actor="rollout-0",
        started=0.0,
        finished=1.0,
    )


def live(ledger: Ledger, made: CaptionGroup, asked: tuple[Question, ...], index: int) -> None:
    """One group's whole life."""
    n, version = len(made.captions), Version(0, index // 64)

    def record(event: Event, **detail: object) -> int:
        return ledger.record(made.key, index, 0, event, version, **detail)

    record(Event.ADMITTED, row_id=f"row-{index}", image=made.image_sha256)
    record(Event.GENERATING, peer="rollout-0")
    record(
        Event.JUDGING, peer="rollout-0", started=0.0, finished=1.0, tokens=n * len(made.captions[0].token_ids)
    )
    ledger.journal(made.key, 0, "judging", encode(Kept(group=made, questions=asked, scale=1.0)))
    seq = record(Event.READY)
    verdict = Verdict(question_id="row/0", outcome=Outcome.SCORED, score=0.5, choice="a red bottle")
    parts = RewardParts(total=0.5, accuracy=0.5, length=1.0, format=0.0, cost=0.3, scored=3, asked=3)
    verdicts = ((verdict,) * len(asked),) * n
    ledger.record_judged(seq, Judged("judge-0", index, asked, made.captions, (parts,) * n, verdicts))
    ledger.journal(made.key, 0, "ready", encode(Kept(group=made, questions=asked, scale=1.0)))
    record(Event.CUT, oldest=str(version), at=1.0)
    record(Event.TRAINED, advantages=[0.1] * n)
    ledger.forget([made.key])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=8, help="per group")
    parser.add_argument("--tokens", type=int, default=300, help="per caption")
    parser.add_argument("--questions", type=int, default=3, help="per image")
    parser.add_argument("--per-commit", type=int, default=4, help="groups between two commits")
    parser.add_argument("--groups-per-s", type=float, default=10.0, help="of the ring that is asked about")
    args = parser.parse_args()
    asked = questions(args.questions)
    groups = [group(index, args.captions, args.tokens) for index in range(args.groups)]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        began = time.perf_counter()
        for index, made in enumerate(groups):
            live(ledger, made, asked, index)
            if index % args.per_commit == 0:
                ledger.commit()
        ledger.commit()
        seconds = (time.perf_counter() - began) / args.groups
        size = ledger.megabytes()
        began = time.perf_counter()
        ledger.audit(2)
        audit = time.perf_counter() - began
        ledger.close()
    share = seconds * args.groups_per_s
    table = Table("ledger", "")
    table.add_row("milliseconds per group", f"{1000 * seconds:.2f}")
    table.add_row("kilobytes kept per group", f"{1024 * size / args.groups:.1f}")
    table.add_row("milliseconds to audit 1,000 groups", f"{1000 * audit * 1000 / args.groups:.0f}")
    table.add_row(f"share of one core at {args.groups_per_s:g} groups/s", f"{share:.4f}")
    Console().print(table)
    found = {"group_s": seconds, "kb_per_group": 1024 * size / args.groups, "audit_s": audit}
    print(json.dumps({**vars(args), **found, "ratio": share}))


if __name__ == "__main__":
    main()
