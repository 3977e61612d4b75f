"""A real vLLM engine takes updates over gloo and then says what transformers says with those weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from weights_kit import StubEngine

from caprl_async.tiny import models
from caprl_async.types import Version
from caprl_async.weights import register, sender
from caprl_async.weights.packed import pack
from caprl_async.weights.receiver import open_receiver, receive
from caprl_async.weights.sender import WeightSender
from caprl_async.weights.types import EngineDirty, TransferFailed

TOLERANCE = 2e-4  # float32 on both sides; only the order of summation differs
_ids = itertools.count()
_steps = itertools.count(1)


class Rig:
    """One engine, one sender, and the transformers model that says what is right."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
        from vllm import EngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine

        register()
        register()  # a second call is harmless
        args = EngineArgs(
            model=str(folder),
            dtype="float32",
            max_model_len=256,
            max_num_seqs=8,
            block_size=32,
            enforce_eager=True,
            enable_prefix_caching=True,
            limit_mm_per_prompt={"image": 1, "video": 0},
            distributed_executor_backend="uni",
            weight_transfer_config=WeightTransferConfig(backend="gloo"),
        )
        self.engine: Any = LLMEngine.from_engine_args(args)
        self.start = load_file(folder / "model.safetensors")
        self.oracle = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder)
        content = [{"type": "image"}, {"type": "text", "text": "describe the image " * 20}]
        self.prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        self.sender = WeightSender()
        self.open()

    def open(self) -> None:
        (self.info,) = self.sender.open(backend="gloo", epoch=next(_steps), sizes=[1], timeout_s=10.0)
        open_receiver(self.engine, self.info)

    def update(self, tensors: dict[str, Tensor]) -> tuple[Version, dict[str, float]]:
        version = Version(0, next(_steps))
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self.sender.send, version, tensors)
            timings = receive(self.engine, self.info, str(version))
            sent.result()
        return version, timings

    def changed(self, seed: int, part: str = "") -> dict[str, Tensor]:
        """The start weights with noise on the parameters whose name begins with `part`."""
        noise = torch.Generator().manual_seed(seed)
        return {
            name: t + 0.05 * torch.randn(t.shape, generator=noise) if name.startswith(part) else t
            for name, t in self.start.items()
        }

    def submit(self, image: Image.Image, n: int = 1, tokens: int = 8) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        names = [f"r{next(_ids)}" for _ in range(n)]
        for k, name in enumerate(names):
            params = SamplingParams(
                temperature=0.0 if n == 1 else 1.0,
                seed=k,
                max_tokens=tokens,
                ignore_eos=True,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = {"prompt": self.prompt, "multi_modal_data": {"image": image}}
            self.engine.add_request(name, prompt, params)
        return names

    def finish(self) -> dict[str, Any]:
        done = {}
        while self.engine.has_unfinished_requests():
            done.update({out.request_id: out for out in self.engine.step() if out.finished})
        return done

    def caption(self, image: Image.Image) -> Any:
        (name,) = self.submit(image)
        return self.finish()[name]

    @torch.no_grad()
    def right_logprobs(self, tensors: dict[str, Tensor], output: Any, image: Image.Image) -> Tensor:
        """log-probabilities float[T] of the output's tokens under `tensors`, by transformers."""
        oracle = (
            type(self.oracle)
            .from_pretrained(None, config=self.oracle.config, state_dict=dict(tensors), dtype=torch.float32)
            .eval()
        )
        tokens = list(output.outputs[0].token_ids)
        ids = torch.tensor([[*output.prompt_token_ids, *tokens]])
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")
        image_token = oracle.config.image_token_id
        logits = oracle(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image_token).int(),
            **pixels,
        ).logits[0, -len(tokens) - 1 : -1]
        return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def logprobs(output: Any) -> Tensor:
    """Those of the sampled tokens as the engine gave them, float[T]."""
    answer = output.outputs[0]
    return torch.tensor(
        [table[token].logprob for token, table in zip(answer.token_ids, answer.logprobs, strict=True)]
    )


def image(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).resize((112, 112), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    patch = pytest.MonkeyPatch()
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }.items():
        patch.setenv(key, value)
    torch.set_num_threads(2)
    folder = models.MODELS / "policy"
    if not (folder / "model.safetensors").exists():
        folder = tmp_path_factory.mktemp("policy") / "model"
        torch.manual_seed(0)
        models.save_model(models.new_policy(), folder, vision=True)
    rig = Rig(folder)
    yield rig
    rig.engine.engine_core.shutdown()
    patch.undo()


