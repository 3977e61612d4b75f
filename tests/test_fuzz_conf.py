"""Thousands of broken confs: each is one ConfError that names the key or the file, or a whole Config."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from caprl_async import conf
from caprl_async.conf import ConfError
from caprl_async.conf_help import leaves
from caprl_async.config import Config
from caprl_async.run import main

OVERRIDES, TOGETHER = 2000, 4  # a conf with four broken keys names them all
FILES = 300
_LOWEST = 0.9  # share of the confs that must be refused: values that fit by chance are few

VALUES = [
    *("", "null", "~", "true", "no", "0", "-1", "1", "3", "-0.0", "1e-320", "1e400", ".nan", "-.inf", "nan"),
    *("1" * 400, "1" * 5000, "0x" + "f" * 5000, "9223372036854775808", "-9223372036854775809", "1:30", "0b2"),
    *("[", "]", "{", "}", "[1", "'", '"', "a: b: c", "- x", "? x", "<<: 1", "*a", "&a", "&a 1", "!"),
    *("%", "@"),
    *("[]", "{}", "[null]", "[[1, 2]]", "[nan, 1]", "[1, 0]", "[1, 2, 3]", "{a: 1}", "{1: 2}", "{null: 1}"),
    *("!!python/object:os.system x", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!timestamp 2024-01-01"),
    *("2024-13-45", "${seed}", "${nope}", "${", "${}", "${${seed}}", "${steps}"),
    *("${learner}", "${oc.env:NO}"),
    *("${oc.decode:'['}", "${nobody:1}", "???", "\\", "\0", "\ud800", '"\\0"', "\x85", "\u2028", "[" * 3000),
    *("a" * 5000, "a/" * 3000, "~nobody/x", "/dev/null", "/proc", "../" * 200, "pkg:", "pkg:../..", "."),
    *("{caption}", "'{caption} {caption}'", "'{letter.__class__}'", "'{question!r:{options}}'", "' '"),
    *("os:nothing", ".x:y", ":", "a:b:c", "expected", "EXPECTED", "gloo", "float16", "cuda", "localhost:1"),
]
NO_KEYS = ["", ".", "..", "a..b", "[0]", "a[", "a[b", "steps.x", "learner", "learner.", ".lr", "learner.lr.x"]
NO_KEYS += [
    *("learner.betas[0]", "stepps", "*", "&a", "${seed}", "\0", "\ud800", "base", "x" * 3000, "1", "a b"),
]
NO_FILES = [
    *("", "3", "- 1", "steps", "a: 1\n---\nb: 2", "a: \0", "a:\n\tb: 1", "steps: 1\nsteps: 2", "a: &a [*a]"),
]
NO_FILES += ["learner: &a {lr: *a}", "&a learner: *a", "null: 1", "? [a]\n: 1", "steps: " + "9" * 5000]
NO_FILES += [
    *("[" * 5000, "{" * 5000, "a: " * 2000, '{"steps": 3', "base: 3", 'base: "\\0"'),
    *("base: .", "base: [[a]]"),
]
NO_FILES += [
    *("base: ~nobody/x", "base: " + "a" * 5000, "base: ${seed}", "learner.lr: 1", "steps: !x 1", "%YAML 9"),
]


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conf that passes on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("confs")
    for name, values in {
        "policy": {"vision_config": {"spatial_merge_size": 2}, "image_token_id": 5},
        "judge": {"architectures": ["Qwen2ForCausalLM"]},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
        (folder / name / "model.safetensors").touch()
    (folder / "train.parquet").touch()
    values = {
        "run_dir": str(folder / "run"),
        "data": {"train": "train.parquet"},
        "policy": {"model": "policy"},
        "judge": {"model": "judge"},
        "learner": {"device": "cpu"},
        "weights": {"backend": "gloo"},
    }
    (folder / "minimal.yaml").write_text(yaml.safe_dump(values))
    return folder / "minimal.yaml"


def _refusal(arguments: list[str], seed: object) -> str:
    """What the ConfError says; empty if the conf loads."""
    try:
        loaded = conf.load(arguments)
    except ConfError as error:
        return str(error)
    except BaseException as error:
        pytest.fail(f"{type(error).__name__}: {str(error)[:300]} (seed {seed}) from {str(arguments)[:2000]}")
    assert isinstance(loaded, Config)
    return ""


def _override(chance: random.Random) -> tuple[str, str]:
    """(key, value) of which at least one is wrong, mostly."""
    keys = [leaf.key for leaf in leaves()]
    key = chance.choice(keys) if chance.random() < 0.85 else chance.choice(NO_KEYS)
    if chance.random() < 0.1:  # misspelt
        at = chance.randrange(len(key) + 1)
        key = key[:at] + chr(chance.choice((95, 46, 97, 91, 0x4E2D))) + key[at + chance.randrange(2) :]
    if chance.random() < 0.1:
        return key, "".join(chr(chance.randrange(0x3000)) for _ in range(chance.randrange(1, 30)))
    return key, chance.choice(VALUES)


def _named(pairs: list[tuple[str, str]], message: str) -> bool:
    """By the whole override, its key, or what of the key was read before it broke."""
    for key, value in pairs:
        rooms = [
            key.strip("[]"),
            repr(key)[1:-1],
            *(key[: found.start()] for found in re.finditer(r"[.\[]", key)),
        ]
        if any((text or "''")[:200] in message for text in (repr(f"{key}={value}"), key, *rooms)):
            return True
    return False


def test_two_thousand_broken_overrides(minimal: Path) -> None:
    refused = 0
    for seed in range(OVERRIDES // TOGETHER):
        chance = random.Random(seed)
        pairs = [_override(chance) for _ in range(TOGETHER)]
        message = _refusal([f"conf={minimal}", *(f"{key}={value}" for key, value in pairs)], seed)
        refused += bool(message)
        assert not message or _named(pairs, message), f"seed {seed}: {message[:500]!r} of {pairs!r:.1000}"
    assert refused > _LOWEST * OVERRIDES // TOGETHER


@pytest.mark.parametrize("key", ["steps", "learner.lr", "run_dir", "judge.mode", "learner.betas"])
def test_each_broken_value_alone(minimal: Path, key: str) -> None:
    """So that none hides behind another that is refused first."""
    for value in VALUES:
        message = _refusal([f"conf={minimal}", f"{key}={value}"], key)
        assert not message or key in message, (key, value[:100], message[:500])


def test_a_value_that_no_file_or_library_can_hold_is_refused(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "\udcff")  # as Python reads a byte that is no UTF-8
    for override in ("data.prompt=${oc.env:ODD}", "steps=9223372036854775808", "learner.lora.targets=[.inf]"):
        key = override.partition("=")[0]
        assert key in _refusal([f"conf={minimal}", override], override), override


def _broken_files(whole: bytes) -> Iterator[tuple[int, bytes]]:
    for number, text in enumerate(NO_FILES):
        yield number, text.encode()
    yield len(NO_FILES), whole.decode().encode("utf-16")
    for seed in range(len(NO_FILES) + 1, FILES):
        chance = random.Random(seed)
        data = bytearray(whole)
        match chance.randrange(4):
            case 0:
                del data[chance.randrange(len(data)) :]
            case 1:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 2:
                at = chance.randrange(len(data))
                data[at:at] = chance.choice(VALUES).encode("utf-8", "surrogatepass")
            case _:
                data = bytearray(chance.randbytes(chance.randrange(1, 400)))
        yield seed, bytes(data)


def test_broken_files_are_named(minimal: Path, tmp_path: Path) -> None:
    whole = minimal.read_bytes() + b"steps: 3\nlearner: {betas: [0.9, 0.95]}\n"
    path = tmp_path / "broken.yaml"
    refused = 0
    for seed, data in _broken_files(whole):
        path.write_bytes(data)
        message = _refusal([f"conf={minimal}", f"conf={path}"], seed)
        refused += bool(message)
        known = str(path) in message or any(leaf.key in message for leaf in leaves())
        assert not message or known, f"seed {seed}: {message[:300]!r} of {data[:300]!r}"
    assert refused > FILES / 2


def test_bases_that_go_in_circles_or_nowhere(minimal: Path, tmp_path: Path) -> None:
    for length in range(1, 12):
        for i in range(length):
            (tmp_path / f"{i}.yaml").write_text(f"base: [{minimal}, {(i + 1) % length}.yaml]\n")
        assert "circle" in _refusal([f"conf={tmp_path / '0.yaml'}"], length)
    for name in ("none.yaml", "a" * 5000, "~nobody/x", "\0", "pkg:none.yaml", "/", "a\nb", "\ud800"):
        assert _refusal([f"conf={minimal}", f"conf={name}"], name).startswith("conf=")


def test_a_checkpoint_whose_config_is_nonsense_is_named(minimal: Path) -> None:
    nonsense = ["", "{", "[]", "3", "null", '"x"', "[" * 100_000, "\0", '{"vision_config": 3}']
    nonsense += [
        '{"vision_config": null}',
        '{"text_config": []}',
        '{"architectures": 3}',
        '{"architectures": {}}',
    ]
    for room in ("policy", "judge"):
        path = minimal.parent / room / "config.json"
        whole = path.read_text()
        for text in [*nonsense, whole.encode("utf-16").decode("latin-1")]:
            path.write_text(text)
            assert f"{room}.model=" in _refusal([f"conf={minimal}"], text[:40]), text[:40]
        path.write_text(whole)
    assert _refusal([f"conf={minimal}"], "mended") == ""


def test_the_command_line_ends_with_code_2(minimal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the values are hard to print."""
    for value in ("\ud800", "\0", "1" * 5000, "0x" + "f" * 5000, "a" * 5000, "[", "${"):
        for key in ("steps", "\ud800", "learner.x"):
            assert main([f"conf={minimal}", "job=none", f"{key}={value}"]) == 2
            error = capsys.readouterr().err
            assert error.startswith("conf error: ")
            assert len(error) < 4000
