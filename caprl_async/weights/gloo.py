"""vLLM's weight-transfer backend for machines without a GPU: the engine's end of a gloo broadcast.

`update_weights` receives and verifies everything and touches no weight; `finish_weight_update` loads. So
whichever call fails tells whether the engine is clean, also where the error crosses a process as mere text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from caprl_async.weights import channel
from caprl_async.weights.packed import GlooGroup, Manifest, total_bytes, unpack

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group meets, and this engine's place in it."""

    address: str
    port: int
    epoch: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """A `Manifest`, or `discard`: forget what was received."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    checksum: int = 0
    discard: bool = False

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.names, self.dtype_names, self.shapes, self.checksum)


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives the full model on the CPU; every tensor-parallel worker receives and takes its own part."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: GlooGroup | None = None
        self._staged: dict[str, Tensor] | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the group, leaving an older one; waits for all members.

        Raises:
            TransferFailed: they did not all come.
        """
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = GlooGroup(
            channel.connect(init_info.address, init_info.port, init_info.timeout_s),
            init_info.epoch,
            init_info.rank_offset + worker,
            init_info.world_size,
            init_info.timeout_s,
            channel.local_address(init_info.address),
        )

    def start_weight_update(self) -> None:
        self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Like the base's without its wait for an accelerator: nothing runs there yet."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Stages the broadcast buffer.

        Raises:
            TransferFailed: it did not come whole; the model is untouched.
        """
        self._staged = None
        if update_info.discard:
            return
        if self._group is None:
            raise RuntimeError("init_weight_transfer_engine comes before update_weights")
        buffer = torch.empty(total_bytes(update_info.manifest), dtype=torch.uint8, device="cpu")
        self._group.broadcast(buffer)
        self._staged = unpack(update_info.manifest, buffer)

    def finish_weight_update(self) -> None:
        """Loads what was staged, nothing if it was discarded.

        Raises:
            RuntimeError: a parameter of the model got no value.
        """
        if self._staged is None:
            return
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model: Any = self.model  # load_weights is vLLM's convention, not torch's
        wanted = {name for name, _ in model.named_parameters()}
        initialize_layerwise_reload(model)
        with disable_mtp_completeness_check():
            loaded = model.load_weights(list(self._staged.items()))
        finalize_layerwise_reload(model, self.model_config)
        self._staged = None
        if loaded is not None and wanted - loaded and self.model_config.quantization is None:
            some = sorted(wanted - loaded)[:3]
            raise RuntimeError(f"the update held no value for {len(wanted - loaded)} parameters, e.g. {some}")

    def shutdown(self) -> None:
        self._group = None
        self._staged = None
