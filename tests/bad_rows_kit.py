"""Rows of which every one is broken, in the forms of jsonl files; the good ones beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from caprl_async.data.rows import MAX_ID, MAX_TEXT

ABSTAIN = "unknown"
DEEP = "[" * 100_000
BROKEN_TEXT = ["\ud800", "a\udfffb", "x" * (MAX_TEXT + 1)]
Draw = Callable[[random.Random], Any]


def question(**changes: Any) -> dict[str, Any]:
    return {"question": "what color ?", "choices": ["A) red", "B) blue"], "answer": "B", **changes}


def _nested(depth: int) -> Any:
    value: Any = "bottom"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


NOT_TEXT = [
    *(None, True, 0, -7, 10**40, 1.5, float("nan"), float("-inf"), [], {}, [[]], {"": None}, [None] * 99),
]
NOT_TEXT += [_nested(3), _nested(200), {"question": 1}, ["x"]]
NOTHING = ["", " ", "\t\r\n", "\u200b", "\u2060 \u200d", "\ufeff"]
CHOICES: list[Any] = [
    *(None, 3, True, "A) red", {}, {"A": "red"}, [], [[]], [None], ["red", None]),
    *(["red", 3], ["red", ["blue"]]),
    *(["red", "Red "], ["A) red", "B) red"], ["red", ""], ["red", "\u200b"], ["A)", "B)"]),
    *([ABSTAIN], ["x"] * 99),
    *([f"c{i}" for i in range(26)], ["A) red", "B) blue", "C green"]),
    *(["red", "\ud800"], ["red", "x" * MAX_TEXT]),
    *(["red", 10**40], [float("nan"), "red"], ["red", _nested(200)], ["A) red", "A) red"]),
]
ANSWERS = [
    *(*NOT_TEXT, *NOTHING, "Z", "C", "(Z)", "green", "A) blue", "AB", "\0", "x" * 200_000),
    *("\ud800", "[" * 99),
]
WEIGHTS = [0, -1, float("nan"), float("inf"), 1e300, 1e-300, 10**400 // 10**200, "2", True, [], {}, [1]]
ENTRIES: list[Draw] = [
    lambda c: c.choice([*NOT_TEXT, "a", ["a", "b", "c"]]),
    lambda c: without(question(), c.choice(["question", "choices", "answer"])),
    lambda c: question(question=c.choice([*NOT_TEXT, *NOTHING, *BROKEN_TEXT])),
    lambda c: question(choices=c.choice(CHOICES)),
    lambda c: question(answer=c.choice(ANSWERS)),
    lambda c: question(weight=c.choice(WEIGHTS)),
]
LISTS: list[Any] = [
    *(None, "", 3, True, [], {}, "3", "null", '""', "{}", "()", "b'x'", "[1, 2", "__import__('os').getcwd()"),
    *(DEEP, DEEP + "]" * len(DEEP), "(" * 5000, "-" * 90_000 + "1", "\0", "\ud800"),
    *("1" * 5000, "0x" + "f" * 9999),
    *('["\\ud800"]', "[NaN]", "{{}}", "{[]: 1}", "[0x" + "f" * 9999 + "]", "'\\N{no}'"),
    *("\ufeff[]", "x" * 300_000),
]
IMAGES: list[Any] = [
    *(None, "", 3, True, [], {}, {"path": None}, {"path": 3}, {"bytes": [1, 2]}, {"bytes": ""}),
    *({"url": "x"}, [[]]),
    *("nowhere.png", "\0", "i.png\0", "\ud800.png", "x" * 5000, "x/" * 4000, ".", "/", ".."),
    *("/dev/zero", "~/i.png"),
    *("data:image/png;base64,aGk=", ["i.png", "i.png"], ["i.png"] * 999, [None], [3], {"path": "nowhere"}),
]
IDS: list[Any] = [True, False, [], {}, [1], {"a": 1}, _nested(200), "x" * (MAX_ID + 1), "\ud800", 10**600]


def without(record: dict[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != column}


def bad_questions(chance: random.Random) -> Any:
    """The list of questions of a row, of which none can be asked."""
    if chance.random() < 0.3:
        return chance.choice(LISTS)
    entries = [chance.choice(ENTRIES)(chance) for _ in range(chance.randrange(1, 4))]
    return json.dumps(entries) if chance.random() < 0.2 else entries


def good_record(name: str) -> dict[str, Any]:
    """A verl record; CapRL-QA's have the same columns."""
    return {
        "id": name,
        "images": ["i.png"],
        "prompt": [{"role": "user", "content": "<image> say."}],
        "reward_model": {"ground_truth": [question(), question(weight=2.5)]},
    }


