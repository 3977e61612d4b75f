"""The hub's state in plain values, for people and charts."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from caprl_async.replay.dispatch import Dispatch
from caprl_async.replay.flow import TrainFlow
from caprl_async.replay.ledger import Ledger
from caprl_async.replay.metrics import mean_of_histogram
from caprl_async.replay.transport import HubSocket

_WINDOW_S = 20.0


class Rates:
    """Captions per second over the last seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def tick(self, now: float, captions: int) -> None:
        """Notes how many captions there have been; at most twice a second is kept."""
        if self._marks and now - self._marks[-1][0] < 0.5:
            return
        self._marks.append((now, captions))
        while now - self._marks[0][0] > _WINDOW_S:
            self._marks.popleft()

    def captions_per_s(self, now: float, captions: int) -> float:
        """Mean rate since the oldest mark."""
        if not self._marks or now <= self._marks[0][0]:
            return 0.0
        start, before = self._marks[0]
        return max(0, captions - before) / (now - start)


def status(
    flow: TrainFlow, dispatch: Dispatch, ledger: Ledger, rates: Rates, socket: HubSocket
) -> dict[str, Any]:
    """Counts of prompts by state, queue depths, peers, staleness so far; `metrics` holds the flat numbers."""
    depths = {**flow.depths(), **dispatch.leases.held_by_kind()}
    rate = rates.captions_per_s(time.time(), flow.captions_sampled)
    busy = dispatch.leases.busy_shares()
    return {
        "version": str(flow.version),
        "admission": flow.is_open,
        "finished": flow.finished,
        "capacity": flow.capacity,
        "states": ledger.lives.counts,
        "queue": depths,
        "evicted": dict(flow.evicted),
        "retried": dict(flow.retried),
        "staleness_mean": mean_of_histogram(flow.staleness),
        "staleness": {"mean": mean_of_histogram(flow.staleness), "tokens": dict(flow.staleness)},
        "busy": busy,
        "captions_per_s": rate,
        "judges_down": {
            serves: breaker.reason for serves, breaker in dispatch.breakers.items() if breaker.is_open
        },
        "messages": {"dropped": socket.dropped, "refused": socket.refused},
        "unexpected": dispatch.unexpected,
        "peers": {
            peer.hello.name: {
                "role": peer.hello.role.value,
                "serves": peer.hello.serves,
                "alive": peer.alive,
                "version": str(peer.version) if peer.version else None,
                "slots": peer.slots,
                "held": len(peer.held),
            }
            for peer in dispatch.leases.peers.values()
        },
        "metrics": {
            "captions_per_s": rate,
            "queue_depth": float(depths["ready"]),
            **{f"queue_{name}": float(depth) for name, depth in depths.items()},
            **{f"alive_{name}": float(number) for name, number in dispatch.leases.alive().items()},
            **{f"idle_{name}": max(0.0, 1.0 - share) for name, share in busy.items()},
            "messages_dropped": float(socket.dropped),
            "messages_refused": float(socket.refused),
            "messages_unexpected": float(dispatch.unexpected),
            "judge_outages": float(sum(breaker.outages for breaker in dispatch.breakers.values())),
            **{f"evicted_{name}": float(count) for name, count in flow.evicted.items()},
            **{f"retried_{name}": float(count) for name, count in flow.retried.items()},
        },
    }
