"""Makes a tiny model that rates captions while it sees the image, for `judge.mode=rate`, and measures it.

    python tools/small_rater.py --folder runs/reproduce/data/rater

It starts from the tiny world's dense captioner, which sees well, and is trained by `job=sft` on captions with
mistakes, gaps and inventions, each rated by a program that knows the image's facts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import caprl_async
from caprl_async import conf
from caprl_async.config import WriterConfig
from caprl_async.judge.rating import MAX_TOKENS, parse_rating, rating_prompt, weights_of
from caprl_async.tiny import grammar
from caprl_async.tiny.facts import score_facts, stated_facts
from caprl_async.tiny.grammar import Entity
from caprl_async.tiny.tokenizer import build_tokenizer, save_processor, vocabulary
from caprl_async.tiny.world import World, image_bytes, sample_world, write_parquet
from caprl_async.types import ImageData, ImageRef
from caprl_async.writer.types import Ask, Unwritten
from caprl_async.writer.writer import load_writer

_MODELS = Path(caprl_async.__file__).parent / "tiny" / "models"
UNMEASURED = (
    *("data.heldout=", "evaluate.heldout_judge.model=", "evaluate.heldout_judge.data="),
    *("evaluate.interval=0", "evaluate.program="),
)
"""Of a run that nobody captions held-out images for."""
CRITERIA = weights_of(ImageRef(sha256="", path=""))
_MOST = 5


def program(*arguments: str) -> None:
    """Runs `python -m caprl_async.run`.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "caprl_async.run", *arguments])
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: ended with {done.returncode}")


def rough_caption(world: World, rng: random.Random) -> str:
    """A caption with gaps, mistakes, inventions and repeats as chance decides; at times without any."""
    wrong = rng.choice((0.0, 0.1, 0.3, 0.6))
    things = rng.sample(world.entities, rng.randint(0, len(world.entities)))
    if rng.random() < 0.4:
        things = rng.sample(world.entities, len(world.entities))
    things = [_mistaken(world, thing, rng) if rng.random() < wrong else thing for thing in things]
    if rng.random() < 0.4:
        empty = [p for p in grammar.PLACES if p not in {thing.place for thing in world.entities}]
        near = [p for p in grammar.DOMAIN_PLACES[world.domain] if p in empty]
        pool = near if near and rng.random() < 0.7 else empty
        places = rng.sample(pool, min(len(pool), rng.choice((1, 1, 2))))
        things += [_invented(world, place, rng) for place in places]
        rng.shuffle(things)
    if things and rng.random() < 0.15:
        things.insert(rng.randint(0, len(things)), rng.choice(things))
    half = rng.choice((0.0, 0.0, 0.4))
    form = rng.choices(grammar.SHARED, grammar.SHARED_WEIGHTS)[0]
    return " ".join(_said(thing, form, half, rng) for thing in things)


def _mistaken(world: World, thing: Entity, rng: random.Random) -> Entity:
    invented = _invented(world, thing.place, rng)
    if thing.value is None or rng.random() < 0.5:
        return replace(thing, color=invented.color)
    return replace(thing, value=invented.value)


def _invented(world: World, place: str, rng: random.Random) -> Entity:
    kind = grammar.VALUE_KIND.get(place)
    value = rng.choice(grammar.option_pool(world.domain, kind, place)) if kind else None
    return Entity(place, rng.choice(grammar.COLORS), value)


def _said(thing: Entity, form: str, half: float, rng: random.Random) -> str:
    part = "both" if thing.value is None or rng.random() >= half else rng.choice(("color", "value"))
    return grammar.sentence(thing, form, color=part != "value", value=part != "color")


def true_rating(caption: str, world: World) -> dict[str, int]:
    """Each criterion from 1 to 5, by shares: of what is said, what is true; of what there is, what is told;
    of the places named, those that have something. An empty caption says nothing untrue.
    """
    score = score_facts(caption, world.facts_json())
    named = {place for place, _, _ in stated_facts(caption)}
    there = named & {entity.place for entity in world.entities}
    shares = {
        "factuality": score.precision,
        "coverage": score.recall,
        "no_hallucination": len(there) / len(named) if named else 1.0,
    }
    return {name: 1 + round((_MOST - 1) * shares[name]) for name in CRITERIA}


def rating_text(rating: Mapping[str, int]) -> str:
    """The answer that `judge.mode=rate` asks for, as a word-level tokenizer parts it."""
    return "\n".join(f"{name} : {rating[name]}" for name in rating)