def bad_record(name: str, chance: random.Random) -> dict[str, Any]:
    good = good_record(name)
    match chance.randrange(8):
        case 0:
            return {**good, "id": chance.choice(IDS)}
        case 1:
            return {**good, "images": chance.choice(IMAGES)}
        case 2:
            return without(good, chance.choice(["images", "reward_model"]))
        case 3:
            return {**good, "reward_model": chance.choice([*NOT_TEXT, *NOTHING, {"ground_truth": None}])}
        case 4:
            return {**good, "prompt": [{"role": "user", "content": chance.choice(BROKEN_TEXT)}]}
        case 5:
            return {**good, chance.choice(["reference_caption", "facts"]): chance.choice(BROKEN_TEXT)}
        case _:
            return {**good, "reward_model": {"ground_truth": bad_questions(chance)}}


def openrlhf_record(
    name: str, image: Any = "i.png", text: Any = "say.", answers: Any = None
) -> dict[str, Any]:
    turns = [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]},
        {
            "role": "answer",
            "content": repr([("color ?\nA) red\nB) blue", "B")]) if answers is None else answers,
        },
    ]
    return {"id": name, "message": json.dumps(turns)}


PAIRS: list[Any] = [
    *(*NOT_TEXT, "a", ("a",), ("a", "b", "c"), ("no options", "A"), ("", "A")),
    *((3, "A"), ("q ?\nA) red", "B")),
    *(("q ?\nA) red\nB) red", "A"), ("A) red\nB) blue", "A"), ("\n" * 999, "A")),
    *(("q ?\nA) red\nB) blue", answer) for answer in ANSWERS),
    *((text + " ?\nA) red\nB) blue", "A") for text in BROKEN_TEXT),
]
TURNS: list[Any] = [
    *(None, 3, "", "[]", "{}", "[1]", "[[]]", '[{"role": 3}]', '[{"role": "user"}]', DEEP),
    *("(" * 5000, "\ud800"),
    *('[{"role": "user", "content": "text"}]', '[{"role": ["user"], "content": []}]', "[{}]", [[]]),
    *([None], "x" * 9),
    *('[{"role": "user", "content": [[]]}]'),
    *('[{"role": "user", "content": []}]', "[" + "{}," * 20_000 + "{}]"),
    "[{'role': 0x" + "f" * 9999 + "}]",
]


def bad_openrlhf(name: str, chance: random.Random) -> dict[str, Any]:
    match chance.randrange(7):
        case 0:
            return {**openrlhf_record(name), "id": chance.choice(IDS)}
        case 1:
            return {**openrlhf_record(name), "message": chance.choice(TURNS)}
        case 2:
            return without(openrlhf_record(name), "message")
        case 3:
            broken = ["data:;base64,====a", "data:image/png;base64,\u00e9", "data:,a!", "data:,aGk"]
            return openrlhf_record(name, image=chance.choice([*IMAGES[:-6], *broken]))
        case 4:
            return openrlhf_record(name, text=chance.choice(BROKEN_TEXT))
        case 5:
            return openrlhf_record(name, answers=chance.choice([v for v in LISTS if v is not None]))
        case _:
            pairs = [chance.choice(PAIRS) for _ in range(chance.randrange(1, 4))]
            return openrlhf_record(name, answers=repr(pairs) if chance.random() < 0.5 else json.dumps(pairs))


def broken_line(line: bytes, chance: random.Random) -> bytes:
    """A line that holds no JSON object."""
    match chance.randrange(6):
        case 0:
            return line[: chance.randrange(1, len(line))]
        case 1:
            at = chance.randrange(1, len(line) - 1)
            return line[:at] + chance.choice([b"\xff", b"\xed\xa0\x80", b"\xc3", b"\0"]) + line[at:]
        case 2:
            return line.decode().encode("utf-16").replace(b"\n", b"")
        case 3:
            return chance.randbytes(chance.randrange(2, 300)).replace(b"\n", b"") + b"\xff"
        case 4:
            return chance.choice([b"[]", b"3", b"null", b'"x"', b"NaN", b"{}{}", b"\0" * 99, b"{'a': 1}"])
        case _:
            return chance.choice([DEEP.encode(), b'{"a":' * 50_000, b'{"a": ' + b"1" * 5000 + b"}"])
