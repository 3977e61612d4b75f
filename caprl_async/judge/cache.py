"""Keeps verdicts by content: judges are frozen, so the same text asked the same way has the same verdict."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import msgspec

from caprl_async.config import JudgeConfig
from caprl_async.judge.verdicts import Asking
from caprl_async.types import Verdict

_WHOLE = 64 << 20  # bytes; larger files are fingerprinted by samples
_BLOCK, _BLOCKS = 64 << 10, 64


class VerdictCache:
    """The `size` verdicts used last; 0 keeps none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, key: bytes) -> Verdict | None:
        verdict = self._verdicts.get(key)
        if verdict is None:
            self.misses += 1
            return None
        self.hits += 1
        self._verdicts.move_to_end(key)
        return verdict

    def put(self, key: bytes, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > self._size:
            self._verdicts.popitem(last=False)


def judge_revision(config: JudgeConfig) -> bytes:
    """Digest of what a judge is: its checkpoint, how it is asked and how its answers are turned into scores.

    Raises:
        FileNotFoundError: `config.model` is no folder.
    """
    asked = (config.mode.value, config.temperature, config.prompt, config.text_tokens, config.engine.dtype)
    return _digest(checkpoint_fingerprint(Path(config.model)), asked)


def verdict_key(revision: bytes, asking: Asking, caption: str) -> bytes:
    """Digest of one (caption, question) as it is put to one judge."""
    question = asking.question
    asked = (question.question_id, question.stem, asking.options, asking.gold, asking.orders, asking.seeds)
    return _digest(revision, (asked, caption))


def checkpoint_fingerprint(folder: Path) -> bytes:
    """Digest of the files of a checkpoint; of a file above 64 MiB its size and 64 blocks spread over it.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder} (judge.model)")
    digest = hashlib.blake2b(digest_size=32)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.digest()


def _digest(prefix: bytes, content: object) -> bytes:
    return hashlib.blake2b(prefix + msgspec.msgpack.encode(content), digest_size=32).digest()
