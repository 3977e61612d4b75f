"""The start of pre-training holds the language model's and the tower's weights, and a new projector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_kit import load_tool

from caprl_async import tiny

MODELS = Path(tiny.__file__).parent / "models"


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("init_vlm")


def test_each_part_is_where_it_comes_from(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "init"
    arguments = [
        "--language",
        str(MODELS / "judge_letters"),
        "--tower",
        str(MODELS / "policy"),
        "--out",
        str(out),
    ]
    assert tool.main(arguments) == 0
    assert "million parameters" in capsys.readouterr().out
    made: Any = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    language: Any = AutoModelForCausalLM.from_pretrained(MODELS / "judge_letters", dtype=torch.float32)
    tower: Any = AutoModelForImageTextToText.from_pretrained(MODELS / "policy", dtype=torch.float32)
    assert made.config.get_text_config().num_hidden_layers == 6
    for name, weight in language.model.state_dict().items():
        assert torch.equal(made.model.language_model.state_dict()[name], weight)
    assert torch.equal(made.lm_head.weight, language.lm_head.weight)
    theirs = tower.model.visual.state_dict()
    for name, weight in made.model.visual.state_dict().items():
        is_weight = name.endswith("weight") and weight.ndim > 1
        if not name.startswith("merger."):
            assert torch.equal(weight, theirs[name])
        elif is_weight:
            assert not torch.equal(weight, theirs[name])
    assert AutoProcessor.from_pretrained(out) is not None


def test_words_that_are_numbered_otherwise_are_told(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "language"
    shutil.copytree(MODELS / "judge", other)
    written = json.loads((other / "tokenizer.json").read_text())
    words = written["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (other / "tokenizer.json").write_text(json.dumps(written))
    arguments = ["--language", str(other), "--tower", str(MODELS / "policy"), "--out", str(tmp_path / "out")]
    assert tool.main(arguments) == 2
    told = capsys.readouterr().err
    assert "2 words have another id" in told
    assert "'red'" in told or "'blue'" in told
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_told(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--language",
        str(MODELS / "policy"),
        "--tower",
        str(MODELS / "policy"),
        "--out",
        str(tmp_path),
    ]
    assert tool.main(arguments) == 2
    assert "this combines" in capsys.readouterr().err
