"""vLLM's own backends as far as they go without a GPU: who is told what, and in which order."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from weights_kit import StubEngine, run_all

from caprl_async.types import Version
from caprl_async.weights import register
from caprl_async.weights.receiver import open_receiver, receive
from caprl_async.weights.sender import WeightSender, trainer_init_info
from caprl_async.weights.types import OpenInfo


class NcclStub(StubEngine):
    """Notes what vLLM's worker would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        self.calls.append((method, kwargs or {}))


def test_nccl_gives_each_engine_its_own_ranks_and_tells_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    sent: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = []

    def broadcast(self: Any, source: Any, meta: Any) -> None:
        pairs = list(self._checked_iter(source, meta))
        sent.append([(name, t.dtype, tuple(t.shape)) for name, t in pairs])

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: None)
    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "_broadcast", broadcast)
    engines = [NcclStub(), NcclStub()]
    source = WeightSender()
    infos = source.open(backend="nccl", epoch=3, sizes=[2, 2], timeout_s=5.0)
    for future in run_all(
        *(lambda e=e, i=i: open_receiver(e, i) for e, i in zip(engines, infos, strict=True))
    ):
        future.result()
    inits = [dict(engine.calls)["init_weight_transfer_engine"]["init_info"] for engine in engines]
    assert [init["rank_offset"] for init in inits] == [1, 3]
    assert {init["world_size"] for init in inits} == {5}
    assert len({init["master_port"] for init in inits}) == 1

    for step in (1, 2):
        tensors = {"w": torch.full((2, 3), float(step), dtype=torch.bfloat16)}
        calls = [
            lambda e=e, i=i, s=step: receive(e, i, f"0.{s}") for e, i in zip(engines, infos, strict=True)
        ]
        for future in run_all(lambda s=step, t=tensors: source.send(Version(0, s), t), *calls):
            future.result()
    for engine in engines:
        assert [method for method, _ in engine.calls[-3:]] == [
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
        ]
        update = engine.calls[-2][1]["update_info"]
        assert update == {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
        assert engine.version == "0.2"
    assert sent == [[("w", torch.bfloat16, (2, 3))]] * 2


def test_every_backend_has_an_engine_and_a_trainer_known_to_vllm() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory

    register()
    register()
    modules = {
        "gloo": "caprl_async.weights.gloo",
        "nccl": "vllm.distributed.weight_transfer.nccl_engine",
        "ipc": "caprl_async.weights.ipc",
    }
    for backend in modules:
        assert WeightTransferEngineFactory._registry[backend]().__module__ == modules[backend]
    for backend in ("nccl", "ipc"):
        info = trainer_init_info(OpenInfo(backend, 1, (1,), "127.0.0.1", 5.0))
        assert info.is_sender
        assert info.backend in WeightTransferTrainerFactory._registry


def test_ipc_handles_travel_as_plain_values() -> None:
    from caprl_async.weights.ipc import from_plain, to_plain

    handle = (
        torch.Tensor,
        torch.Size([8]),
        (1,),
        0,
        torch.UntypedStorage,
        torch.uint8,
        0,
        b"handle",
        1024,
        0,
        False,
        b"counter",
        3,
        b"event",
        True,
    )
    update = {"names": ["w"], "shapes": [[2]], "tensor_sizes": [8], "ipc_handles": {"GPU-1": handle}}
    wire = msgspec.msgpack.encode(to_plain(update))
    assert from_plain(msgspec.msgpack.decode(wire)) == update


def test_ipc_refuses_a_learner_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="num_ranks=1"):
        WeightSender().open(backend="ipc", epoch=1, sizes=[1])
