"""The policy's output layer in the learner: token log-probabilities without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ScoringHead(nn.Module):
    """Log-probabilities under the distribution that the engine samples from.

    That is `log_softmax(states @ weight.T with banned tokens at -inf, divided by temperature)`, in float32 or
    better. It works on `chunk` tokens at a time and computes their logits again in backward, so logits of
    [all tokens, vocabulary] never exist. It takes the place of the model's own `lm_head` and owns its weight:
    ZeRO-3 gathers a weight only around the module that owns it.
    """

    def __init__(self, weight: nn.Parameter, banned: Iterable[int], temperature: float, chunk: int) -> None:
        super().__init__()
        self.weight = weight  # [V, D]
        self.temperature = temperature
        self.chunk = chunk
        mask = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        mask[list(banned)] = True
        self.register_buffer("banned", mask, persistent=False)

    def forward(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities [T], entropies [T]) of tokens [T] after states [T, D]."""
        return _TokenLogProbs.apply(states, self.weight, targets, self.banned, self.temperature, self.chunk)


def _log_softmax(states: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> Tensor:
    logits = states @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.masked_fill_(banned, -torch.inf).div_(temperature).log_softmax(-1)


class _TokenLogProbs(torch.autograd.Function):
    """To autograd one use of the weight, however many chunks: ZeRO reduces a gradient at first sight."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        banned: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        chosen, entropies = [], []
        for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
            logprobs = _log_softmax(part, weight, banned, temperature)
            chosen.append(logprobs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
            entropies.append(torch.special.entr(logprobs.exp_()).sum(-1))
        ctx.save_for_backward(states, weight, targets, banned)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # no bonus, no gradient of the entropy
        return torch.cat(chosen), torch.cat(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, targets, banned = ctx.saved_tensors
        given = grad if grad is not None else grad_entropy
        if given is None:
            return None, None, None, None, None, None
        grad = given.new_zeros(len(targets)) if grad is None else grad
        grad_states = torch.empty_like(states)
        # Chunks add up in full precision; a frozen layer (LoRA) needs none.
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        bonus = [None] * len(targets) if grad_entropy is None else grad_entropy.split(ctx.chunk)
        pieces = zip(*(x.split(ctx.chunk) for x in (states, targets, grad, grad_states)), strict=True)
        for (part, wanted, slope, into), extra in zip(pieces, bonus, strict=False):
            logprobs = _log_softmax(part, weight, banned, ctx.temperature)
            grad_logits = _slope(logprobs, wanted, slope, extra).div_(ctx.temperature)
            rounded = grad_logits.to(weight.dtype)
            torch.mm(rounded, weight, out=into)
            if grad_weight is None:
                continue
            if weight.is_cuda and weight.dtype is torch.bfloat16:  # the same sum, from factors that are fast
                torch.addmm(grad_weight, rounded.T, part, out_dtype=grad_weight.dtype, out=grad_weight)
            else:
                grad_weight.addmm_(grad_logits.T, part.to(grad.dtype))
        return (
            grad_states,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            *(None,) * 4,
        )


def _slope(logprobs: Tensor, targets: Tensor, grad: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Gradient [T, V] of the scaled logits z, 0 for banned tokens; overwrites `logprobs`.

    d logp_target / dz = onehot(target) - p;  d H / dz = -p (log p + H).
    """
    probabilities = logprobs.exp_()
    if grad_entropy is None:
        slope = probabilities.mul_(-grad.unsqueeze(-1))
    else:
        surprise = torch.special.entr(probabilities)
        total = surprise.sum(-1, keepdim=True)
        slope = (surprise - probabilities * total) * grad_entropy.unsqueeze(-1)
        slope -= probabilities.mul_(grad.unsqueeze(-1))
    return slope.scatter_add_(-1, targets.unsqueeze(-1), grad.unsqueeze(-1))
