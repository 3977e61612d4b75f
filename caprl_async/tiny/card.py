"""Tables of the tiny models' measurements, and their model card."""

from __future__ import annotations

from typing import Any

Report = dict[str, dict[str, dict[str, Any]]]

_CARD = """# Tiny models

Made from nothing by `python tools/build_tiny_models.py` on two CPU cores; no weights of others are in them.
They exist so that the whole ring runs anywhere: in the demo, in tests, without a GPU and without a download.
They know one small world (`docs/tiny-world.md`) and nothing else.

| folder | what | trained on |
|---|---|---|
| `policy` | Qwen2.5-VL, 2.2 M parameters: the demo's start | *sparse* captions of fresh images |
| `policy_dense` | the same, the same number of steps | captions with all facts |
| `judge` | Qwen2, 0.9 M parameters: gives the training reward | shared and own captions, own questions |
| `heldout_judge` | Qwen2, 0.9 M parameters: only ever measures | other captions and questions, another seed |
| `judge_letters` | `judge` with two more layers: reads listed options | the same, answered by letters |

All are float32 safetensors in the Hugging Face layout with one word-level tokenizer. The judges answer with
one word (`likelihood` mode, "words"); "letters" shows how well they read listed options instead, which only
`judge_letters` has learnt (modes `expected` and `sample`).

{tables}

How to read it: "full caption" puts all questions to the reference caption, the abstain option included.
"forced choice" leaves the abstain option out, so its chance is one over the number of options. "fact left
out" removes every sentence that speaks of the question's subject or answer. Policies are measured against
the images' facts by a program (`caprl_async.tiny.facts`), one caption per held-out image, length in tokens
with the end token.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(report: Report) -> str:
    """Both tables as Markdown."""
    judges, policies = report["judges"], report["policies"]
    names = list(judges)
    lines = list(next(iter(judges.values()))) if judges else []
    body = [[line, *(f"{judges[name][line]['mean']:.3f} (n={judges[name][line]['n']})" for name in names)]
            for line in lines]  # fmt: skip
    first = _table(["judge, held-out images", *names], body)
    columns = list(next(iter(policies.values()))) if policies else []
    second = _table(
        ["policy, held-out images", *columns],
        [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in policies.items()],
    )
    return f"{first}\n\n{second}"


def model_card(report: Report) -> str:
    """The README of the models' folder."""
    return _CARD.format(tables=tables(report))
