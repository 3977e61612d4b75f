"""The words of the tiny world: how a fact is said in a caption and how a question asks for it.

All text is lower-case words with single spaces between them (full stops too), so that a word-level tokenizer
gives back what it was given. `SHARED` forms are read by both judges and written by the policy; `JUDGE` and
`HELDOUT` are the two judges' own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = "unknown"

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
BOARD_SHAPES = ("circle", "square", "triangle", "diamond")
HEIGHTS = ("one", "two", "three", "four", "five")
NUMBERS = ("one", "two", "three", "four")
DIRECTIONS = ("left", "right", "up", "down")

QUADRANTS = ("topleft", "topright", "bottomleft", "bottomright")
SLOTS = ("first", "second", "third", "fourth")
PARTS = ("board", "border", "arrow", "dots")
PLACES = QUADRANTS + SLOTS + PARTS
VALUES = tuple(dict.fromkeys(SHAPES + HEIGHTS + DIRECTIONS))

DOMAIN_PLACES = {"scene": QUADRANTS, "bars": SLOTS, "sign": PARTS}
# What the second word of a place means (a border has a colour only).
VALUE_KIND: dict[str, str] = (
    dict.fromkeys(QUADRANTS, "shape")
    | dict.fromkeys(SLOTS, "height")
    | {"board": "shape", "arrow": "direction", "dots": "number"}
)

SHARED = ("plain", "colon", "back")
SHARED_WEIGHTS = (0.8, 0.15, 0.05)  # the policy's habit; `plain` is the form of reference captions
JUDGE = "judge"
HELDOUT = "heldout"


@dataclass(frozen=True)
class Entity:
    """One thing in an image: its place, its colour, and its shape, height, direction or number (or None)."""

    place: str
    color: str
    value: str | None


@dataclass(frozen=True)
class Ask:
    """What a question is about, before any phrasing: the `attribute` of the thing known by `key`.

    `attribute` is color, shape, height, direction, number or place; `key` is a place or a colour.
    """

    domain: str
    attribute: str
    key: str
    answer: str  # the right word, or `UNKNOWN` where the image has no such thing


def option_pool(domain: str, attribute: str, key: str) -> tuple[str, ...]:
    """Every word that could answer; options are drawn from it uniformly."""
    if attribute == "color":
        return COLORS
    if attribute == "shape":
        return BOARD_SHAPES if key == "board" else SHAPES
    if attribute == "height":
        return HEIGHTS
    if attribute == "direction":
        return DIRECTIONS
    if attribute == "number":
        return NUMBERS
    # The board is in every sign, so it is never asked for by its colour: a blind reader would guess it.
    return PARTS[1:] if domain == "sign" else DOMAIN_PLACES[domain]


def sentence(entity: Entity, form: str, color: bool = True, value: bool = True) -> str:
    """One sentence that says the entity's colour, its value, or both, in the wording of `form`."""
    words = [entity.color] if color else []
    if value and entity.value is not None:
        words.append(entity.value)
    said = " ".join(words)
    if form == "plain":
        return f"{entity.place} {said} ."
    if form == "colon":
        return f"{entity.place} : {said} ."
    if form == "back":
        return f"{said} {entity.place} ."
    if form == JUDGE:
        return f"the {entity.place} shows a {said} ."
    if form == HELDOUT:
        parts = [entity.value] if value and entity.value is not None else []
        parts += ["of", "hue", entity.color] if color else []
        return f"there is {' '.join(parts)} in the {entity.place} spot ."
    raise ValueError(f"unknown caption form {form!r}")


def dense_caption(entities: Sequence[Entity], form: str = "plain") -> str:
    """All facts, in the given order."""
    return " ".join(sentence(entity, form) for entity in entities)


def sparse_caption(entities: Sequence[Entity], rng: random.Random) -> str:
    """A caption as people write them: one thing in most cases, seldom all, in any order, often half said."""
    order = list(entities)
    rng.shuffle(order)
    form = rng.choices(SHARED, SHARED_WEIGHTS)[0]
    count = rng.choices((1, 2, 3, len(order)), (0.55, 0.25, 0.12, 0.08))[0]
    if count == len(order):
        return dense_caption(order, form)
    said = []
    for entity in order[:count]:
        part = rng.choices(("both", "color", "value"), (0.5, 0.25, 0.25))[0]
        if entity.value is None:
            part = "color"
        said.append(sentence(entity, form, color=part != "value", value=part != "color"))
    return " ".join(said)


_ASK_JUDGE = {
    "color": "what color is {key} ?",
    "shape": "what shape is {key} ?",
    "height": "what height is {key} ?",
    "direction": "what direction is {key} ?",
    "number": "what number is {key} ?",
    "place": "where is {key} ?",
}
_ASK_HELDOUT = {
    "color": "name the hue seen in the {key} spot",
    "shape": "which form belongs to {key} here",
    "height": "tell how tall the {key} column stands",
    "direction": "say which way the {key} points",
    "number": "count how many {key} you see",
    "place": "find the spot that has {key} on it",
}


def question(ask: Ask, phrasing: str) -> str:
    """The question's text; `key` is the bare form judges learn first, the others are each judge's own."""
    if phrasing == "key":
        return f"{ask.attribute} {ask.key}"
    if phrasing == JUDGE:
        return _ASK_JUDGE[ask.attribute].format(key=ask.key)
    if phrasing == HELDOUT:
        return _ASK_HELDOUT[ask.attribute].format(key=ask.key)
    raise ValueError(f"unknown phrasing {phrasing!r}")


def all_words() -> list[str]:
    """Every word the grammars can produce, in a fixed order."""
    templates = [*_ASK_JUDGE.values(), *_ASK_HELDOUT.values()]
    entity = Entity("topleft", "red", "circle")
    texts = [sentence(entity, form) for form in (*SHARED, JUDGE, HELDOUT)]
    texts += [text.replace("{key}", " ") for text in templates]
    words = [*PLACES, *COLORS, *VALUES, *_ASK_JUDGE, UNKNOWN]
    words += [word for text in texts for word in text.split()]
    return list(dict.fromkeys(words))
