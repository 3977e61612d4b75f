"""Attention of a packed row: groups of captions behind their prompts, which are computed once.

The row holds for each group its prompt and then its captions. A prompt token attends to its prompt up to
itself; a caption token to its whole prompt and to its caption up to itself; to nothing of other groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ATTENTION = "caprl_shared_prefix"
"""Name of `attend` among the attention functions of transformers."""

TOWER_ATTENTION = "caprl_flash_tower"
"""Name of `attend_images`; by the "flash" in it transformers knows not to take the images apart itself."""

_CPU = torch.device("cpu")
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
class Runs:
    """Where sequences lie in rows of tokens: one after the other without a gap."""

    ends: tuple[int, ...]
    bounds: Tensor  # 0 and the ends, int32, on the device

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device) -> Runs:
        ends = tuple(accumulate(lengths))
        return cls(ends, torch.tensor((0, *ends), dtype=torch.int32, device=device))

    @cached_property
    def slices(self) -> list[slice]:
        return [slice(start, end) for start, end in zip((0, *self.ends), self.ends, strict=False)]

    @cached_property
    def longest(self) -> int:
        return max(run.stop - run.start for run in self.slices)


@dataclass(frozen=True)
class Layout:
    """The groups of one row, side by side without a gap; for FlexAttention also their block-sparse mask."""

    groups: tuple[GroupSpan, ...]
    device: torch.device = _CPU
    block_mask: Any = field(default=None, compare=False)

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

    @cached_property
    def own(self) -> Runs:
        """Each prompt and each caption by itself."""
        lengths = ((g.prompt_end - g.start, *(end - at for at, end in g.captions)) for g in self.groups)
        return Runs.of(chain.from_iterable(lengths), self.device)

    @cached_property
    def prompts(self) -> tuple[Tensor, Runs]:
        """Places of the prompts' tokens, and the run of each group in them."""
        return self._parts([(g.start, g.prompt_end) for g in self.groups])

    @cached_property
    def captions(self) -> tuple[Tensor, Runs]:
        """Places of the captions' tokens, and the run of each group in them."""
        return self._parts([(g.prompt_end, g.end) for g in self.groups])

    def _parts(self, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Runs]:
        places = torch.cat([torch.arange(start, end) for start, end in spans]).to(self.device)
        return places, Runs.of((end - start for start, end in spans), self.device)

    def on(self, device: torch.device) -> Layout:
        """The same for tensors of `device`."""
        return replace(self, device=device)

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
        return Layout(self.groups, device, mask)


@lru_cache(maxsize=1)  # all layers of a micro-batch
def _with_block_mask(layout: Layout) -> Layout:
    return layout.with_block_mask(layout.device)


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

    By flash kernels. A GPU has them for bfloat16 alone: float32 goes through FlexAttention there, which must
    be compiled and is slower.
    """
    if query.is_cuda and query.dtype is not torch.bfloat16:
        return flex(module, query, key, value, _with_block_mask(layout), scaling), None
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (key, value))
    return _TwoPart.apply(*map(_rows, (query, key, value)), layout, scaling).unsqueeze(0), None


def flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float
) -> Tensor:
    """`attend` by FlexAttention; the layout has its block mask."""
    from transformers.integrations.flex_attention import flex_attention_forward

    return flex_attention_forward(module, query, key, value, layout.block_mask, scaling=scaling)[0]


def use_packed_images(tower: Any) -> None:
    """Makes a vision tower of transformers attend by `attend_images`."""
    from transformers import AttentionInterface

    AttentionInterface.register(TOWER_ATTENTION, attend_images)
    tower.config._attn_implementation = TOWER_ATTENTION


def attend_images(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key and value [1, H, L, D] -> [1, L, H, D].

    `cu_seq_lens_q` bounds images, or an image's windows, that lie side by side and see nothing of each other.
    There are a hundred windows in a layer: in a kernel of their own each, a GPU would wait for its CPU.
    """
    if query.is_cuda and query.dtype is torch.bfloat16:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = map(_rows, (query, key, value))
        bounds, longest = cu_seq_lens_q, max_length_q
        out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling)
        return out.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    found = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts]
    return torch.cat(found, dim=2).transpose(1, 2), None


