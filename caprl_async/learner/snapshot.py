"""Immutable copies of the weights by checkpoint names: what engines are sent and `hf` exports hold."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from caprl_async.types import Version

_CARRIED = {".json", ".jinja", ".txt", ".model", ".tiktoken"}


class ForeignModelDiffers(ValueError):
    """A checkpoint to be shown to the engines has not the shape of the policy; the message names a tensor."""


@dataclass(frozen=True)
class Snapshot:
    """One version's weights on the CPU of rank 0, by the names that `save_pretrained` writes."""

    version: Version
    tensors: Mapping[str, Tensor]


def checkpoint_tensors(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames (and where the model asks for it, reshapes) tensors from memory names to checkpoint names.

    transformers 5 keeps the mapping it loaded a checkpoint with; this is its own inverse, which
    `save_pretrained` uses. Tied weights appear once, as `tensors` has them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def check_same_shape(own: Mapping[str, Tensor], other: Mapping[str, Tensor], path: str) -> None:
    """
    Raises:
        ForeignModelDiffers: names or shapes differ.
    """
    for name in sorted(own.keys() | other.keys()):
        mine = tuple(own[name].shape) if name in own else None
        theirs = tuple(other[name].shape) if name in other else None
        if mine != theirs:
            raise ForeignModelDiffers(
                f"{path}: {name} has shape {theirs}, the policy's has {mine}; only checkpoints of the same "
                "architecture can be shown to the running engines"
            )


def export(model: Any, snapshot: Snapshot, source: Path, folder: Path) -> None:
    """Writes a checkpoint that transformers and `vllm serve` load: weights, configuration, processor files.

    The processor's and tokenizer's files are those of the start checkpoint `source`, unchanged.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(snapshot.tensors), folder, max_shard_size="5GB", metadata={"format": "pt"})
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for file in source.iterdir():
        if file.suffix in _CARRIED and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
