"""Which rank computes which captions together: micro-batches under a token budget, of balanced work.

Every rank makes the same plan from the same batch, so none has to be told its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from caprl_async.config import Prefix
from caprl_async.learner.batch import TrainSequence

Captions = tuple[TrainSequence, ...]


@dataclass(frozen=True)
class Costs:
    """What a pass over captions takes; the unit is one token through the language model's linear layers."""

    prefix: Prefix
    pair: float = 0.0  # one token attending to one other, in all layers
    patch: float = 0.0  # one image patch through the vision tower
    scored: float = 0.0  # one caption token through the output layer
    unit: int = 1  # multiplications that one unit of a forward pass is

    def tokens(self, captions: Captions) -> int:
        """Tokens that pass through the language model, padding included."""
        if self.prefix is Prefix.repeated:
            return len(captions) * max(s.length for s in captions)
        return sum(len(group[0].prompt) + sum(len(s.caption) for s in group) for group in _groups(captions))

    def padding(self, captions: Captions) -> int:
        """Those of `tokens` that no caption needs."""
        if self.prefix is Prefix.repeated:
            return self.tokens(captions) - sum(s.length for s in captions)
        return 0

    def work(self, captions: Captions) -> float:
        """Estimated cost of computing these captions together."""
        scored = self.scored * sum(len(s.caption) for s in captions)
        if self.prefix is Prefix.repeated:
            width = max(s.length for s in captions)
            patches = sum(_patches(s) for s in captions)
            return len(captions) * (width + self.pair * width**2 / 2) + self.patch * patches + scored
        pairs, patches = 0.0, 0
        for group in _groups(captions):
            prompt = len(group[0].prompt)
            patches += _patches(group[0])
            pairs += prompt**2 / 2 + sum(len(s.caption) * (prompt + len(s.caption) / 2) for s in group)
        return self.tokens(captions) + self.pair * pairs + self.patch * patches + scored


def costs_of(model: Any, prefix: Prefix) -> Costs:
    """Estimates for a vision-language model of transformers, from its multiplications.

    A token takes as many in a matrix as it has entries, and in each layer's attention to one other token
    twice the width of all heads. Attention within the vision tower is left out.
    """
    text = model.config.get_text_config()
    inner = model.model.language_model
    linear = sum(p.numel() for name, p in inner.named_parameters() if p.ndim > 1 and "embed" not in name)
    width = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    merge = model.config.vision_config.spatial_merge_size**2  # patches that a merger takes at one time
    tower = sum(
        p.numel() / (merge if "merger" in name else 1)
        for name, p in model.model.visual.named_parameters()
        if p.ndim > 1 and "pos_embed" not in name
    )
    return Costs(
        prefix,
        pair=2 * width * text.num_hidden_layers / linear,
        patch=tower / linear,
        scored=text.vocab_size * text.hidden_size / linear,
        unit=linear,
    )


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one update: `ranks[r][i]`; as many for each rank."""

    ranks: tuple[tuple[Captions, ...], ...]
    fillers: int  # zero-weight copies that were needed to make it so
    tokens: int  # that pass through the language model on all ranks, padding and filler included
    padding: float  # share of these that is padding or filler

    @property
    def micros(self) -> list[Captions]:
        return [micro for rank in self.ranks for micro in rank]


def make_plan(sequences: Sequence[TrainSequence], ranks: int, token_budget: int, costs: Costs) -> Plan:
    """Packs the captions of one update into equally many micro-batches for each rank.

    A micro-batch holds at most `token_budget` tokens of `Costs.tokens`, or one caption that alone has more.
    With a shared prefix groups stay whole, but where one exceeds the budget, or where ranks would have less
    to do than others. Without one, captions of about equal length stand together, so that little is padding.
    """
    if costs.prefix is Prefix.shared:
        units = _fitting_groups(sequences, token_budget, costs)
        cuts = [0, *(2**i for i in range(ranks.bit_length()) if 2**i < ranks)]
        plans = [_share_out(_split(units, cut, costs), ranks, token_budget, costs) for cut in cuts]
        micros = min(plans, key=lambda micros: _duration(micros, ranks, costs))
    else:
        micros = _fill(sorted(sequences, key=lambda s: -s.length), token_budget, costs)
    fillers = _even(micros, ranks, costs)
    micros.sort(key=costs.work, reverse=True)
    # Ranks wait for each other in every micro-batch: like goes with like, and each gets the larger in turn.
    rounds = [micros[i : i + ranks] for i in range(0, len(micros), ranks)]
    rounds = [line[::-1] if i % 2 else line for i, line in enumerate(rounds)]
    tokens = sum(map(costs.tokens, micros))
    idle = sum(costs.padding(micro) if micro[0].weight else costs.tokens(micro) for micro in micros)
    return Plan(tuple(zip(*rounds, strict=True)), fillers, tokens, idle / tokens)


# ---------------------------------------------------------------- inside


def _groups(captions: Sequence[TrainSequence]) -> list[Captions]:
    return [tuple(members) for _, members in groupby(captions, key=lambda s: s.group)]


def _patches(s: TrainSequence) -> int:
    return sum(math.prod(grid) for grid in s.grids)


def _fitting_groups(sequences: Sequence[TrainSequence], budget: int, costs: Costs) -> list[Captions]:
    """The groups, each in as few parts as its captions' order and the budget allow."""
    return [part for group in _groups(sequences) for part in _fill(group, budget, costs)]


