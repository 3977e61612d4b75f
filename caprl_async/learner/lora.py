"""LoRA through peft: adapters on the language model, and the weights that base and adapters make together.

Engines and exports get W + alpha / rank * B @ A under the base's name, so nothing else knows of adapters.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caprl_async.config import LoRAConfig
from caprl_async.learner.model import BadModel

_ADAPTER = "default"
_DOWN, _UP = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"  # as peft names A and B
_BASE = ".base_layer."


def add_adapters(hf: Any, config: LoRAConfig) -> None:
    """Freezes a transformers model and puts an adapter beside each targeted linear layer, in place.

    Raises:
        BadModel: a target is no linear layer of the language model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    hf.requires_grad_(False)
    peft = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=_pattern(hf, config.targets),
        base_model_name_or_path=hf.name_or_path,
    )
    inject_adapter_in_model(peft, hf, _ADAPTER)


def _pattern(hf: Any, targets: list[str]) -> str:
    """Matches the full names of the layers to adapt: none outside the language model."""
    inner = hf.model.language_model
    layers = [f".{name}" for name, module in inner.named_modules() if isinstance(module, nn.Linear)]
    every = sorted({name.rpartition(".")[2] for name in layers})
    strange = [target for target in targets if not any(name.endswith(f".{target}") for name in layers)]
    if strange:
        raise BadModel(
            f"learner.lora.targets: no linear layer of the language model ends in {', '.join(strange)}; "
            f"there are {', '.join(every)}"
        )
    endings = "|".join(re.escape(target) for target in targets or every)
    return rf"model\.language_model\.(?:.*\.)?(?:{endings})"


@contextmanager
def adapters_off(hf: Any) -> Iterator[None]:
    """Within it the model is the one that training started from."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in hf.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class Weight:
    """A weight by name, and what it is made of."""

    name: str
    base: nn.Parameter  # [out, in], or any other shape without an adapter
    adapter: tuple[nn.Parameter, nn.Parameter] | None = None  # A [rank, in] and B [out, rank]
    scale: float = 1.0

    @property
    def parts(self) -> list[nn.Parameter]:
        return [self.base, *(self.adapter or ())]

    def value(self) -> Tensor:
        """A copy in host memory (`on_host`), in the base's dtype; the sum is made in float32 or better.

        In bfloat16 an entry of the base stands on the grid and what adapters add is mostly far less than a
        step of it, so that rounding to the nearest would send engines the base. The sum is dithered instead.
        """
        base = self.base.detach()
        if self.adapter is None:
            return on_host(base)
        exact = torch.promote_types(base.dtype, torch.float32)
        down, up = (part.detach().to(exact) for part in self.adapter)
        merged = torch.addmm(base.to(exact), up, down, alpha=self.scale)
        if base.dtype is torch.bfloat16:
            merged = dithered(merged, zlib.crc32(self.name.encode()))
        return on_host(merged.to(base.dtype))


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory. From a GPU into pinned memory and not waited for: synchronise before reading it.

    Copies to pageable memory go in pieces, of which each waits for its turn on a GPU that engines share.
    """
    if tensor.device.type == "cpu":
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def dithered(values: Tensor, seed: int) -> Tensor:
    """float32 values on the grid of bfloat16, each up or down with the odds of its distance to either.

    The mean over entries stays that of `values`. An entry's luck is decided by the seed alone, so that it
    moves when its value has moved far enough, and not anew each time.
    """
    luck = torch.Generator(values.device).manual_seed(seed)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=luck)
    return ((bits + noise) & ~0xFFFF).view(torch.float32)


def merged_weights(module: nn.Module) -> list[Weight]:
    """The parameters of a module by the names they have without adapters."""
    named = dict(module.named_parameters())
    weights = []
    for name, parameter in named.items():
        if name.endswith((_DOWN, _UP)):
            continue
        layer, _, rest = name.rpartition(_BASE)
        if layer and rest == "weight":
            adapter = named[layer + _DOWN], named[layer + _UP]
            adapted_layer: Any = module.get_submodule(layer)
            weights.append(Weight(f"{layer}.weight", parameter, adapter, adapted_layer.scaling[_ADAPTER]))
        else:
            weights.append(Weight(name.replace(_BASE, "."), parameter))
    return weights


def adapter_weights(hf: Any) -> list[Weight]:
    """A and B of all adapters by the names in peft's files."""
    return [
        Weight(f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}", parameter)
        for name, parameter in hf.named_parameters()
        if name.endswith((_DOWN, _UP))
    ]


def save_adapter(hf: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes what `PeftModel.from_pretrained` puts on the base; `tensors` are of `adapter_weights`."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    config = copy(hf.peft_config[_ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
