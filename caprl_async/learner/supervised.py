"""Supervised training of one rank: the same model, packing and optimizer; the likelihood of given texts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from caprl_async.data.index import Ready
from caprl_async.data.processor import PolicyProcessor
from caprl_async.learner.batch import NotFinite, TrainSequence
from caprl_async.learner.engine import GradientNotFinite, gather_rows, learning_rate
from caprl_async.learner.losses import token_weights
from caprl_async.learner.model import PolicyModel
from caprl_async.learner.trainer import Trainer


def sequences_of(rows: Sequence[Ready], processor: PolicyProcessor) -> list[TrainSequence]:
    """A sequence for each text; texts of one image share its prompt."""
    found = []
    for number, row in enumerate(rows):
        prompt = processor.expanded(row.prompt, row.grids)
        for i, text in enumerate(row.texts):
            found.append(
                TrainSequence(
                    name=f"{row.row_id}[{i}]",
                    group=number,
                    images=row.image.pictures,
                    grids=row.grids,
                    prompt=prompt,
                    caption=text,
                    behaviour=(0.0,) * len(text),
                    staleness=(0,) * len(text),
                    reward=0.0,
                )
            )
    return found


class SupervisedTrainer(Trainer):
    """Minimises the mean negative log-likelihood of texts' tokens, weighed as `learner.aggregation` says."""

    def _scored(self, hf: Any) -> PolicyModel:
        # Sampling's temperature and banned tokens are not the data's.
        return PolicyModel(hf, frozenset(), 1.0, self.config.learner.logprob_chunk, self.prefix)

    def _reference(self) -> None:
        """There is none: nothing is held near the start."""

    def fit(self, sequences: Sequence[TrainSequence], step: int) -> dict[str, float]:
        """One optimizer step, number `step` from 0; metrics, the same on every rank.

        Raises:
            NotFinite: on every rank; nothing has moved.
        """
        began = time.perf_counter()
        learner = self.config.learner
        plan = self._plan(self._weighed(sequences))
        lr = learning_rate(step, self.config.steps, learner)
        losses, wrong = [], []
        micros = plan.ranks[self.rank]
        for i, micro in enumerate(micros):
            tensors = self._tensors(micro)
            logprobs, _ = self.engine.forward(tensors)
            loss = -(tensors.weights * logprobs).sum()
            if not bool(loss.isfinite()):
                wrong += list(tensors.names)
            self.engine.backward(loss, last=i == len(micros) - 1)
            losses.append(_rows(logprobs, tensors.weights))
        self._stop_if(wrong)
        try:
            norm = self.engine.step(lr)
        except GradientNotFinite as error:
            raise NotFinite(str(error), [s.name for s in sequences]) from error
        loss, tokens = self._mean(losses)
        seconds = time.perf_counter() - began
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50.0)),
            "grad_norm": norm,
            "lr": lr,
            "examples": float(len({s.group for s in sequences})),
            "text_tokens": tokens,
            "computed_tokens": float(plan.tokens),
            "padding": plan.padding,
            "tokens_per_s": plan.tokens / seconds,
            "train_s": seconds,
        }

    def validate(self, sequences: Sequence[TrainSequence]) -> dict[str, float]:
        """Mean negative log-likelihood per token of texts that are not trained on, the same on every rank."""
        plan = self._plan(self._weighed(sequences))
        losses = []
        with torch.no_grad():
            for micro in plan.ranks[self.rank]:
                tensors = self._tensors(micro)
                logprobs, _ = self.engine.forward(tensors)
                losses.append(_rows(logprobs, tensors.weights))
        loss, tokens = self._mean(losses)
        return {"validation_loss": loss, "validation_tokens": tokens}

    def _weighed(self, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
        learner = self.config.learner
        length = learner.sum_length or self.config.sft.max_tokens
        weights = token_weights([len(s.caption) for s in sequences], learner.aggregation, length)
        return [replace(s, weight=weight) for s, weight in zip(sequences, weights, strict=True)]

    def _mean(self, losses: Sequence[Tensor]) -> tuple[float, float]:
        """Over the tokens of all ranks: mean, and how many they are."""
        every = gather_rows(torch.cat(list(losses), dim=1))
        return float(every.double().mean()), float(every.shape[1])


def _rows(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Negative log-probabilities [1, T] without filler."""
    return -logprobs.detach().float()[weights > 0].unsqueeze(0)