def test_after_an_update_the_engine_computes_with_the_new_weights(rig: Rig) -> None:
    new = rig.changed(1)
    version, seconds = rig.update(new)
    output = rig.caption(image(1))
    assert torch.allclose(logprobs(output), rig.right_logprobs(new, output, image(1)), atol=TOLERANCE)
    assert not torch.allclose(
        logprobs(output), rig.right_logprobs(rig.start, output, image(1)), atol=100 * TOLERANCE
    )
    assert [span.version for span in output.outputs[0].weight_versions] == [str(version)]
    assert seconds["total"] >= seconds["transfer"] > 0


def test_an_update_in_the_middle_of_generation_keeps_every_request(rig: Rig) -> None:
    old, new = rig.changed(2), rig.changed(3)
    first, _ = rig.update(old)
    names = rig.submit(image(2), n=6, tokens=40)
    for _ in range(15):
        rig.engine.step()
    second, _ = rig.update(new)
    done = rig.finish()
    assert sorted(done) == sorted(names)
    for output in done.values():
        spans = output.outputs[0].weight_versions
        assert [span.version for span in spans] == [str(first), str(second)]
        assert (spans[0].start, spans[0].end, spans[1].end) == (0, spans[1].start, 40)
        cut = spans[1].start
        for tensors, part in ((old, slice(0, cut)), (new, slice(cut, None))):
            right = rig.right_logprobs(tensors, output, image(2))
            assert torch.allclose(logprobs(output)[part], right[part], atol=TOLERANCE)


def test_nothing_computed_by_the_old_vision_tower_is_used_again(rig: Rig) -> None:
    rig.update(rig.start)
    before = [rig.caption(image(4)), rig.caption(image(4))]  # the second fills and uses the caches
    assert before[1].num_cached_tokens > 0
    blind = rig.changed(5, part="visual.")
    assert any(name.startswith("visual.") for name in blind)
    rig.update(blind)
    after = rig.caption(image(4))
    right = rig.right_logprobs(blind, after, image(4))
    assert torch.allclose(logprobs(after), right, atol=TOLERANCE)
    assert not torch.allclose(right, rig.right_logprobs(rig.start, after, image(4)), atol=100 * TOLERANCE)


def test_a_corrupted_transfer_leaves_the_old_version_at_work(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = rig.changed(6)
    version, _ = rig.update(good)

    def bad(tensors: Any) -> Any:
        manifest, buffer = pack(tensors)
        buffer[12345] += 1
        return manifest, buffer

    names = rig.submit(image(6), n=3, tokens=12)
    for _ in range(4):
        rig.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(sender, "pack", bad)
        with pytest.raises(TransferFailed, match="checksum"):
            rig.update(rig.changed(7))
    done = rig.finish()
    assert sorted(done) == sorted(names)
    for output in done.values():
        assert [span.version for span in output.outputs[0].weight_versions] == [str(version)]
        assert torch.allclose(logprobs(output), rig.right_logprobs(good, output, image(6)), atol=TOLERANCE)

    rig.open()  # a new group, and the next update goes through
    rig.update(rig.start)


def test_a_real_and_a_bare_receiver_share_one_group(rig: Rig) -> None:
    bare, tensors = StubEngine(), rig.changed(9)
    infos = rig.sender.open(backend="gloo", epoch=next(_steps), sizes=[1, 1], timeout_s=10.0)
    version = Version(0, next(_steps))
    with ThreadPoolExecutor(2) as pool:
        joined = pool.submit(open_receiver, bare, infos[1])
        open_receiver(rig.engine, infos[0])
        joined.result()
        calls = [
            pool.submit(rig.sender.send, version, tensors),
            pool.submit(receive, bare, infos[1], str(version)),
        ]
        receive(rig.engine, infos[0], str(version))
        for call in calls:
            call.result()
    rig.info = infos[0]
    assert all(torch.equal(bare.weights[name], tensor) for name, tensor in tensors.items())
    output = rig.caption(image(9))
    assert torch.allclose(logprobs(output), rig.right_logprobs(tensors, output, image(9)), atol=TOLERANCE)
    rig.open()


def test_a_snapshot_that_lacks_a_parameter_is_no_update(rig: Rig) -> None:
    lacking = dict(list(rig.changed(8).items())[:-1])
    with pytest.raises(EngineDirty, match="held no value for 1 parameters"):
        rig.update(lacking)
