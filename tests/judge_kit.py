"""What the judge's tests share: a random tiny model, an engine computed by plain transformers, questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caprl_async.config import JudgeConfig, JudgeMode, JudgePromptConfig
from caprl_async.engine.engine import EngineStats
from caprl_async.engine.types import Completion, EngineDied, Request, RequestFailed, Response
from caprl_async.tiny.tokenizer import CHAT_TEMPLATE
from caprl_async.types import Finish, Question

PROMPT = JudgePromptConfig(
    instruction="",
    caption="caption : {caption}",
    question="question : {question}\n{options}",
    option="{letter} ) {text} ",
    prefill="the answer is",
    answer_space=False,
    abstain="unknown",
)
CAPTION = "topleft red circle ."
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def question(
    choices: Sequence[str] = ("red", "blue"),
    answer: int | None = 0,
    name: str = "q",
    stem: str = "what color is topleft ?",
) -> Question:
    return Question(question_id=name, stem=stem, choices=tuple(choices), answer=answer)


def save_random_judge(folder: Path) -> Path:
    """An untrained judge whose answers are far from uniform."""
    from caprl_async.tiny.models import new_judge, save_model

    torch.manual_seed(0)
    model = new_judge(width=64, layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    save_model(model, folder, vision=False)
    return folder


def judge_config(folder: Path, mode: JudgeMode = JudgeMode.expected, **values: Any) -> JudgeConfig:
    config = JudgeConfig(model=str(folder), mode=mode, prompt=PROMPT, **values)
    config.engine.max_model_len = 512
    return config


def byte_level() -> Any:
    """A byte-level BPE as real judges have, with an added token that is not marked special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = " ".join(" " + chr(code) for code in range(ord("A"), ord("Z") + 1))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([f" the answer is {letters} red green According to"] * 10, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


class ReferenceEngine:
    """Answers requests by whole forward passes; remembers each prefix's logits."""

    def __init__(self, folder: Path, longest_answer: int = 2, end: int = 2) -> None:
        from transformers import Qwen2ForCausalLM

        torch.set_num_threads(1)
        self.model = Qwen2ForCausalLM.from_pretrained(folder).eval()
        self.requests: list[Request] = []
        self.died: EngineDied | None = None
        self._longest = longest_answer
        self._end = end
        self._logits: dict[tuple[int, ...], np.ndarray] = {}

    def logprobs(self, ids: tuple[int, ...], temperature: float) -> np.ndarray:
        """Of the next token over the vocabulary: log softmax(logits / temperature)."""
        if ids not in self._logits:
            with torch.no_grad():
                self._logits[ids] = self.model(torch.tensor([ids])).logits[0, -1].double().numpy()
        scaled = self._logits[ids] / temperature
        return scaled - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum())

    async def generate_many(self, requests: Sequence[Request]) -> list[Response | RequestFailed]:
        if self.died is not None:
            raise self.died
        self.requests += requests
        return [self._answer(request) for request in requests]

    def stats(self) -> EngineStats:
        prompts = sum(len(request.prompt_token_ids) for request in self.requests)
        return EngineStats(1.0, 2.0, len(self.requests), prompts, 0, 0, 0)

    def close(self) -> None:
        pass

    def _answer(self, request: Request) -> Response:
        assert request.image is None
        rng = np.random.default_rng(request.seed)
        first = self.logprobs(request.prompt_token_ids, request.temperature)
        ids: tuple[int, ...] = ()
        while len(ids) < min(request.max_tokens, self._longest) and self._end not in ids:
            weights = np.exp(self.logprobs((*request.prompt_token_ids, *ids), request.temperature))
            ids = (*ids, int(rng.choice(len(weights), p=weights / weights.sum())))
        chosen = {token: float(first[token]) for token in request.logprob_token_ids}
        finish = Finish.STOP if self._end in ids else Finish.LENGTH
        done = Completion(text="", token_ids=ids, finish=finish, spans=(), chosen_logprobs=chosen)
        return Response(prompt_token_ids=request.prompt_token_ids, completions=(done,), cached_tokens=0)
