"""What weights an engine really computes with, as one digest per checkpoint tensor.

The learner's weights are compared with these after a sync. On CPU vLLM keeps linear weights only in a packed
form, so a linear layer is read by what it does to the identity matrix, which gives its weights back exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_async.weights.digest import digest

if TYPE_CHECKING:
    import torch
    from vllm.v1.engine.llm_engine import LLMEngine


class CannotCompare(RuntimeError):
    """The engine's weights cannot be put into the checkpoint's names."""


def fingerprint(llm: LLMEngine, model: str) -> dict[str, str]:
    """Digest of each tensor that the checkpoint folder `model` names, from the weights now in the engine.

    Raises:
        CannotCompare: the engine is sharded, or holds a tensor under no name of the checkpoint.
    """
    if llm.vllm_config.parallel_config.world_size > 1:
        raise CannotCompare("an engine over several GPUs holds only parts of each tensor")
    (digests,) = llm.collective_rpc("caprl_fingerprint", args=(_checkpoint_names(model),))
    return digests


def _checkpoint_names(model: str) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.extend(tensors.keys())
    return names


class FingerprintWorker:
    """Mixed into vLLM's worker by name (`worker_extension_cls`)."""

    model_runner: Any

    def caprl_fingerprint(self, names: list[str]) -> dict[str, str]:
        """Digest by checkpoint name; `names` are all names of the checkpoint."""
        import torch

        model = self.model_runner.model
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        with torch.no_grad():
            held = {name: digest(tensor) for name, tensor in _unpacked(model)}
        inside = {name: mapper.map_name(name) if mapper is not None else name for name in names}
        missing = [name for name, ours in inside.items() if ours not in held]
        if missing:
            raise CannotCompare(f"the engine holds no {missing[0]} ({len(missing)} tensors in all)")
        return {name: held[ours] for name, ours in inside.items()}


def _unpacked(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter with its shape in the checkpoint; merged projections are taken apart again."""
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        parts = packed.get(own, [own])
        for kind, parameter in module.named_parameters(recurse=False):
            tensor = _plain(module, kind, parameter)
            if len(parts) == 1:
                yield f"{path}.{kind}", tensor
                continue
            pieces = tensor.split(list(module.output_sizes))
            for part, piece in zip(parts, pieces, strict=True):
                yield ".".join(filter(None, (parent, part, kind))), piece


def _plain(module: Any, kind: str, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter without vLLM's packing and padding."""
    import torch

    if kind == "weight" and parameter.numel() == 0 and hasattr(module, "input_size_per_partition"):
        identity = torch.eye(module.input_size_per_partition, dtype=parameter.dtype)  # [in, in]
        return module.quant_method.apply(module, identity, None).T
    rows: int | None = getattr(module, "org_vocab_size", None)
    return parameter if rows is None else parameter[:rows]
