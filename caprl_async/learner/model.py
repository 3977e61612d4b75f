"""The captioner as the learner sees it: a micro-batch in, the log-probability of each caption token out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caprl_async.config import LearnerConfig, Prefix
from caprl_async.data.processor import Grid
from caprl_async.learner.batch import BadBatch, TrainSequence
from caprl_async.learner.head import ScoringHead
from caprl_async.learner.prefix import use_packed_images, use_shared_prefix
from caprl_async.learner.tensors import (
    MicroTensors,
    Pixels,
    Positions,
    collate_repeated,
    collate_shared,
)

_ALIGNED = 8  # entries of bfloat16 that make 16 bytes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SHARED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Each `model_type` whose forward with a shared prefix is tested against its plain one."""

Collate = Callable[[Sequence[TrainSequence]], MicroTensors]
"""The captions of one micro-batch -> its tensors on the CPU."""


class BadModel(ValueError):
    """The checkpoint is not a captioner that the learner can train; the message says why."""


def load_policy(path: str | Path, dtype: str) -> Any:
    """A vision-language model of transformers from a checkpoint folder, on the CPU.

    Raises:
        BadModel: not a folder, an unknown dtype, or a model that takes no images as patches with a grid.
    """
    from transformers import AutoModelForImageTextToText

    if not Path(path).is_dir():
        raise BadModel(f"policy.model: {path} is not a folder with a Hugging Face checkpoint")
    if dtype not in _DTYPES:
        raise BadModel(f"learner.dtype: {dtype} is none of {', '.join(_DTYPES)}")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=_DTYPES[dtype], local_files_only=True)
    if "image_grid_thw" not in signature(model.model.forward).parameters or not hasattr(
        model.model, "visual"
    ):
        raise BadModel(
            f"{path}: {type(model).__name__} does not take images as patches with a grid, as the Qwen-VL "
            f"families do ({', '.join(SHARED_FAMILIES)})"
        )
    _without_dropout(model)
    return model


def _without_dropout(model: Any) -> None:
    """Checkpointing needs training mode, where dropout would make the ratios differ from 1 at lag 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def choose_prefix(model: Any, wanted: Prefix) -> tuple[Prefix, str]:
    """What the model can do of what is wanted, and a sentence for the user if that is less."""
    if wanted is Prefix.repeated:
        return wanted, ""
    kind = model.config.model_type
    if kind not in SHARED_FAMILIES:
        return Prefix.repeated, (
            f"learner.prefix: {kind} is trained with repeated prompts; the shared prefix is for "
            f"{', '.join(SHARED_FAMILIES)}"
        )
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return (
            Prefix.repeated,
            f"learner.prefix: this {kind} has sliding-window layers, so prompts are repeated",
        )
    return wanted, ""


def freeze(model: Any, config: LearnerConfig) -> None:
    """Takes the gradient from what is not to be trained.

    Raises:
        BadModel: `train_only` names no parameter.
    """
    if config.freeze_vision:
        model.model.visual.requires_grad_(False)
    if not config.train_only:
        return
    chosen = {n for n, _ in model.named_parameters() if any(f".{o}." in f".{n}." for o in config.train_only)}
    if not chosen:
        some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise BadModel(f"learner.train_only={config.train_only}: no parameter has these in its name ({some})")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)


def checkpoint_activations(model: Any, config: LearnerConfig) -> None:
    """Recomputes activations in backward; ZeRO-3 needs reentrant checkpoints."""
    reentrant = config.zero_stage == 3
    # Nothing in a forward pass is random.
    model.gradient_checkpointing_enable({"use_reentrant": reentrant, "preserve_rng_state": False})
    # transformers makes every embedding's output need a gradient, the frozen tower's too.
    model.disable_input_require_grads()
    tower, embeddings = model.model.visual, model.get_input_embeddings()
    blocks = [p for name, p in tower.named_parameters() if not name.startswith("merger")]
    if not any(p.requires_grad for p in blocks):
        tower.gradient_checkpointing_disable()  # it has no backward
    elif reentrant:
        _give_gradient(tower.patch_embed)
    if reentrant and not any(p.requires_grad for p in embeddings.parameters()):
        _give_gradient(embeddings)


def _give_gradient(module: nn.Module) -> None:
    """A reentrant checkpoint whose input needs no gradient gives none to what is trained inside it."""
    module.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def use_fast_kernels(hf: Any) -> None:
    """In bfloat16, norms by one kernel and widths of the tower that a GPU likes; same but for rounding."""
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module, module.forward)
    for block in hf.model.visual.blocks:
        layers = [module for module in block.mlp.modules() if isinstance(module, nn.Linear)]
        if any(layer.out_features % _ALIGNED for layer in layers):
            for layer in layers:
                layer.forward = partial(_filled_up, layer)  # type: ignore[method-assign]


def _norm(norm: Any, plain: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """transformers' own takes eight kernels, most of them in float32."""
    if states.dtype is not torch.bfloat16:
        return plain(states)
    return nn.functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _filled_up(layer: nn.Linear, states: Tensor) -> Tensor:
    """A linear layer that gives, and takes, rows filled up with zeros to a multiple of `_ALIGNED`.

    With rows of another length, as the 3420 of Qwen2.5-VL's tower, matrix products take three times as long.
    """
    more = -layer.out_features % _ALIGNED if states.dtype is torch.bfloat16 else 0
    weight = nn.functional.pad(layer.weight, (0, states.shape[-1] - layer.in_features, 0, more))
    bias = None if layer.bias is None else nn.functional.pad(layer.bias, (0, more))
    return nn.functional.linear(states, weight, bias)