class _TwoPart(torch.autograd.Function):
    """Captions attend to their prompt and to themselves in two kernels, merged by their log-sum-exps.

    The backward of a flash kernel needs the output and log-sum-exp of the whole softmax and no other result
    of the forward, so that each part's backward with the merged ones gives its part of the gradient
    (FlashAttention-2, arXiv 2307.08691 algorithm 2; over parts: Ring Attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        own = _Kernel(layout.own, layout.own, True, scale)
        (captions, of_captions), (prompts, of_prompts) = layout.captions, layout.prompts
        across = _Kernel(of_captions, of_prompts, False, scale)
        out, sums = own.forward(query, key, value)
        seen, seen_sums = across.forward(query[captions], key[prompts], value[prompts])
        whole = torch.logaddexp(seen_sums, sums[:, captions])
        share = (seen_sums - whole).exp().T.unsqueeze(-1)
        out[captions] = out[captions].to(whole.dtype).lerp(seen.to(whole.dtype), share).to(out.dtype)
        sums[:, captions] = whole
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.kernels, ctx.captions, ctx.prompts = (own, across), captions, prompts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        (own, across), captions, prompts = ctx.kernels, ctx.captions, ctx.prompts
        grad = grad.contiguous()
        grads = own.backward(grad, out, sums, query, key, value)
        of_captions = (x[captions] for x in (grad, out))
        inputs = query[captions], key[prompts], value[prompts]
        seen = across.backward(*of_captions, sums[:, captions], *inputs)
        for into, more, places in zip(grads, seen, (captions, prompts, prompts), strict=True):
            into[places] += more
        return *grads, None, None


@dataclass(frozen=True)
class _Kernel:
    """Attention of each run of queries [L, H, D] to its run of keys and values, by flash kernels."""

    queries: Runs
    keys: Runs
    causal: bool
    scale: float

    @property
    def _bounds(self) -> tuple[Tensor, Tensor, int, int]:
        return self.queries.bounds, self.keys.bounds, self.queries.longest, self.keys.longest

    @property
    def _pairs(self) -> list[tuple[slice, slice]]:
        return list(zip(self.queries.slices, self.keys.slices, strict=True))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [L, H, D] and log-sum-exps [H, L]."""
        if query.is_cuda:
            out, sums, *_ = torch.ops.aten._flash_attention_forward(
                query, key, value, *self._bounds, 0.0, self.causal, False, scale=self.scale
            )
            return out, sums
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[1::-1], dtype=torch.promote_types(query.dtype, torch.float32))
        for mine, theirs in self._pairs:
            parts = map(_heads, (query[mine], key[theirs], value[theirs]))
            found, found_sums = _flash(*parts, 0.0, self.causal, scale=self.scale)
            out[mine], sums[:, mine] = _rows(found), found_sums[0]
        return out, sums

    def backward(
        self, grad: Tensor, out: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; `out` and `sums` may be of a softmax over more keys."""
        if grad.is_cuda:
            unused = torch.empty(2, dtype=torch.uint64, device=grad.device), grad.new_empty(0)  # of dropout
            states = grad, query, key, value, out, sums.contiguous()
            return torch.ops.aten._flash_attention_backward(
                *states, *self._bounds, 0.0, self.causal, *unused, scale=self.scale
            )
        of_query, of_key, of_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        for mine, theirs in self._pairs:
            inputs = map(_heads, (grad[mine], query[mine], key[theirs], value[theirs], out[mine]))
            found = _flash_backward(*inputs, sums[None, :, mine], 0.0, self.causal, scale=self.scale)
            of_query[mine], of_key[theirs], of_value[theirs] = map(_rows, found)
        return of_query, of_key, of_value


def _rows(heads: Tensor) -> Tensor:
    """[1, H, L, D] -> [L, H, D], without a copy."""
    return heads[0].transpose(0, 1)


def _heads(rows: Tensor) -> Tensor:
    """Inverse of `_rows`."""
    return rows.transpose(0, 1).unsqueeze(0)
