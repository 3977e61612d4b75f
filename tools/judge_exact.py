"""A judge without an engine: its exact distribution of answers, computed once per prompt by transformers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from judge_tokens import Ids
from transformers import Qwen2ForCausalLM

from caprl_async.engine.engine import EngineStats
from caprl_async.engine.types import Completion, Request, RequestFailed, Response
from caprl_async.tiny import measure
from caprl_async.types import Finish


class Exact:
    """Stands for an engine: samples first answer tokens from distributions that it computes once."""

    def __init__(self, model: str) -> None:
        self._model = Qwen2ForCausalLM.from_pretrained(model).eval()
        self._known: dict[Ids, np.ndarray] = {}  # at temperature 1
        self._scaled: dict[Ids, tuple[np.ndarray, np.ndarray]] = {}  # log-probabilities and their sums
        self._temperature = 0.0

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]:
        new = sorted({r.prompt_token_ids for r in requests} - self._known.keys(), key=len)
        if new:
            rows = measure.last_logprobs(self._model, [list(ids) for ids in new]).double().numpy()
            self._known.update(zip(new, rows, strict=True))
        return [self._answer(request) for request in requests]

    def stats(self) -> EngineStats:
        return EngineStats(0.0, 0.0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        """Holds nothing open."""

    def _answer(self, request: Request) -> Response:
        if request.temperature != self._temperature:
            self._temperature = request.temperature
            self._scaled.clear()
        if request.prompt_token_ids not in self._scaled:
            row = self._known[request.prompt_token_ids] / request.temperature
            row = row - row.max()
            row -= math.log(np.exp(row).sum())
            self._scaled[request.prompt_token_ids] = (row, np.exp(row).cumsum())
        row, cumulative = self._scaled[request.prompt_token_ids]
        token = 0
        if request.seed is not None:
            place = random.Random(request.seed).random() * cumulative[-1]
            token = int(np.searchsorted(cumulative, place, side="right"))
        chosen = {i: float(row[i]) for i in request.logprob_token_ids}
        written = Completion("", (token,), Finish.STOP, spans=(), chosen_logprobs=chosen)
        return Response(request.prompt_token_ids, (written,), cached_tokens=0)
