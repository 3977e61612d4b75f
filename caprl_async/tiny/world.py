"""Makes the tiny world: rendered images, exact facts and multiple-choice questions, as CapRL-QA parquet.

`python -m caprl_async.tiny.world --out DIR --seed 0` writes train, heldout and heldout_alt (the same held-out
images asked in the held-out judge's wording). The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from caprl_async.tiny import grammar
from caprl_async.tiny.draw import paint
from caprl_async.tiny.grammar import UNKNOWN, Ask, Entity
from caprl_async.tiny.tables import load_levels

DOMAINS = ("scene", "bars", "sign")
PRESENT, ABSENT = 6, 2  # questions per image about things that are there, and that are not
CONTENT_OPTIONS = 4  # at most; a question about a sign's part has three
POLICY_PROMPT = "describe the image ."


@dataclass(frozen=True)
class World:
    """One image's truth; `noise` seeds the jitter of its rendering."""

    domain: str
    entities: tuple[Entity, ...]
    noise: int

    def facts_json(self) -> str:
        return json.dumps({"domain": self.domain, "entities": [asdict(entity) for entity in self.entities]})

    def image(self) -> Image.Image:
        return paint(self.domain, self.entities, random.Random(self.noise))


@cache
def _levels() -> dict[str, list[int]]:
    return load_levels()


def _value(place: str, rng: random.Random) -> str | None:
    kind = grammar.VALUE_KIND.get(place)
    if kind is None:
        return None
    return rng.choice(grammar.option_pool("", kind, place))


def sample_world(rng: random.Random, domain: str | None = None) -> World:
    """Draws one image's truth. Colours within an image differ, so that a colour names one thing."""
    domain = domain or rng.choice(DOMAINS)
    if domain == "sign":
        # Two or three of border, arrow and dots, each as likely as the others.
        chosen = {"board", *rng.sample(grammar.PARTS[1:], rng.choices((2, 3), (0.65, 0.35))[0])}
    else:
        count = rng.choices((2, 3, 4), (0.2, 0.35, 0.45))[0]
        chosen = set(rng.sample(grammar.DOMAIN_PLACES[domain], count))
    places = [place for place in grammar.DOMAIN_PLACES[domain] if place in chosen]
    colors = rng.sample(grammar.COLORS, len(places))
    if domain == "bars":
        column = _levels()[rng.choice(sorted(_levels()))]
        rows = sorted(rng.sample(range(len(column)), len(places)))
        values: list[str | None] = [grammar.HEIGHTS[column[row] - 1] for row in rows]
    else:
        values = [_value(place, rng) for place in places]
    entities = tuple(map(Entity, places, colors, values))
    return World(domain, entities, rng.getrandbits(32))


def all_asks(world: World) -> tuple[list[Ask], list[Ask]]:
    """Everything that can be asked: (about what is there, about what is not)."""
    domain = world.domain
    present, absent = [], []
    by_place = {entity.place: entity for entity in world.entities}
    for place in grammar.DOMAIN_PLACES[domain]:
        entity = by_place.get(place)
        kind = grammar.VALUE_KIND.get(place)
        if entity is None:
            absent.append(Ask(domain, "color", place, UNKNOWN))
            if kind:
                absent.append(Ask(domain, kind, place, UNKNOWN))
            continue
        present.append(Ask(domain, "color", place, entity.color))
        if kind and entity.value:
            present.append(Ask(domain, kind, place, entity.value))
            if domain != "sign":
                present.append(Ask(domain, kind, entity.color, entity.value))
        if place != "board":
            present.append(Ask(domain, "place", entity.color, place))
    shown = {entity.color for entity in world.entities}
    for color in grammar.COLORS:
        if color not in shown:
            absent.append(Ask(domain, "place", color, UNKNOWN))
            if domain != "sign":
                absent.append(Ask(domain, "shape" if domain == "scene" else "height", color, UNKNOWN))
    return present, absent


