"""Makes tokens impossible in an engine: their logits become -inf before temperature and softmax.

vLLM applies this class where it counts into `processed_logprobs`, so the behaviour log-probabilities that a
rollout reports are those of the policy restricted to the tokens that are left. It is loaded by name in the
process that samples; one index_fill a step serves all requests, whatever their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "caprl_banned_token_ids"  # in vLLM's `additional_config`


class BanTokens(LogitsProcessor):
    """Bans the ids that `additional_config[KEY]` lists."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        additional = vllm_config.additional_config
        ids = additional.get(KEY, []) if isinstance(additional, dict) else []
        self._banned = torch.tensor(ids, dtype=torch.long, device=device)  # [banned]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: [sequences, vocabulary], changed in place."""
        return logits.index_fill_(1, self._banned, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        return False  # a banned token may be the greedy choice

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing depends on the requests."""
