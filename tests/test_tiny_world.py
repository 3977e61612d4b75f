"""The tiny world: same seed same data, right answers, nothing to guess, and a grammar that round-trips."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_async.tiny import grammar
from caprl_async.tiny.facts import stated_facts, true_facts
from caprl_async.tiny.grammar import UNKNOWN
from caprl_async.tiny.models import MODELS
from caprl_async.tiny.tables import LEVELS, load_levels
from caprl_async.tiny.world import DOMAINS, all_asks, options, pick_asks, rows, sample_world, write_world

DATA = MODELS.parent / "data"
SPLITS = ("train", "heldout", "heldout_alt")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return {name: pq.read_table(DATA / f"{name}.parquet").to_pylist() for name in SPLITS}


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_world(tmp_path / name, seed=5, train=9, heldout=6)
    write_world(tmp_path / "other", seed=6, train=9, heldout=6)
    for split in SPLITS:
        first, again, other = (
            pq.read_table(tmp_path / name / f"{split}.parquet").to_pylist() for name in ("a", "b", "other")
        )
        assert first == again
        assert first != other


def test_committed_data_is_what_seed_0_makes(splits: dict[str, list[dict[str, Any]]]) -> None:
    for stored, (first, second) in zip(splits["heldout"], rows(6, "heldout-0"), strict=False):
        assert stored["id"] == first["id"]
        assert stored["facts"] == first["facts"]
        assert stored["reward_model"] == first["reward_model"]
        assert second["reward_model"] != first["reward_model"]


def test_rows_have_the_caprl_qa_schema(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 2000,
        "heldout": 200,
        "heldout_alt": 200,
    }
    ids = Counter(row["id"] for row in splits["train"] + splits["heldout"])
    assert max(ids.values()) == 1
    for row in splits["train"][:40] + splits["heldout_alt"][:40]:
        assert row["data_source"] == "image_caption_rl"
        assert row["prompt"] == [{"role": "user", "content": "<image> describe the image ."}]
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (112, 112)
        questions = row["reward_model"]["ground_truth"]
        assert len(questions) == 8
        assert len({question["question"] for question in questions}) == 8
        for question in questions:
            letters = [choice[:3] for choice in question["choices"]]
            assert letters == [f"{letter}) " for letter in "ABCDE"[: len(letters)]]
            assert question["answer"] + ") " in letters
            assert len(set(question["choices"])) == len(question["choices"])


def test_both_phrasings_ask_the_same(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row, alt in zip(splits["heldout"], splits["heldout_alt"], strict=True):
        assert row["image"] == alt["image"]
        pairs = zip(row["reward_model"]["ground_truth"], alt["reward_model"]["ground_truth"], strict=True)
        for question, other in pairs:
            assert question["question"] != other["question"]
            assert (question["choices"], question["answer"]) == (other["choices"], other["answer"])


def truth_of(stem: str, facts: dict[str, Any]) -> str:
    """An answer read from the facts by the question's words alone, apart from how the generator makes it."""
    words = set(stem.split())
    if stem.startswith("where"):
        found = [e["place"] for e in facts["entities"] if e["color"] in words]
    else:
        column = "color" if "color" in words else "value"
        found = [e[column] for e in facts["entities"] if {e["place"], e["color"]} & words]
    return found[0] if found else UNKNOWN


def test_every_answer_is_the_truth(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in splits["train"] + splits["heldout"]:
        facts = json.loads(row["facts"])
        for question in row["reward_model"]["ground_truth"]:
            texts = {choice[0]: choice[3:] for choice in question["choices"]}
            assert texts[question["answer"]] == truth_of(question["question"], facts)
            assert (UNKNOWN in texts.values()) == (texts[question["answer"]] == UNKNOWN)


def test_reference_caption_states_exactly_the_facts(splits: dict[str, list[dict[str, Any]]]) -> None:
    for row in splits["train"][:300]:
        assert stated_facts(row["reference_caption"]) == true_facts(row["facts"])


def test_a_quarter_of_the_questions_asks_for_absent_things(splits: dict[str, list[dict[str, Any]]]) -> None:
    answers = [
        next(choice[3:] for choice in question["choices"] if choice[0] == question["answer"])
        for row in splits["train"]
        for question in row["reward_model"]["ground_truth"]
    ]
    assert answers.count(UNKNOWN) / len(answers) == pytest.approx(0.25)


def test_a_blind_reader_has_nothing_to_go_by() -> None:
    """Even the best fixed guess per question, learnt from other images, is at chance; so is each position."""
    rng = random.Random(3)
    worlds = [sample_world(rng) for _ in range(9000)]
    seen: dict[str, Counter[str]] = {}
    asked = []
    for world in worlds:
        for ask in pick_asks(world, rng):
            if ask.answer != UNKNOWN:
                key = replace(ask, answer="").__repr__()
                asked.append((key, ask.answer, options(ask, rng)))
    half = len(asked) // 2
    for key, answer, _ in asked[:half]:
        seen.setdefault(key, Counter())[answer] += 1
    hits = [
        max(shown, key=lambda text: seen.get(key, Counter())[text]) == answer
        for key, answer, shown in asked[half:]
    ]
    chance = sum(1 / len(shown) for _, _, shown in asked[half:]) / len(hits)
    assert sum(hits) / len(hits) == pytest.approx(chance, abs=0.02)
    positions = Counter(shown.index(answer) for _, answer, shown in asked if len(shown) == 4)
    for count in positions.values():
        assert count / positions.total() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("domain", DOMAINS)
def test_worlds_hold_two_to_four_things_and_enough_questions(domain: str) -> None:
    rng = random.Random(1)
    for _ in range(300):
        world = sample_world(rng, domain)
        assert 2 <= len(world.entities) <= 4
        assert len({entity.color for entity in world.entities}) == len(world.entities)
        present, absent = all_asks(world)
        assert len(present) >= 6
        assert len(absent) >= 2
        for ask in present:
            assert ask.answer in grammar.option_pool(ask.domain, ask.attribute, ask.key)


def test_same_world_same_picture_and_noise_matters() -> None:
    world = sample_world(random.Random(2))
    assert world.image().tobytes() == world.image().tobytes()
    assert world.image().tobytes() != replace(world, noise=world.noise + 1).image().tobytes()


def test_levels_of_real_tables_are_equally_frequent() -> None:
    for column in load_levels().values():
        counts = Counter(column)
        assert set(counts) == set(range(1, LEVELS + 1))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_sparse_captions_say_true_things_and_seldom_all() -> None:
    rng = random.Random(4)
    shares = []
    for _ in range(500):
        world = sample_world(rng)
        said, truth = (
            stated_facts(grammar.sparse_caption(world.entities, rng)),
            true_facts(world.facts_json()),
        )
        assert said
        assert said <= truth
        shares.append(len(said) / len(truth))
    assert 0.3 < sum(shares) / len(shares) < 0.55