def pick_asks(world: World, rng: random.Random) -> list[Ask]:
    """`PRESENT` + `ABSENT` different questions, shuffled; half of the absent ones name an empty place."""
    present, absent = all_asks(world)
    empty = [ask for ask in absent if ask.key not in grammar.COLORS]
    first = rng.sample(empty, 1) if empty else []
    rest = [ask for ask in absent if ask not in first]
    picked = rng.sample(present, PRESENT) + first + rng.sample(rest, ABSENT - len(first))
    rng.shuffle(picked)
    return picked


def options(ask: Ask, rng: random.Random) -> list[str]:
    """Content options without the abstain word: drawn uniformly, the right one at a uniform place."""
    pool = grammar.option_pool(ask.domain, ask.attribute, ask.key)
    count = min(CONTENT_OPTIONS, len(pool))
    if ask.answer == UNKNOWN:
        return rng.sample(pool, count)
    chosen = [ask.answer, *rng.sample([word for word in pool if word != ask.answer], count - 1)]
    rng.shuffle(chosen)
    return chosen


def question_row(ask: Ask, choices: Sequence[str], phrasing: str) -> dict[str, Any]:
    """One question of the CapRL-QA schema."""
    letters = "ABCDEFGH"
    return {
        "question": grammar.question(ask, phrasing),
        "choices": [f"{letter}) {text}" for letter, text in zip(letters, choices, strict=False)],
        "answer": letters[list(choices).index(ask.answer)],
    }


def _choices(ask: Ask, rng: random.Random) -> list[str]:
    """Listed choices: the abstain word stands among them only where it is the right answer."""
    chosen = options(ask, rng)
    if ask.answer == UNKNOWN:
        chosen.insert(rng.randint(0, len(chosen)), UNKNOWN)
    return chosen


def image_bytes(world: World) -> bytes:
    """The rendered image as PNG."""
    buffer = io.BytesIO()
    world.image().save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def rows(count: int, seed: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of a split, each in the judge's and in the held-out judge's wording."""
    rng = random.Random(seed)
    for index in range(count):
        world = sample_world(rng, DOMAINS[index % len(DOMAINS)])
        name = f"{seed}-{index:05d}"
        shown = {"image": {"bytes": image_bytes(world), "path": f"{name}.png"}}
        yield asked_about(world, name, shown, rng)


def asked_about(
    world: World, name: str, shown: dict[str, Any], rng: random.Random
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row that shows `image` or `video`, in the judge's and in the held-out judge's wording."""
    asked = [(ask, _choices(ask, rng)) for ask in pick_asks(world, rng)]
    (kind,) = shown
    base = {
        "id": name,
        **shown,
        "prompt": [{"role": "user", "content": f"<{kind}> {POLICY_PROMPT}"}],
        "data_source": f"{kind}_caption_rl",
        "reference_caption": grammar.dense_caption(world.entities),
        "facts": world.facts_json(),
    }
    first, second = (
        {**base, "reward_model": {"ground_truth": [question_row(a, c, phrasing) for a, c in asked]}}
        for phrasing in (grammar.JUDGE, grammar.HELDOUT)
    )
    return first, second


def write_parquet(table_rows: list[dict[str, Any]], path: Path) -> None:
    """Writes rows so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(table_rows), temporary, compression="zstd")
    temporary.replace(path)


def write_world(out: Path, seed: int, train: int = 2000, heldout: int = 200) -> None:
    """Writes the three files of the world into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_parquet([first for first, _ in rows(train, f"train-{seed}")], out / "train.parquet")
    pairs = list(rows(heldout, f"heldout-{seed}"))
    write_parquet([first for first, _ in pairs], out / "heldout.parquet")
    write_parquet([second for _, second in pairs], out / "heldout_alt.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--heldout", type=int, default=200, help="held-out images")
    args = parser.parse_args()
    write_world(args.out, args.seed, args.train, args.heldout)


if __name__ == "__main__":
    main()
