"""One real vLLM engine with the tiny policy: what it returns is what transformers computes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import MAX_PIXELS, MIN_PIXELS, PROMPT, noise_image, tiny_engine, tiny_model

from caprl_async.data.processor import PolicyProcessor, read_image
from caprl_async.engine import translate
from caprl_async.engine.engine import Engine, VisionLimits
from caprl_async.engine.types import EngineDied, Request, RequestFailed, Response
from caprl_async.types import Frame, ImageRef, Version

# float32 on both sides: what is left is the order of summation in two attention kernels.
TOLERANCE = 1e-4
SIZES = [(112, 112), (37, 91), (300, 77), (113, 500), (29, 640), (641, 479)]


class Rig:
    """An engine, its processor, and the same weights in plain transformers."""

    def __init__(self, model: str) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.model = model
        self.processor = PolicyProcessor(model, MIN_PIXELS, MAX_PIXELS)
        self.engine = Engine(
            model,
            tiny_engine(),
            seed=0,
            vision=VisionLimits(MIN_PIXELS, MAX_PIXELS, pictures=3),
            banned_token_ids=self.processor.banned_token_ids,
        )
        self.oracle = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()

    def request(self, image: ImageRef, **changes: Any) -> Request:
        return Request(self.processor.prompt_ids(PROMPT, image.times), image=image, **changes)

    @torch.no_grad()
    def logprobs(
        self, image: ImageRef, prompt: tuple[int, ...], ids: tuple[int, ...], t: float
    ) -> torch.Tensor:
        """[len(ids), vocabulary] of transformers, under the ban and at temperature t."""
        shown = [self.processor.pixels(picture) for picture in image.pictures]
        tokens = torch.tensor([[*prompt, *ids]])
        logits = self.oracle(
            input_ids=tokens,
            mm_token_type_ids=(tokens == self.processor.image_token_id).int(),
            pixel_values=torch.cat([pixels.pixel_values for pixels in shown]),
            image_grid_thw=torch.tensor([pixels.grid for pixels in shown]),
        ).logits[0, len(prompt) - 1 : -1]
        logits[:, list(self.processor.banned_token_ids)] = -math.inf
        return (logits / t).log_softmax(-1)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tiny_model("policy", tmp_path_factory.mktemp("model")))
    yield rig
    rig.engine.close()


@pytest.fixture
def image(tmp_path: Path) -> ImageRef:
    return noise_image(tmp_path, 112, 112)


def ask(rig: Rig, *requests: Request) -> list[Response | RequestFailed]:
    return asyncio.run(rig.engine.generate_many(requests))


def ask_one(rig: Rig, request: Request) -> Response:
    return asyncio.run(rig.engine.generate(request))


@pytest.mark.parametrize("size", SIZES)
def test_engine_and_learner_see_the_same_pixels(rig: Rig, tmp_path: Path, size: tuple[int, int]) -> None:
    image = noise_image(tmp_path, *size)
    request = rig.request(image)
    seen = asyncio.run(rig.engine.call(lambda llm: translate.prompt(llm, request, [read_image(image)])))
    (item,) = seen["mm_kwargs"]["image"]
    ours = rig.processor.pixels(image)
    assert tuple(item["image_grid_thw"].data.flatten().tolist()) == ours.grid == rig.processor.grid(*size)
    # vLLM keeps bytes and normalises inside the model; ours, put back into bytes, must be the same ones.
    channels = ours.pixel_values.unflatten(1, (3, -1))  # [patches, RGB, ...]
    own = rig.processor._processor.image_processor
    mean, std = (torch.tensor(values)[:, None] for values in (own.image_mean, own.image_std))
    as_bytes = ((channels * std + mean) * 255).round().flatten(1).to(torch.uint8)
    assert torch.equal(item["pixel_values"].data, as_bytes)
    expanded = seen["prompt_token_ids"].count(rig.processor.image_token_id)
    assert expanded == rig.processor.image_tokens(ours.grid)


def test_a_video_is_captioned_from_its_frames_in_their_order(rig: Rig, tmp_path: Path) -> None:
    stills = [noise_image(tmp_path, *size) for size in ((112, 112), (56, 84), (112, 56))]
    frames = tuple(Frame(sha256=s.sha256, path=s.path, time=61.5 * k) for k, s in enumerate(stills))
    video = ImageRef(sha256="v", path=stills[0].path, frames=frames)
    answer = ask_one(rig, rig.request(video, n=2, max_tokens=12, want_logprobs=True))
    grids = [rig.processor.pixels(still).grid for still in stills]
    expected = rig.processor.expanded(rig.processor.prompt_ids(PROMPT, video.times), grids)
    assert answer.prompt_token_ids == expected
    for completion in answer.completions:
        right = rig.logprobs(video, answer.prompt_token_ids, completion.token_ids, 1.0)
        own = right.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.tensor(completion.logprobs) == pytest.approx(own, abs=TOLERANCE)


def test_a_request_whose_pixels_were_cached_survives_a_reset(rig: Rig, tmp_path: Path) -> None:
    stills = [noise_image(tmp_path, *size) for size in ((112, 112), (84, 112), (112, 84))]
    frames = tuple(Frame(sha256=s.sha256, path=s.path, time=float(k)) for k, s in enumerate(stills))
    video = ImageRef(sha256="w", path=stills[0].path, frames=frames)
    ask_one(rig, rig.request(video, max_tokens=1))  # its prompt is in the prefix cache from now on

    def forget(llm: Any) -> None:
        assert llm.has_unfinished_requests()
        assert llm.reset_prefix_cache(reset_running_requests=True)
        llm.reset_mm_cache()
        llm.reset_encoder_cache()

    async def reset_in_the_middle() -> Response:
        request = rig.request(video, n=2, max_tokens=120, min_tokens=120, want_logprobs=True)
        going = asyncio.create_task(rig.engine.generate(request))
        while rig.engine.stats().running == 0:
            await asyncio.sleep(0.001)
        await rig.engine.call(forget)
        return await going

    answer = asyncio.run(reset_in_the_middle())
    for completion in answer.completions:
        right = rig.logprobs(video, answer.prompt_token_ids, completion.token_ids, 1.0)
        right[:, rig.processor.eos_token_id] = -math.inf  # min_tokens
        right = right.log_softmax(-1)
        own = right.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.tensor(completion.logprobs) == pytest.approx(own, abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_behaviour_log_probabilities_are_those_of_transformers(
    rig: Rig, image: ImageRef, temperature: float
) -> None:
    answer = ask_one(rig, rig.request(image, n=4, temperature=temperature, max_tokens=30, want_logprobs=True))
    for completion in answer.completions:
        right = rig.logprobs(image, answer.prompt_token_ids, completion.token_ids, temperature)
        own = right.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.tensor(completion.logprobs) == pytest.approx(own, abs=TOLERANCE)


def test_banned_tokens_are_impossible(rig: Rig, image: ImageRef) -> None:
    banned = rig.processor.banned_token_ids
    first = ask_one(rig, rig.request(image, max_tokens=1, logprob_token_ids=banned))
    assert set(first.completions[0].chosen_logprobs.values()) == {-math.inf}
    wild = ask_one(rig, rig.request(image, n=32, temperature=2.0, max_tokens=20))
    sampled = {token for completion in wild.completions for token in completion.token_ids}
    assert not sampled & set(banned)


def test_chosen_log_probabilities_are_those_of_the_first_position(rig: Rig, image: ImageRef) -> None:
    allowed = [i for i in range(rig.processor.vocab_size) if i not in rig.processor.banned_token_ids]
    wanted = tuple(allowed[::10])
    answer = ask_one(rig, rig.request(image, temperature=0.5, max_tokens=1, logprob_token_ids=wanted))
    (completion,) = answer.completions
    assert tuple(completion.chosen_logprobs) == wanted
    right = rig.logprobs(image, answer.prompt_token_ids, completion.token_ids, 0.5)[0, list(wanted)]
    assert list(completion.chosen_logprobs.values()) == pytest.approx(right.tolist(), abs=TOLERANCE)


def test_all_completions_come_back_with_text_and_versions(rig: Rig, image: ImageRef) -> None:
    answer = ask_one(rig, rig.request(image, n=8, temperature=2.0, max_tokens=12, min_tokens=12))
    assert len({completion.token_ids for completion in answer.completions}) == 8
    for completion in answer.completions:
        assert len(completion.token_ids) == 12
        assert completion.text == rig.processor.tokenizer.decode(
            completion.token_ids, skip_special_tokens=True
        )
        assert [(s.version, s.start, s.end) for s in completion.spans] == [(rig.engine.version, 0, 12)]


def test_a_seed_repeats_and_its_completions_differ(rig: Rig, image: ImageRef) -> None:
    request = rig.request(image, n=3, temperature=2.0, max_tokens=8, min_tokens=8, seed=7)
    once, again = ask_one(rig, request), ask_one(rig, request)
    assert [c.token_ids for c in once.completions] == [c.token_ids for c in again.completions]
    assert len({c.token_ids for c in once.completions}) == 3


def test_one_bad_request_harms_no_other(rig: Rig, image: ImageRef, tmp_path: Path) -> None:
    long = Request(tuple([rig.processor.eos_token_id] * 300), max_tokens=2)
    gone = rig.request(ImageRef(sha256="0" * 64, path=str(tmp_path / "gone.png")), max_tokens=2)
    good = rig.request(image, max_tokens=2)
    first, second, third = ask(rig, long, gone, good)
    assert isinstance(first, RequestFailed)
    assert "300" in str(first)
    assert isinstance(second, RequestFailed)
    assert "gone.png" in str(second)
    assert isinstance(third, Response)
    with pytest.raises(RequestFailed):
        ask_one(rig, long)


def test_cancelling_aborts_in_the_engine(rig: Rig, image: ImageRef) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(
            rig.engine.generate(rig.request(image, n=4, max_tokens=200, min_tokens=200))
        )
        while rig.engine.stats().running == 0 and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = await rig.engine.call(lambda llm: llm.get_num_unfinished_requests())
        assert left == rig.engine.stats().running == 0

    asyncio.run(scenario())


def test_a_version_set_in_flight_splits_the_spans(rig: Rig, image: ImageRef) -> None:
    before, after = rig.engine.version, Version(0, rig.engine.version.step + 1)

    async def scenario() -> Response:
        request = rig.request(image, n=2, max_tokens=150, min_tokens=150)
        task = asyncio.create_task(rig.engine.generate(request))
        while rig.engine.stats().running == 0 and not task.done():
            await asyncio.sleep(0)
        for _ in range(5):  # each is answered between two steps
            await rig.engine.call(lambda llm: None)
        await rig.engine.set_version(after)
        return await task

    answer = asyncio.run(scenario())
    assert rig.engine.version == after
    for completion in answer.completions:
        first, second = completion.spans
        assert (first.version, second.version) == (before, after)
        assert first.start == 0
        assert 0 < first.end == second.start < second.end == 150


def test_an_error_in_a_call_reaches_only_its_caller(rig: Rig, image: ImageRef) -> None:
    def broken(llm: Any) -> None:
        raise LookupError("no such thing")

    with pytest.raises(LookupError):
        asyncio.run(rig.engine.call(broken))
    assert ask_one(rig, rig.request(image, max_tokens=1)).completions


def test_fingerprint_is_that_of_the_checkpoint(rig: Rig) -> None:
    from safetensors.torch import load_file

    from caprl_async.engine.fingerprint import digest, fingerprint

    found = asyncio.run(rig.engine.call(lambda llm: fingerprint(llm, rig.model)))
    assert found == {name: digest(t) for name, t in load_file(f"{rig.model}/model.safetensors").items()}


def test_counters_grow_and_shared_prompts_are_cached(rig: Rig, tmp_path: Path) -> None:
    image = noise_image(tmp_path, 220, 220, seed=5)
    before = rig.engine.stats()
    ask_one(rig, rig.request(image, max_tokens=2, min_tokens=2))
    ask_one(rig, rig.request(image, max_tokens=2, min_tokens=2))
    after = rig.engine.stats()
    assert after.sampled_tokens - before.sampled_tokens == 4
    assert after.cached_tokens - before.cached_tokens >= 32
    assert 0 < after.busy_s - before.busy_s <= after.alive_s - before.alive_s


def test_a_dead_engine_fails_all_and_says_so(tmp_path: Path) -> None:
    engine = Engine(tiny_model("judge", tmp_path), tiny_engine(), seed=0)

    async def scenario() -> None:
        def sabotage(llm: Any) -> None:
            def step() -> None:
                raise MemoryError("out of memory")

            llm.step = step

        good = Request((9, 10, 11), max_tokens=3)
        assert (await engine.generate(good)).completions
        await engine.call(sabotage)
        with pytest.raises(EngineDied, match="out of memory"):
            await asyncio.gather(*(engine.generate(good) for _ in range(3)))
        with pytest.raises(EngineDied):
            await engine.generate(good)
        with pytest.raises(EngineDied):
            await engine.call(lambda llm: None)

    asyncio.run(scenario())
    assert engine.died is not None
    engine.close()


def test_a_missing_model_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(EngineDied, match="nowhere"):
        Engine(str(tmp_path / "nowhere"), tiny_engine(), seed=0)