def words() -> list[str]:
    """What the tiny vocabulary lacks of the prompt and its answers."""
    text = rating_prompt("", CRITERIA) + rating_text(dict.fromkeys(CRITERIA, 1)) + " 2 3 4 5"
    parted = build_tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [word for word in dict.fromkeys(word for word, _ in parted) if word not in vocabulary()]


def write_ratings(path: Path, images: int, captions: int, seed: int) -> None:
    """Rows for `job=sft`: fresh images, each with so many captions, and what to answer."""
    rows = []
    for number in range(images):
        rng = random.Random(f"ratings-{seed}-{number}")
        world = sample_world(rng)
        image = {"bytes": image_bytes(world), "path": None}
        for which in range(captions):
            caption = rough_caption(world, rng)
            prompt, answer = rating_prompt(caption, CRITERIA), rating_text(true_rating(caption, world))
            rows.append({"id": f"{number:05d}-{which}", "image": image, "prompt": prompt, "answer": answer})
    random.Random(seed).shuffle(rows)
    write_parquet(rows, path)


def save_start(folder: Path) -> None:
    """The dense captioner, with rows for the words that it lacks."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_pretrained(_MODELS / "policy_dense", dtype=torch.float32)
    more = words()
    model.resize_token_embeddings(len(vocabulary(more)))
    model.save_pretrained(folder)
    save_processor(folder, more)


def make(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Trains the rater, about 30 minutes on two cores; what is there stays, what was broken off goes on.

    Raises:
        SystemExit: the training failed.
    """
    run = folder / "run"
    if not (run / "result.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "ratings.parquet").is_file():
            write_ratings(folder / "ratings.parquet", images=16000, captions=4, seed=0)
        if not (folder / "start" / "processor_config.json").is_file():
            save_start(folder / "start")
        training = (
            *("conf=conf/sft_demo.yaml", f"run_dir={run}", f"policy.model={folder / 'start'}"),
            *(f"sft.data={folder / 'ratings.parquet'}", "sft.validation=", "steps=4000", "sft.interval=100"),
            *(*UNMEASURED, "learner.lr=1e-3", "learner.warmup_steps=100"),
            *(["resume=true"] if (run / "ledger.sqlite").is_file() else []),
        )
        program(*training, *overrides)
    return run / "model"


def agreement(model: Path, images: int = 200, captions: int = 4) -> dict[str, float]:
    """How ratings of fresh captions agree with the facts.

    `correlation`: Spearman's, with the true rating. `ordered`: of two captions of one image that differ in
    truth, the share rated in the right order, equal ratings as a half. `rated`: the share of answers that are
    ratings.
    """
    from scipy import stats

    asks, truths = [], []
    for number in range(images):
        rng = random.Random(f"rated-{number}")
        world = sample_world(rng)
        image = ImageData.of(image_bytes(world))
        for caption in [rough_caption(world, rng) for _ in range(captions)]:
            asks.append(Ask(rating_prompt(caption, CRITERIA), image))
            right = true_rating(caption, world)
            truths.append(sum(weight * right[name] for name, weight in CRITERIA.items()))
    tiny = conf.load(["conf=conf/demo.yaml"])
    config = WriterConfig(
        model=str(model.resolve()),
        min_pixels=tiny.policy.min_pixels,
        max_pixels=tiny.policy.max_pixels,
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        engine=tiny.judge.engine,
    )
    with load_writer(config, "rater") as writer:
        answers = writer.ask(asks)
    rated = [
        (number // captions, rating, truth)
        for number, (answer, truth) in enumerate(zip(answers, truths, strict=True))
        if not isinstance(answer, Unwritten)
        and (rating := parse_rating(answer[0].text, CRITERIA)) is not None
    ]
    if not rated:
        raise SystemExit(f"{model}: no answer is a rating; the first: {answers[0]}")
    order = [
        0.5 if one == other else float((one > other) == (truth > another))
        for (image, one, truth), (same, other, another) in itertools.combinations(rated, 2)
        if image == same and truth != another
    ]
    correlation = stats.spearmanr([one for _, one, _ in rated], [truth for _, _, truth in rated]).statistic
    return {
        "correlation": round(float(correlation), 3),
        "ordered": round(sum(order) / len(order), 3),
        "rated": round(len(rated) / len(asks), 3),
    }


def main() -> int:
    """Returns 0 once the rater is made and measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where it is made")
    args = parser.parse_args()
    print(json.dumps(agreement(make(args.folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
