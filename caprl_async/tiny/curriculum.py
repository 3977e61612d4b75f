"""The judges' curricula: key-value look-up, own wording, missing facts; and for one of them option letters.

Both read the shared caption forms. The judge adds its own captions and questions; the held-out judge has
other wordings, another seed, other stages and other shares, so that agreeing with both takes more than one
phrasing.
"""

from __future__ import annotations

from dataclasses import replace

from caprl_async.tiny.grammar import HELDOUT, JUDGE, SHARED
from caprl_async.tiny.judge_data import Mix
from caprl_async.tiny.judge_train import Stage

JUDGE_SEED, HELDOUT_SEED, LETTERS_SEED = 11, 29, 31

# Bare questions are short, so the look-up is learnt on many of them; the chat turn comes when it works.
_LOOKUP = Stage(
    "lookup", Mix(bare=True, by_color=False), steps=4000, until=0.97, peak=1e-3, floor=1e-3, batch=64
)

_JUDGE_ALL = Mix(
    forms=(*SHARED, "plain", JUDGE),
    phrasings=(JUDGE,),
    partial=0.5,
    empty=0.06,
    noise=0.3,
    unknown=0.4,
)
JUDGE_WORDS = (
    _LOOKUP,
    Stage("by color", Mix(bare=True), steps=1500, until=0.97, batch=48),
    Stage(
        "forms", Mix(bare=True, forms=(*SHARED, JUDGE), phrasings=("key", JUDGE)), 1500, until=0.97, batch=32
    ),
    Stage("missing", replace(_JUDGE_ALL, bare=True), steps=500, until=0.98, batch=32),
    Stage("turn", _JUDGE_ALL, steps=400, peak=7e-4, floor=3e-5, batch=16),
)

# A letter is one hop behind the word: with two more layers the judge first writes the word and then its
# letter, then the letter alone. A tenth of the batches keeps the words.
LETTERS_LAYERS = 6
JUDGE_LETTERS = (
    Stage("words first", replace(_JUDGE_ALL, letters=0.8, words_first=0.8), steps=1500, batch=12),
    Stage("letters", replace(_JUDGE_ALL, letters=0.9, words_first=0.2), steps=2500, floor=3e-5, batch=12),
    Stage("letter alone", replace(_JUDGE_ALL, letters=0.9), steps=600, peak=3e-4, floor=2e-5, batch=12),
)

_HELDOUT_ALL = Mix(
    forms=(*SHARED, HELDOUT),
    phrasings=(HELDOUT,),
    partial=0.6,
    empty=0.1,
    noise=0.25,
    unknown=0.45,
)
HELDOUT_WORDS = (
    _LOOKUP,
    Stage(
        "wording", Mix(bare=True, forms=(*SHARED, HELDOUT), phrasings=("key", HELDOUT)), 2000, 0.9, batch=32
    ),
    Stage("missing", replace(_HELDOUT_ALL, bare=True), steps=900, until=0.98, batch=32),
    Stage("turn", _HELDOUT_ALL, steps=400, peak=7e-4, floor=3e-5, batch=16),
)
