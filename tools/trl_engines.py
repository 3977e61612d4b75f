"""Generation alone for `tools/bench_trl.py`: transformers as TRL calls it, and vLLM as the ring does.

`python tools/trl_engines.py SPEC OUT`: SPEC and OUT are JSON files. The captioner's start weights caption
the same images, a batch at a time; the first batch warms up.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_side import banned, decoded, load_config, train_rows

from caprl_async.config import Config
from caprl_async.data.images import ImageStore
from caprl_async.data.processor import PolicyProcessor, pixel_size
from caprl_async.data.rows import Row
from caprl_async.engine.build import VisionLimits
from caprl_async.engine.engine import Engine
from caprl_async.engine.types import Request, Response

Measured = tuple[float, list[int]]  # seconds of a batch, tokens of each caption


def engines(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one batch, and tokens per caption, of both."""
    import torch

    config = load_config(spec)
    torch.set_num_threads(spec["threads"])
    config.rollout.engine.threads = spec["threads"]
    rows = train_rows(config)[: config.replay.batch_groups * (1 + spec["rounds"])]
    batches = [rows[i :: 1 + spec["rounds"]] for i in range(1 + spec["rounds"])]  # the first warms up
    found = {"transformers": _transformers(config, batches)}  # first: vLLM changes torch's threads
    return {**found, "vllm": _vllm(config, batches)}


def _means(measured: Sequence[Measured]) -> dict[str, float]:
    kept = measured[1:]
    lengths = [length for _, mine in kept for length in mine]
    return {
        "seconds": sum(seconds for seconds, _ in kept) / len(kept),
        "tokens_per_caption": sum(lengths) / len(lengths),
    }


def _transformers(config: Config, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    model = AutoModelForImageTextToText.from_pretrained(config.policy.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(config.policy.model)
    processor.image_processor.size = pixel_size(config.policy.min_pixels, config.policy.max_pixels)
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=config.rollout.max_tokens,
        do_sample=True,
        temperature=config.rollout.temperature,
        top_k=0,
        eos_token_id=end,
        pad_token_id=pad,
        disable_compile=True,
        **banned(config, use_vllm=False),
    )

    def batch(rows: Sequence[Row]) -> Measured:
        images = [decoded(row) for row in rows for _ in range(config.rollout.group_size)]
        text = {"type": "text", "text": config.data.prompt}
        turns = [[{"role": "user", "content": [{"type": "image", "image": i}, text]}] for i in images]
        begun = time.perf_counter()
        asked = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**asked, generation_config=settings)[:, asked["input_ids"].shape[1] :]
        seconds = time.perf_counter() - begun
        return seconds, [caption_length(row, end) for row in ids.tolist()]

    return _means([batch(rows) for rows in batches])


def caption_length(ids: Sequence[int], end: int) -> int:
    """Tokens up to the end, which counts; all of them if it does not end."""
    return ids.index(end) + 1 if end in ids else len(ids)


def _vllm(config: Config, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    policy, rollout = config.policy, config.rollout
    processor = PolicyProcessor(policy.model, policy.min_pixels, policy.max_pixels)
    engine = Engine(
        policy.model,
        rollout.engine,
        seed=config.seed,
        vision=VisionLimits(policy.min_pixels, policy.max_pixels),
        banned_token_ids=processor.banned_token_ids,
    )

    async def batch(rows: Sequence[Row], store: ImageStore) -> Measured:
        images = [store.put(row.image) for row in rows]
        ids = processor.prompt_ids(config.data.prompt)
        n, temperature, longest = rollout.group_size, rollout.temperature, rollout.max_tokens
        asked = [Request(ids, image, n, temperature, longest, want_logprobs=True) for image in images]
        begun = time.perf_counter()
        answers = await engine.generate_many(asked)
        seconds = time.perf_counter() - begun
        responses = [answer for answer in answers if isinstance(answer, Response)]
        return seconds, [len(one.token_ids) for response in responses for one in response.completions]

    with tempfile.TemporaryDirectory() as folder:
        store = ImageStore(folder)
        measured = [asyncio.run(batch(rows, store)) for rows in batches]
    engine.close()
    return _means(measured)


def main() -> None:
    spec_path, out_path = sys.argv[1:]
    Path(out_path).write_text(json.dumps(engines(json.loads(Path(spec_path).read_text()))))


if __name__ == "__main__":
    main()
