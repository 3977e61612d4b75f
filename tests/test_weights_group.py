"""The weight group without vLLM: packing, gloo, the channel, and what each failure leaves behind."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_kit import StubEngine, run_all

from caprl_async.types import Version
from caprl_async.weights import channel, sender
from caprl_async.weights.packed import Manifest, pack, unpack
from caprl_async.weights.receiver import open_receiver, receive
from caprl_async.weights.sender import WeightSender
from caprl_async.weights.types import EngineDirty, OpenInfo, TransferFailed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def opened(engines: list[StubEngine], timeout_s: float = 10.0) -> tuple[WeightSender, list[dict[str, Any]]]:
    source = WeightSender()
    infos = source.open(backend="gloo", epoch=1, sizes=[1] * len(engines), timeout_s=timeout_s)
    joins = [lambda e=e, i=i: open_receiver(e, i) for e, i in zip(engines, infos, strict=True)]  # type: ignore[misc]
    for future in run_all(*joins):
        future.result()
    return source, infos


def publish(
    source: WeightSender, engines: list[StubEngine], infos: list[dict[str, Any]], version: Version
) -> tuple[BaseException | None, list[BaseException | None]]:
    tensors = {"a": torch.full((3, 5), float(version.step)), "b": torch.arange(7) + version.step}
    receives = [
        lambda e=e, i=i: receive(e, i, str(version))  # type: ignore[misc,arg-type]
        for e, i in zip(engines, infos, strict=True)
    ]
    sent, *received = run_all(lambda: source.send(version, tensors), *receives)
    return sent.exception(), [future.exception() for future in received]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    st.randoms(use_true_random=False),
)
def test_packed_tensors_come_out_as_they_went_in(layout: list[Any], random: Any) -> None:
    torch.manual_seed(random.randrange(1000))
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(layout)}
    manifest, buffer = pack(tensors)
    unpacked = unpack(manifest, buffer)
    assert list(unpacked) == list(tensors)
    for name, tensor in tensors.items():
        assert unpacked[name].dtype == tensor.dtype
        assert torch.equal(unpacked[name], tensor)


def test_non_contiguous_tensors_are_packed_by_value() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(unpack(*pack({"t": tensor}))["t"], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checksum": 1}, "checksum"),
        ({"names": ["a", "a"]}, "one to one"),
        ({"names": ["a"]}, "one to one"),
        ({"shapes": [[3], [9]]}, "were announced"),
        ({"dtype_names": ["float32", "load"]}, "cannot receive"),
        ({"shapes": [[3], [-4]]}, "cannot receive"),
    ],
)
def test_a_manifest_that_does_not_fit_the_buffer_is_refused(change: dict[str, Any], message: str) -> None:
    manifest, buffer = pack({"a": torch.ones(3), "b": torch.ones(4)})
    with pytest.raises(TransferFailed, match=message):
        unpack(Manifest(**{**manifest.fields(), **change}), buffer)


def test_two_engines_get_their_own_ranks_the_same_weights_and_the_version() -> None:
    engines = [StubEngine(), StubEngine()]
    source, infos = opened(engines)
    for step in (1, 2):
        sent, received = publish(source, engines, infos, Version(0, step))
        assert (sent, received) == (None, [None, None])
    assert [engine.rank for engine in engines] == [1, 2]
    for engine in engines:
        assert engine.version == "0.2"
        assert torch.equal(engine.weights["a"], torch.full((3, 5), 2.0))
        assert not engine.paused
        resets = ["reset_prefix_cache True", "reset_mm_cache", "reset_encoder_cache"]
        assert engine.log[-4:] == ["finish_weight_update", *resets]


def test_a_corrupted_transfer_changes_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [StubEngine(), StubEngine()]
    source, infos = opened(engines)

    def bad(tensors: Any) -> Any:
        manifest, buffer = pack(tensors)
        buffer[5] += 1
        return manifest, buffer

    with monkeypatch.context() as patch:
        patch.setattr(sender, "pack", bad)
        sent, received = publish(source, engines, infos, Version(0, 1))
    assert isinstance(sent, TransferFailed)
    assert all(isinstance(error, TransferFailed) and "checksum" in str(error) for error in received)
    assert all(e.weights == {} and e.version == "start" and not e.paused for e in engines)

    source, infos = opened(engines)
    assert publish(source, engines, infos, Version(0, 2)) == (None, [None, None])


def test_one_bad_engine_keeps_the_good_one_from_loading_and_both_go_on() -> None:
    engines = [StubEngine(), StubEngine(fail_in="start_weight_update")]
    source, infos = opened(engines)
    sent, received = publish(source, engines, infos, Version(0, 1))
    assert isinstance(sent, TransferFailed)
    assert "engine 1: start_weight_update was made to fail" in str(sent)
    assert all(isinstance(error, TransferFailed) for error in received)
    assert engines[0].weights == {}
    engines[1].fail_in = ""
    source, infos = opened(engines)
    assert publish(source, engines, infos, Version(0, 2)) == (None, [None, None])


def test_an_engine_that_fails_while_loading_is_dirty_and_stays_paused() -> None:
    engines = [StubEngine(), StubEngine(fail_in="finish_weight_update")]
    source, infos = opened(engines)
    sent, received = publish(source, engines, infos, Version(0, 1))
    assert isinstance(sent, TransferFailed)
    assert received[0] is None
    assert isinstance(received[1], EngineDirty)
    assert (engines[0].version, engines[0].paused) == ("0.1", False)
    assert (engines[1].version, engines[1].paused) == ("start", True)


def test_other_backends_leave_a_dirty_engine_wherever_they_break() -> None:
    engine = StubEngine(fail_in="start_weight_update")
    source, infos = opened([engine])
    infos[0]["backend"] = "nccl"  # vLLM's engine takes the layers apart in start_weight_update
    _, received = publish(source, [engine], infos, Version(0, 1))
    assert isinstance(received[0], EngineDirty)
    assert engine.paused


def test_an_engine_refuses_a_version_that_it_was_not_told_of() -> None:
    engine = StubEngine()
    source, infos = opened([engine])
    sent, received = run_all(
        lambda: source.send(Version(0, 2), {"a": torch.ones(1)}),
        lambda: receive(engine, infos[0], "0.1"),  # type: ignore[arg-type]
    )
    assert isinstance(sent.exception(), TransferFailed)
    assert "sends version 0.2" in str(received.exception())
    assert engine.weights == {}


def test_a_sender_that_never_sends_lets_the_engine_go_after_the_time_out() -> None:
    engine = StubEngine()
    _, infos = opened([engine])
    infos[0]["timeout_s"] = 1.0
    with pytest.raises(TransferFailed, match="timed out"):
        receive(engine, infos[0], "0.1")  # type: ignore[arg-type]
    assert not engine.paused


def test_a_missing_engine_is_named_and_cancelling_ends_every_wait_at_once() -> None:
    source = WeightSender()
    infos = source.open(backend="gloo", epoch=1, sizes=[1, 1], timeout_s=30.0)
    started = time.monotonic()
    threading.Timer(0.3, channel.cancel, [_join_info(infos[0]), "engine 1 died"]).start()
    with pytest.raises(TransferFailed, match="engine 1 died"):
        open_receiver(StubEngine(), infos[0])  # type: ignore[arg-type]
    assert time.monotonic() - started < 5
    with pytest.raises(TransferFailed, match="engine 1 died"):
        source.send(Version(0, 1), {"a": torch.ones(1)})


def _join_info(info: dict[str, Any]) -> Any:
    from caprl_async.weights.types import JoinInfo

    return JoinInfo(**info)


def test_the_store_listens_on_loopback_only() -> None:
    import psutil

    store = channel.listen("127.0.0.1", 5.0)
    listening = [
        c.laddr.ip
        for c in psutil.Process().net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == store.port
    ]
    assert listening == ["127.0.0.1"]


def test_ranks_count_the_workers_of_the_engines_before() -> None:
    group = OpenInfo("nccl", 1, (2, 4, 1), "127.0.0.1", 5.0)
    assert (group.offsets, group.world_size) == ((1, 3, 7), 8)


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="gloo, nccl or ipc"):
        WeightSender().open(backend="mpi", epoch=1, sizes=[1])
