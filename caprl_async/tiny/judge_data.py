"""What a tiny judge is trained on: captions as a policy may write them, and what each lets one answer.

The right answer always follows from the caption, never from the image: a fact that the caption leaves out is
answered `unknown`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from caprl_async.tiny import grammar
from caprl_async.tiny.grammar import UNKNOWN, Ask, Entity
from caprl_async.tiny.world import World, all_asks, sample_world


@dataclass(frozen=True)
class Mix:
    """One stage of a judge's curriculum: which captions, which questions, and how many have no answer."""

    forms: tuple[str, ...] = ("plain",)
    phrasings: tuple[str, ...] = ("key",)
    bare: bool = False  # no chat turn around the question: the answer is asked for at its last word
    by_color: bool = True  # also questions that know a thing by its colour
    partial: float = 0.0  # share of captions that leave facts out
    empty: float = 0.0  # share of empty captions
    noise: float = 0.0  # share of captions with repeats, fragments or a cut end
    unknown: float = 0.0  # share of questions whose answer the caption does not hold
    letters: float = 0.0  # share of batches with listed options and a letter for the answer
    words_first: float = 0.0  # of those, share where the answer's word comes before its letter


@dataclass(frozen=True)
class Reading:
    """A caption and the questions asked about it, each with the answer that the caption supports."""

    caption: str
    asks: list[tuple[Ask, str]]  # (ask with the caption's answer, phrasing)


def answer_from(ask: Ask, color: dict[str, str], value: dict[str, str]) -> str | None:
    """The answer from the colours and values that are stated per place; None where two things fit the key."""
    if ask.key not in grammar.COLORS:
        return (color if ask.attribute == "color" else value).get(ask.key, UNKNOWN)
    places = [place for place, word in color.items() if word == ask.key]
    if len(places) > 1:
        return None
    if not places:
        return UNKNOWN
    return places[0] if ask.attribute == "place" else value.get(places[0], UNKNOWN)


_FILLER = ("the", "a", "is", "there", "of", "in", "spot", "hue", "shows", ":", "and")


def _fragment(rng: random.Random) -> str:
    """A piece of text that states nothing: no place, or nothing about it."""
    if rng.random() < 0.5:
        pool = (*grammar.COLORS, *grammar.VALUES, *_FILLER)
        return " ".join(rng.choices(pool, k=rng.randint(1, 3))) + " ."
    place = rng.choice(grammar.PLACES)
    return " ".join([place, *rng.choices(_FILLER, k=rng.randint(0, 2))]) + " ."


def _recolored(world: World, rng: random.Random) -> World:
    """The same things with colours that may repeat, as a policy's mistakes do."""
    entities = tuple(replace(entity, color=rng.choice(grammar.COLORS)) for entity in world.entities)
    return replace(world, entities=entities)


def _sentences(
    world: World, mix: Mix, rng: random.Random
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Sentences of a caption, and the colours and values it states per place."""
    color: dict[str, str] = {}
    value: dict[str, str] = {}
    order = rng.sample(world.entities, len(world.entities))
    sparse = rng.random() < mix.partial
    if rng.random() < mix.empty:
        order = []
    elif sparse:
        order = order[: rng.randint(1, len(order))]
    form = rng.choice(mix.forms)
    mixed = rng.random() < 0.1
    said = []

    def say(entity: Entity) -> None:
        part = rng.choice(("both", "both", "color", "value")) if sparse else "both"
        if entity.value is None:
            part = "color"
        if part != "value":
            color[entity.place] = entity.color
        if part != "color" and entity.value is not None:
            value[entity.place] = entity.value
        wording = rng.choice(mix.forms) if mixed else form
        said.append(grammar.sentence(entity, wording, color=part != "value", value=part != "color"))

    for entity in order:
        say(entity)
    if rng.random() < mix.noise:
        for _ in range(rng.randint(0, 2)):
            if order:
                say(rng.choice(order))
        for _ in range(rng.randint(0, 2)):
            said.insert(rng.randint(0, len(said)), _fragment(rng))
        if said and rng.random() < 0.3:
            said[-1] = said[-1].removesuffix(" .")
    return said, color, value


def _draw(pool: list[Ask], count: int, rng: random.Random) -> list[Ask]:
    return rng.sample(pool, min(count, len(pool)))


def reading(mix: Mix, rng: random.Random, questions: int = 12) -> Reading:
    """Draws one caption and up to `questions` questions about it."""
    world = sample_world(rng)
    if mix.noise and rng.random() < 0.3:
        world = _recolored(world, rng)
    said, color, value = _sentences(world, mix, rng)
    known: list[Ask] = []
    missing: list[Ask] = []
    present, absent = all_asks(world)
    for ask in dict.fromkeys(replace(ask, answer="") for ask in [*present, *absent]):
        answer = answer_from(ask, color, value)
        if answer is not None:
            (missing if answer == UNKNOWN else known).append(replace(ask, answer=answer))
    if mix.unknown:
        other = sample_world(rng)
        if other.domain != world.domain:  # a question about quite another image
            missing += [
                replace(ask, answer=UNKNOWN)
                for ask in _draw(all_asks(other)[0], 2, rng)
                if ask.attribute == "color"
            ]
    if not mix.by_color:
        known = [ask for ask in known if ask.key not in grammar.COLORS]
    lacking = sum(rng.random() < mix.unknown for _ in range(questions))
    asks = _draw(known, questions - lacking, rng) + _draw(missing, lacking, rng)
    rng.shuffle(asks)
    return Reading(" ".join(said), [(ask, rng.choice(mix.phrasings)) for ask in asks])


def readings(mix: Mix, rng: random.Random, count: int) -> Iterable[Reading]:
    """`count` readings with at least one question each."""
    made = 0
    while made < count:
        drawn = reading(mix, rng)
        if drawn.asks:
            made += 1
            yield drawn
