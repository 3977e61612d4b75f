"""What becomes of an engine's response before the learner may rely on it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_async.engine.types import Completion, Request, Response
from caprl_async.rollout import sampling
from caprl_async.rollout.sampling import BadSample
from caprl_async.types import Finish, ImageRef, Prompt, Sampling, Version, VersionSpan

IMAGE, END = 6, 2


class FourTokens:
    """Stands for a processor whose every image takes four visual tokens."""

    image_token_id = IMAGE
    banned_token_ids = (0, 1, IMAGE)

    def prompt_ids(self, text: str, times: tuple[float, ...] = ()) -> tuple[int, ...]:
        return (1, 3, IMAGE, 4, *(10 + len(word) for word in text.split()), 1)

    def expanded(self, prompt: tuple[int, ...], grids: tuple[tuple[int, int, int], ...]) -> tuple[int, ...]:
        at = prompt.index(IMAGE)
        return (*prompt[:at], *[IMAGE] * (math.prod(grids[0]) // 4), *prompt[at + 1 :])


PROCESSOR = FourTokens()
GRID = (1, 4, 4)
PROMPT = Prompt(
    key="train/3",
    index=3,
    attempt=1,
    row_id="row",
    image=ImageRef(sha256="ab", path="/images/ab"),
    text="describe it",
    sampling=Sampling(n=2, temperature=0.9, max_tokens=5, seed=11),
)


def completion(ids: tuple[int, ...] = (20, 21, END), version: Version = Version(0, 4)) -> Completion:  # noqa: B008
    return Completion(
        text=" a caption ",
        token_ids=ids,
        finish=Finish.STOP,
        spans=(VersionSpan(version, 0, len(ids)),),
        logprobs=tuple(-0.5 for _ in ids),
    )


def answer(*completions: Completion, visual: int = 4) -> Response:
    ids = PROCESSOR.prompt_ids(PROMPT.text)
    at = ids.index(IMAGE)
    return Response((*ids[:at], *[IMAGE] * visual, *ids[at + 1 :]), completions, cached_tokens=0)


def group(response: Response):
    asked = sampling.request(PROMPT, PROCESSOR)
    return sampling.caption_group(
        PROMPT, asked, response, (GRID,), PROCESSOR, actor="rollout-0", started=1.0, finished=2.0
    )


def test_request_asks_for_the_group_with_log_probabilities() -> None:
    asked = sampling.request(PROMPT, PROCESSOR)
    assert (asked.n, asked.temperature, asked.max_tokens) == (2, 0.9, 5)
    assert asked.want_logprobs
    assert asked.image == PROMPT.image
    assert asked.prompt_token_ids.count(IMAGE) == 1


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=2, unique=True), st.integers(1, 64))
def test_seeds_of_two_prompts_share_no_completion_seed(seeds: list[int], n: int) -> None:
    def drawn(seed: int) -> set[int]:
        import msgspec

        own = msgspec.structs.replace(
            PROMPT, sampling=msgspec.structs.replace(PROMPT.sampling, seed=seed, n=n)
        )
        first = sampling.request(own, PROCESSOR).seed
        assert first is not None
        return set(range(first, first + n))  # how vLLM seeds the n completions

    assert not drawn(seeds[0]) & drawn(seeds[1])


def test_group_carries_what_the_engine_made() -> None:
    old, new = Version(0, 4), Version(0, 5)
    mixed = replace(completion(), spans=(VersionSpan(old, 0, 1), VersionSpan(new, 1, 3)))
    made = group(answer(completion(version=new), mixed))
    assert (made.key, made.attempt, made.image_sha256, made.image_grid) == ("train/3", 1, "ab", (GRID,))
    assert made.prompt_token_ids.count(IMAGE) == 4
    assert made.captions[0].text == "a caption"
    assert made.captions[1].token_ids == mixed.token_ids
    assert made.captions[1].spans == mixed.spans
    assert made.oldest == old


@pytest.mark.parametrize("visual", [0, 1, 3, 8])
def test_an_image_of_another_size_is_refused(visual: int) -> None:
    with pytest.raises(BadSample, match="visual"):
        group(answer(completion(), completion(), visual=visual))


def test_a_missing_completion_is_refused() -> None:
    with pytest.raises(BadSample, match="asked for 2"):
        group(answer(completion()))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (completion(ids=()), "without tokens"),
        (completion(ids=(20, IMAGE)), "banned"),
        (replace(completion(), logprobs=(-1.0,)), "1 log-probabilities for 3"),
        (replace(completion(), logprobs=(-1.0, math.nan, -1.0)), "finite"),
        (replace(completion(), logprobs=(-1.0, -math.inf, -1.0)), "finite"),
        (replace(completion(), spans=(VersionSpan(Version(0, 1), 0, 2),)), "cover"),
        (replace(completion(), spans=(VersionSpan(Version(0, 1), 1, 3),)), "cover"),
        (replace(completion(), spans=()), "cover"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_refused(broken: Completion, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        group(answer(completion(), broken))


def test_a_request_is_not_changed_by_its_check() -> None:
    asked = Request((1, IMAGE, 2))
    expected = PROCESSOR.expanded(asked.prompt_token_ids, ((1, 2, 4),))
    sampling.check_prompt(expected, Response((1, IMAGE, IMAGE, 2), (), 0), IMAGE)
    assert asked == Request((1, IMAGE, 2))