def prompt_positions(model: Any, image_token_id: int) -> Positions:
    """The model's own rotary positions of a prompt, [3, P], remembered for the prompts of a batch."""

    @lru_cache(maxsize=4096)
    def positions(prompt: tuple[int, ...], grids: tuple[Grid, ...]) -> Tensor:
        ids = torch.tensor([prompt])
        merge = model.config.vision_config.spatial_merge_size
        expected = sum(t * h * w // merge**2 for t, h, w in grids)
        found = prompt.count(image_token_id)
        if found != expected:
            raise BadBatch(
                f"a prompt has {found} image tokens, but its images of grids {grids} make {expected}"
            )
        kinds = (ids == image_token_id).int()
        places, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=torch.tensor(grids))
        return places[:, 0]

    return positions


def collator(
    model: Any, image_token_id: int, pixels: Pixels, prefix: Prefix, dtype: torch.dtype = torch.float32
) -> Collate:
    """How micro-batches of this model become tensors."""
    if prefix is Prefix.repeated:
        return partial(collate_repeated, pixels=pixels, dtype=dtype)
    positions = prompt_positions(model, image_token_id)
    return partial(collate_shared, pixels=pixels, positions=positions, dtype=dtype)


class PolicyModel(nn.Module):
    """The transformers model with a `ScoringHead` in place of its own."""

    def __init__(
        self, hf: Any, banned: Iterable[int], temperature: float, chunk: int, prefix: Prefix
    ) -> None:
        """`chunk` is the number of caption tokens whose vocabulary logits exist at one time.

        Raises:
            BadModel: the output layer is not a plain matrix.
        """
        super().__init__()
        if not isinstance(hf.lm_head, nn.Linear) or hf.lm_head.bias is not None:
            raise BadModel(f"{type(hf).__name__}: the output layer must be a linear map without bias")
        hf.lm_head = ScoringHead(hf.lm_head.weight, banned, temperature, chunk)
        if prefix is Prefix.shared:
            use_shared_prefix(hf.model.language_model)
        if hf.config.model_type in SHARED_FAMILIES:
            use_packed_images(hf.model.visual)
            use_fast_kernels(hf)
        self.hf: Any = hf

    def forward(self, batch: MicroTensors) -> tuple[Tensor, Tensor]:
        """(log-probabilities [T], entropies [T]) of the caption tokens."""
        states = self._repeated(batch) if batch.layout is None else self._shared(batch)
        return self.hf.lm_head(states.flatten(0, 1)[batch.sources], batch.targets)

    def _shared(self, batch: MicroTensors) -> Tensor:
        """Last hidden states [1, L, D] of a packed row; the vision tower sees each distinct image once."""
        seen = self.hf.model.get_image_features(batch.pixel_values, batch.image_grid, return_dict=True)
        seen.pooler_output = [seen.pooler_output[image] for image in batch.shown]
        if "deepstack_features" in seen:  # Qwen3-VL adds features of inner layers too
            seen.deepstack_features = [
                [layer[image] for image in batch.shown] for layer in seen.deepstack_features
            ]
        out = self.hf.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            mm_encoder_outputs={"image": seen},
            use_cache=False,
            layout=batch.layout,
        )
        return out.last_hidden_state

    def _repeated(self, batch: MicroTensors) -> Tensor:
        """Last hidden states [S, L, D] by the model's plain forward: image and prompt anew in each row."""
        out = self.hf.model(
            input_ids=batch.input_ids,
            mm_token_type_ids=(batch.input_ids == self.hf.config.image_token_id).int(),
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid,
            use_cache=False,
        )
        return out.last_hidden_state
