"""Scores a caption against an image's facts by a program: no model, so inventing facts shows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from caprl_async.tiny.grammar import COLORS, PLACES, VALUES

Fact = tuple[str, str, str]  # (place, "color" or "value", word)

_SENTENCE_END = re.compile(r"[.\n]")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class FactScore:
    """Different facts a caption states, those of them that are true, and those that the image has."""

    stated: int
    correct: int
    total: int

    @property
    def precision(self) -> float:
        """Share of the stated facts that are true; 1 where nothing is stated."""
        return self.correct / self.stated if self.stated else 1.0

    @property
    def recall(self) -> float:
        return self.correct / self.total if self.total else 1.0


def stated_facts(caption: str) -> set[Fact]:
    """Facts read from a caption, sentence by sentence; words outside the grammar are passed over.

    A colour or value belongs to the last place named before it in its sentence, or to the first place where
    none was. A sentence without a place states nothing.
    """
    facts: set[Fact] = set()
    for sentence in _SENTENCE_END.split(caption.lower()):
        words = _WORD.findall(sentence)
        place = next((word for word in words if word in PLACES), None)
        for word in words:
            if place is None:
                break
            if word in PLACES:
                place = word
            elif word in COLORS:
                facts.add((place, "color", word))
            elif word in VALUES:
                facts.add((place, "value", word))
    return facts


def true_facts(facts_json: str) -> set[Fact]:
    """The image's facts, from the `facts` column of the parquet files."""
    facts: set[Fact] = set()
    for entity in json.loads(facts_json)["entities"]:
        facts.add((entity["place"], "color", entity["color"]))
        if entity["value"] is not None:
            facts.add((entity["place"], "value", entity["value"]))
    return facts


def score_facts(caption: str, facts_json: str) -> FactScore:
    """Counts stated, correct and existing facts; a fact said twice counts once. Any text is allowed."""
    stated, truth = stated_facts(caption), true_facts(facts_json)
    return FactScore(len(stated), len(stated & truth), len(truth))
