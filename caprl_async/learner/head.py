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
        mask = torch.zeros(weight.shape[0], dtype=torch.bool)
        mask[list(banned)] = True
        self.register_buffer("banned", mask, persistent=False)

    def forward(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities [T], entropies [T] without gradient) of tokens [T] after states [T, D]."""
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
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(chosen), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # d logp_target / d logits = (onehot(target) - softmax) / temperature; 0 for banned tokens.
        states, weight, targets, banned = ctx.saved_tensors
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)  # chunks add up in full precision
        pieces = zip(*(x.split(ctx.chunk) for x in (states, targets, grad, grad_states)), strict=True)
        for part, wanted, slope, into in pieces:
            scaled = (slope / ctx.temperature).unsqueeze(-1)
            grad_logits = _log_softmax(part, weight, banned, ctx.temperature).exp_().mul_(-scaled)
            grad_logits.scatter_add_(-1, wanted.unsqueeze(-1), scaled)
            torch.mm(grad_logits.to(weight.dtype), weight, out=into)
            grad_weight.addmm_(grad_logits.T, part.to(grad.dtype))
        return grad_states, grad_weight.to(weight.dtype), None, None, None, None
