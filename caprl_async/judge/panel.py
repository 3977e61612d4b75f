"""Which of several judge models asks about a prompt's captions.

All captions of a group are asked by one model, for an advantage compares them; the next prompt's by the next
model. So a policy must please all of them, at the price of one.
"""

from __future__ import annotations

from caprl_async.config import JudgeConfig

FIRST = "judge"


def panel(judge: JudgeConfig) -> tuple[str, ...]:
    """What their actors serve, by model: `judge.model` and each of `judge.also`."""
    return (FIRST, *(f"{FIRST}_{i}" for i in range(1, 1 + len(judge.also))))


def model_of(judge: JudgeConfig, serves: str) -> str:
    """The model behind one of `panel`."""
    return (judge.model, *judge.also)[panel(judge).index(serves)]
