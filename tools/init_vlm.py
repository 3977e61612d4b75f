"""Makes the start of pre-training: a language model's weights, a vision tower's, and a random projector.

    python tools/init_vlm.py --language Qwen2.5-3B-Instruct --tower Qwen2.5-VL-3B-Instruct --out init

The result has the shape of the tower's checkpoint (Qwen2.5-VL), the depth and width of the language model,
and the processor and tokenizer of the tower's. The projector is the tower's merger, drawn anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

_OF_LANGUAGE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings"),
)
_PROCESSOR = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
_PROCESSOR_MORE = ("processor_config", "preprocessor_config", "video_preprocessor", "generation_config")


class DoNotFit(ValueError):
    """The two checkpoints cannot become one model; the message says why."""


def combine(language: Path, tower: Path, seed: int) -> Any:
    """The model, on the CPU, in float32.

    Raises:
        DoNotFit: another family, other head sizes, or words that the two number differently.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(tower)
    words = AutoConfig.from_pretrained(language)
    text = config.get_text_config()
    if not config.model_type.startswith("qwen2") or words.model_type != "qwen2":
        raise DoNotFit(f"{config.model_type} and {words.model_type}; this combines Qwen2.5-VL and Qwen2(.5)")
    sections = text.rope_parameters["mrope_section"]
    head = words.hidden_size // words.num_attention_heads
    if 2 * sum(sections) != head:
        raise DoNotFit(f"heads of {head} in {language}; mrope_section {sections} of {tower} is for others")
    _check_words(language, tower)
    for name in _OF_LANGUAGE:
        setattr(text, name, getattr(words, name))
    text.rope_parameters = {**text.rope_parameters, "rope_theta": words.rope_parameters["rope_theta"]}
    text.layer_types = ["full_attention"] * words.num_hidden_layers
    config.tie_word_embeddings = words.tie_word_embeddings
    config.vision_config.out_hidden_size = words.hidden_size
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    speaks: Any = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    sees: Any = AutoModelForImageTextToText.from_pretrained(tower, dtype=torch.float32)
    _copy(model.model.language_model, speaks.model.state_dict())
    if not words.tie_word_embeddings:
        _copy(model.lm_head, speaks.lm_head.state_dict())
    tower_weights = {n: p for n, p in sees.model.visual.state_dict().items() if not n.startswith("merger.")}
    _copy(model.model.visual, tower_weights, missing="merger.")
    return model


def _check_words(language: Path, tower: Path) -> None:
    """
    Raises:
        DoNotFit: a word of both has two ids; the language model's rows would stand for other words.
    """
    from transformers import AutoTokenizer

    ours, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (language, tower))
    moved = [word for word, index in ours.items() if theirs.get(word, index) != index]
    if moved:
        word = moved[0]
        raise DoNotFit(
            f"{len(moved)} words have another id in {tower} than in {language}, the first of them {word!r}: "
            f"{theirs[word]} and {ours[word]}; take two models of one vocabulary"
        )


def _copy(module: torch.nn.Module, weights: dict[str, torch.Tensor], missing: str = " ") -> None:
    """Copies all weights; a vocabulary may have fewer words than `module` has rows: the rest stays random.

    Raises:
        DoNotFit: names or shapes differ.
    """
    own = module.state_dict()
    absent = [name for name in own if name not in weights and not name.startswith(missing)]
    surplus = [name for name in weights if name not in own]
    if absent or surplus:
        raise DoNotFit(f"weights without a counterpart: {', '.join([*absent, *surplus][:5])}")
    for name, found in weights.items():
        target = own[name]
        rows = min(len(target), len(found)) if "embed_tokens" in name or name == "weight" else len(found)
        if target[:rows].shape != found[:rows].shape or len(target) < rows:
            raise DoNotFit(f"{name} is {tuple(found.shape)}, the model needs {tuple(target.shape)}")
        target[:rows].copy_(found[:rows])


def save(model: Any, tower: Path, out: Path) -> None:
    """Weights and configuration, and the tower's tokenizer and processor as they are."""
    model.save_pretrained(out)
    for file in tower.iterdir():
        if file.name.startswith((*_PROCESSOR, *_PROCESSOR_MORE)):
            shutil.copy(file, out / file.name)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if the two do not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--language", type=Path, required=True, help="folder of a Qwen2(.5) checkpoint")
    parser.add_argument("--tower", type=Path, required=True, help="folder of a Qwen2.5-VL checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    parser.add_argument("--seed", type=int, default=0, help="of the projector")
    args = parser.parse_args(argv)
    try:
        model = combine(args.language, args.tower, args.seed)
    except (DoNotFit, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save(model, args.tower, args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
