"""The prompt of the tiny judges, as the ring's own prompter renders it."""

from __future__ import annotations

import functools

from caprl_async.config import JudgePromptConfig
from caprl_async.judge.prompt import JudgePrompter
from caprl_async.tiny.grammar import UNKNOWN
from caprl_async.tiny.tokenizer import tokenizer


def judge_prompt_config() -> JudgePromptConfig:
    """The words around caption and question that the tiny judges are trained with."""
    return JudgePromptConfig(
        instruction="",
        caption="caption : {caption}",
        question="question : {question}\n{options}",
        option="{letter} ) {text} ",
        prefill="the answer is",
        answer_space=True,  # a word-level tokenizer parts words at spaces
        abstain=UNKNOWN,
    )


@functools.cache
def prompter() -> JudgePrompter:
    """Shared by training and measuring."""
    return JudgePrompter(tokenizer(), judge_prompt_config())