def _fill(captions: Sequence[TrainSequence], budget: int, costs: Costs) -> list[Captions]:
    """The captions in their order, cut wherever the budget is full."""
    parts: list[Captions] = []
    held: Captions = ()
    for s in captions:
        if held and costs.tokens((*held, s)) > budget:
            parts.append(held)
            held = ()
        held = (*held, s)
    return [*parts, held]


def _split(units: list[Captions], times: int, costs: Costs) -> list[Captions]:
    """The units with the largest cut in two, as often as told and possible."""
    units = list(units)
    for _ in range(times):
        largest = max(range(len(units)), key=lambda i: costs.work(units[i]) if len(units[i]) > 1 else 0.0)
        units[largest : largest + 1] = _halves(units[largest])
    return units


def _halves(captions: Captions) -> list[Captions]:
    """Two parts of about equal length, cut between groups if there are several; one caption stays one."""
    cuts = range(1, len(captions))
    if not cuts:
        return [captions]
    between = [i for i in cuts if captions[i].group != captions[i - 1].group] or list(cuts)
    total = sum(len(s.caption) for s in captions)
    cut = min(between, key=lambda i: abs(2 * sum(len(s.caption) for s in captions[:i]) - total))
    return [captions[:cut], captions[cut:]]


def _share_out(units: list[Captions], ranks: int, budget: int, costs: Costs) -> list[Captions]:
    """Puts units together: the heaviest first, each to the lightest micro-batch that has room (LPT).

    Their number is the least multiple of the ranks that the budget allows.
    """
    units = sorted(units, key=costs.work, reverse=True)
    total = sum(map(costs.tokens, units))
    rounds = math.ceil(total / budget / ranks)
    while True:
        bins: list[list[Captions]] = [[] for _ in range(rounds * ranks)]
        loads, rooms = [0.0] * len(bins), [budget] * len(bins)
        for unit in units:
            size = costs.tokens(unit)
            fits = [i for i in range(len(bins)) if not bins[i] or rooms[i] >= size]
            if not fits:
                break
            lightest = min(fits, key=loads.__getitem__)
            bins[lightest].append(unit)
            loads[lightest] += costs.work(unit)
            rooms[lightest] -= size
        else:
            return [_together(held) for held in bins if held]
        rounds += 1


def _together(units: list[Captions]) -> Captions:
    """One micro-batch; parts of one group side by side, so that they share its prompt again."""
    return tuple(sorted((s for unit in units for s in unit), key=lambda s: s.group))


def _even(micros: list[Captions], ranks: int, costs: Costs) -> int:
    """Makes their number a multiple of the ranks by splitting the heaviest; says how many fillers it took."""
    fillers = 0
    spare = replace(min((s for m in micros for s in m), key=lambda s: s.length), weight=0.0)
    while len(micros) % ranks:
        splittable = [i for i, micro in enumerate(micros) if len(micro) > 1]
        if splittable:
            heaviest = max(splittable, key=lambda i: costs.work(micros[i]))
            micros[heaviest : heaviest + 1] = _halves(micros[heaviest])
        else:
            micros.append((spare,))
            fillers += 1
    return fillers


def _duration(micros: list[Captions], ranks: int, costs: Costs) -> float:
    """Estimated time of an update whose ranks wait for each other in every micro-batch."""
    works = sorted(map(costs.work, micros), reverse=True)
    return sum(works[::ranks])
