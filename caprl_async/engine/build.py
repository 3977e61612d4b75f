"""How one vLLM engine is configured: the process's environment, then the arguments of the engine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caprl_async.config import EngineConfig

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

GIB = 1 << 30
_CPU_KV_GIB = 1.0


@dataclass(frozen=True)
class VisionLimits:
    """The pixel caps of the images an engine takes; the learner's processor has the same."""

    min_pixels: int
    max_pixels: int
    pictures: int = 1  # most that one prompt shows


@dataclass(frozen=True)
class EngineSpec:
    """All that decides what an engine computes."""

    model: str
    config: EngineConfig
    seed: int
    vision: VisionLimits | None = None  # None: text only
    weight_backend: str | None = None  # None: the weights are never updated
    banned_token_ids: tuple[int, ...] = ()
    logprobs_mode: str = "processed_logprobs"


def set_environment(config: EngineConfig) -> None:
    """Sets what vLLM reads from the environment while it is imported; call before that."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0" if config.in_process else "1",
        VLLM_USE_V2_MODEL_RUNNER="0",  # the ban is a logits processor of the V1 runner, on every device
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_HOST_IP="127.0.0.1",  # an engine lives on one node
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # takes whole GiB only and would override kv_cache_gib
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.enforce_eager:
        os.environ["TORCHDYNAMO_DISABLE"] = (
            "1"  # vLLM's sampler compiles a kernel even then: needs a compiler
        )
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)


def build(spec: EngineSpec) -> LLMEngine:
    """Builds the engine in the calling thread, which is the one that must step it.

    Raises:
        Exception: whatever vLLM raises for a missing model, too little memory or an impossible setting.
    """
    set_environment(spec.config)
    with _uncollected():
        import torch

        if spec.config.threads:
            torch.set_num_threads(spec.config.threads)  # before vLLM's CPU worker disables the function
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        args = EngineArgs(**_arguments(spec))
        return LLMEngine.from_engine_args(args, usage_context=UsageContext.ENGINE_CONTEXT)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage while 6,000 modules come in, which hold none: a quarter of the imports' time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _arguments(spec: EngineSpec) -> dict[str, Any]:
    config = spec.config
    args: dict[str, Any] = {
        "model": spec.model,
        "seed": spec.seed,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # the checkpoint's own sampling defaults (top_p, ...) must not creep in
        "logprobs_mode": spec.logprobs_mode,
        "worker_extension_cls": "caprl_async.engine.fingerprint.FingerprintWorker",
    }
    if config.block_size is not None:
        args["block_size"] = config.block_size
    if config.tensor_parallel_size > 1:
        # Within an actor vLLM would take Ray, and ask for the very GPUs that the actor holds.
        args["distributed_executor_backend"] = "mp"
    elif config.in_process:
        args["distributed_executor_backend"] = "uni"
    return {**args, **_for_platform(config), **_images(spec.vision), **_weights(spec), **_bans(spec)}


def _for_platform(config: EngineConfig) -> dict[str, Any]:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # After part of a prefill vLLM rewinds a seeded request's generator, which those of the CPU cannot do.
        return {**memory_arguments(config, on_cpu=True), "enable_chunked_prefill": False}
    return memory_arguments(config, on_cpu=False)


def memory_arguments(config: EngineConfig, *, on_cpu: bool) -> dict[str, Any]:
    """vLLM's arguments that say how much memory an engine takes.

    Left to itself vLLM measures on a GPU how much remains for keys and values, and counts whatever others
    take of it meanwhile: engines that start together on one GPU need `kv_cache_gib`.
    """
    arguments: dict[str, Any] = {}
    if not on_cpu:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    gib = _CPU_KV_GIB if on_cpu and config.kv_cache_gib is None else config.kv_cache_gib
    if gib is not None:
        arguments["kv_cache_memory_bytes"] = int(gib * GIB)
    return arguments


def _images(vision: VisionLimits | None) -> dict[str, Any]:
    if vision is None:
        return {}
    from caprl_async.data.processor import pixel_size

    return {
        "limit_mm_per_prompt": {"image": vision.pictures, "video": 0},
        "mm_processor_kwargs": {"size": pixel_size(vision.min_pixels, vision.max_pixels)},
        "mm_processor_cache_gb": 0,  # an image comes once per pass over the data: a cache would only grow
    }


def _weights(spec: EngineSpec) -> dict[str, Any]:
    if spec.weight_backend is None:
        return {}
    from vllm.config import WeightTransferConfig

    from caprl_async import weights

    weights.register()
    return {"weight_transfer_config": WeightTransferConfig(backend=spec.weight_backend)}


def _bans(spec: EngineSpec) -> dict[str, Any]:
    if not spec.banned_token_ids:
        return {}
    from caprl_async.engine.ban import KEY

    return {
        "logits_processors": ["caprl_async.engine.ban:BanTokens"],
        "additional_config": {KEY: list(spec.banned_token_ids)},
    }
