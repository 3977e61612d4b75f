"""Who can be given work, and what happens to it when they do not answer."""

from __future__ import annotations

from typing import Any, cast

from caprl_async.replay.leases import Leases
from caprl_async.replay.work import Work
from caprl_async.types import Credit, Hello, Role

WORK = cast(Work, object())


def hello(name: str = "rollout-0", incarnation: str = "1") -> Hello:
    return Hello(role=Role.ROLLOUT, name=name, incarnation=incarnation)


def joined(**options: Any) -> Leases:
    leases = Leases(lease_timeout_s=100.0, peer_timeout_s=10.0)
    assert leases.hello(b"a", hello(**options), 0.0) == []
    leases.peers["rollout-0"].credit(Credit(slots=3))
    return leases


def test_work_in_transit_is_not_given_again_for_the_same_slot() -> None:
    leases = joined()
    peer = leases.peers["rollout-0"]
    for _ in range(3):
        leases.grant(peer, WORK, 0.0)
    peer.credit(Credit(slots=3))  # sent before the leases arrived
    assert peer.available == 0
    assert leases.answered(peer, 2) is not None
    assert peer.available == 1
    assert leases.answered(peer, 2) is None  # resent


def test_revoked_work_holds_its_slot_until_the_peer_answers() -> None:
    leases = joined()
    peer = leases.peers["rollout-0"]
    number = leases.grant(peer, WORK, 0.0)
    assert [held.number for held in leases.revoke(lambda work: True)] == [number]
    assert peer.available == 2
    assert leases.answered(peer, number) is None
    assert peer.available == 3


def test_time_outs_silence_and_a_new_incarnation_lose_leases() -> None:
    leases = joined()
    peer = leases.peers["rollout-0"]
    leases.grant(peer, WORK, 0.0)
    assert leases.lost(9.0) == []
    (_, why), *rest = leases.lost(11.0)
    assert "silent" in why
    assert not rest
    assert leases.givable() == []
    assert leases.heard(b"a", 12.0) is peer  # it was only slow
    leases.grant(peer, WORK, 12.0)
    peer.seen = 200.0
    (_, why), *_ = leases.lost(200.0)
    assert "no answer" in why
    number = leases.grant(peer, WORK, 200.0)
    lost = leases.hello(b"b", hello(incarnation="2"), 201.0)
    assert [held.number for held in lost] == [number]
    assert leases.heard(b"a", 202.0) is None
    assert leases.hello(b"b", hello(incarnation="2"), 203.0) == []


def test_an_answer_of_another_peer_is_not_taken() -> None:
    leases = joined()
    leases.hello(b"c", hello("rollout-1"), 0.0)
    number = leases.grant(leases.peers["rollout-0"], WORK, 0.0)
    assert leases.answered(leases.peers["rollout-1"], number) is None
    assert leases.answered(leases.peers["rollout-0"], number) is not None


def test_busy_share_is_of_the_last_seconds() -> None:
    peer = joined().peers["rollout-0"]
    for second in range(60):
        peer.credit(Credit(slots=3, alive_s=float(second), busy_s=float(min(second, 40) * 0.5)))
    share = peer.busy_share()
    assert share is not None
    assert share < 0.1


def test_one_that_has_left_is_known_no_more_and_what_it_held_is_taken_back() -> None:
    leases = joined()
    number = leases.grant(leases.peers["rollout-0"], WORK, 0.0)
    assert [held.number for held in leases.dismiss("rollout-0")] == [number]
    assert leases.givable() == []
    assert leases.heard(b"a", 1.0) is None
    assert leases.dismiss("rollout-0") == []
