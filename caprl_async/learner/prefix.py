"""Attention of a packed row: groups of captions behind their prompts, which are computed once.

The row holds for each group its prompt and then its captions. A prompt token attends to its prompt up to
itself; a caption token to its whole prompt and to its caption up to itself; to nothing of other groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ATTENTION = "caprl_shared_prefix"
"""Name of `attend` among the attention functions of transformers."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class GroupSpan:
    """Where one group lies in its row: the prompt, and right behind it one caption after the other."""

    start: int
    prompt_end: int
    caption_ends: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.caption_ends[-1]

    @property
    def captions(self) -> list[tuple[int, int]]:
        """(start, end) of each."""
        return list(zip((self.prompt_end, *self.caption_ends), self.caption_ends, strict=False))


@dataclass(frozen=True)
class Layout:
    """The groups of one row, side by side without a gap; on a GPU also their block-sparse mask."""

    groups: tuple[GroupSpan, ...]
    block_mask: Any = None

    @property
    def length(self) -> int:
        return self.groups[-1].end

    def owners(self) -> Tensor:
        """[2, L]: the group of each token, and its caption, counted from 1 over the row; 0 in a prompt."""
        found = torch.zeros(2, self.length, dtype=torch.long)
        number = 0
        for i, group in enumerate(self.groups):
            found[0, group.start : group.end] = i
            for start, end in group.captions:
                number += 1
                found[1, start:end] = number
        return found

    def on(self, device: torch.device) -> Layout:
        """The same with what the attention kernel of `device` needs."""
        return self if device.type == "cpu" else self.with_block_mask(device)

    def with_block_mask(self, device: torch.device) -> Layout:
        """For FlexAttention; on the way there is a mask of L x L bytes."""
        from torch.nn.attention.flex_attention import create_block_mask

        # A row's length, gradients or none, checkpoints: each may compile anew. Beyond the limit it would go
        # on unfused, without a word, in far more memory.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        mask = create_block_mask(
            mask_of(self.owners().to(device)), None, None, self.length, self.length, device
        )
        return Layout(self.groups, mask)


def mask_of(owners: Tensor) -> Any:
    """FlexAttention's mask function of a row with these `Layout.owners` [2, L]."""
    group, caption = owners

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        readable = (caption[key] == 0) | (caption[key] == caption[query])
        return (group[query] == group[key]) & readable & (key <= query)

    return mask


def use_shared_prefix(language_model: Any) -> None:
    """Makes a language model of transformers attend by the `layout` that its forward is given."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    language_model.set_attn_implementation(ATTENTION)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [1, H, L, D], key and value [1, K, L, D] -> [1, L, H, D].

    `torch.nn.attention.flex_attention` on a GPU. Its backward does not run on a CPU, where each part goes
    through the flash kernel of the CPU by itself.
    """
    if query.device.type != "cpu":
        return flex(module, query, key, value, layout, scaling), None
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (key, value))
    return _TwoPart.apply(query, key, value, layout.groups, scaling).transpose(1, 2), None


def flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
) -> Tensor:
    """`attend` by FlexAttention; the layout has its block mask."""
    from transformers.integrations.flex_attention import flex_attention_forward

    return flex_attention_forward(module, query, key, value, layout.block_mask, scaling=scaling)[0]


class _TwoPart(torch.autograd.Function):
    """Captions attend to their prompt and to themselves in two kernels, merged by their log-sum-exps.

    The backward of a flash kernel needs the output and log-sum-exp of the whole softmax and no other result
    of the forward, so that each part's backward with the merged ones gives its part of the gradient
    (FlashAttention-2, arXiv 2307.08691 algorithm 2; over parts: Ring Attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[GroupSpan], scale: float
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))

        def part(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            return _flash(query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale)

        for group in groups:
            prompt, captions = _slices(group)
            out[:, :, prompt], sums[:, :, prompt] = part(prompt, prompt, True)
            for start, end in group.captions:
                own = slice(start, end)
                out[:, :, own], sums[:, :, own] = part(own, own, True)
            seen, seen_sum = part(captions, prompt, False)
            whole = torch.logaddexp(seen_sum, sums[:, :, captions])
            share = (seen_sum - whole).exp().unsqueeze(-1)
            out[:, :, captions] = out[:, :, captions].to(whole.dtype).lerp(seen.to(whole.dtype), share)
            sums[:, :, captions] = whole
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        grad = grad.contiguous()
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

        def part(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            rows = (x[:, :, queries] for x in (grad, query))
            columns = (x[:, :, keys] for x in (key, value))
            ends = (x[:, :, queries] for x in (out, sums))
            return _flash_backward(*rows, *columns, *ends, 0.0, causal, scale=ctx.scale)

        for group in ctx.groups:
            prompt, captions = _slices(group)
            for start, end in group.captions:
                own = slice(start, end)
                for into, found in zip(grads, part(own, own, True), strict=True):
                    into[:, :, own] = found
            of_prompt = part(prompt, prompt, True)
            of_captions, *of_keys = part(captions, prompt, False)
            grads[0][:, :, prompt] = of_prompt[0]
            grads[0][:, :, captions] += of_captions
            for into, found, more in zip(grads[1:], of_prompt[1:], of_keys, strict=True):
                into[:, :, prompt] = found + more
        return *grads, None, None


def _slices(group: GroupSpan) -> tuple[slice, slice]:
    """The prompt, and all captions."""
    return slice(group.start, group.prompt_end), slice(group.prompt_end, group.end)
