"""Our requests in vLLM's terms, and vLLM's outputs in ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caprl_async.engine.types import Completion, Request, RequestFailed, Response
from caprl_async.types import Finish, Version, VersionSpan

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}
_AGAIN = ("abort", "error")  # ends that are not the request's fault


def prompt(llm: LLMEngine, request: Request, pictures: Sequence[Any] | None) -> Any:
    """vLLM's rendered input; `pictures` are the decoded ones of `request.image`, or None.

    Placeholders are expanded by vLLM. A picture's hash is its identity in every cache.
    """
    ids = list(request.prompt_token_ids)
    image = request.image
    if image is None:
        from vllm.inputs import tokens_input

        return tokens_input(ids)
    raw = {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": pictures},
        "multi_modal_uuids": {"image": [picture.sha256 for picture in image.pictures]},
    }
    return llm.renderer.render_cmpl([raw], llm.renderer.default_cmpl_tok_params)[0]


def params(request: Request) -> SamplingParams:
    """vLLM's sampling parameters; equal requests share one object, which vLLM copies."""
    return _params(
        request.n,
        request.temperature,
        request.max_tokens,
        request.min_tokens,
        request.seed,
        request.logprob_token_ids,
        request.want_logprobs,
    )


@functools.lru_cache(maxsize=256)
def _params(
    n: int,
    temperature: float,
    max_tokens: int,
    min_tokens: int,
    seed: int | None,
    logprob_token_ids: tuple[int, ...],
    want_logprobs: bool,
) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=seed,
        # 0: only the sampled token's own log-probability, beside those of logprob_token_ids.
        logprobs=0 if want_logprobs and not logprob_token_ids else None,
        logprob_token_ids=list(logprob_token_ids) or None,
        flat_logprobs=True,
        detokenize=False,  # text is decoded once, at the end
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # a shallow copy per request is enough: nothing inside is changed
    )


def response(request: Request, output: Any, tokenizer: Any) -> Response:
    """A finished `vllm.RequestOutput` as a Response, completions in the order of their index.

    Raises:
        RequestFailed: vLLM gave the request up, or the output lacks what was asked for.
    """
    ordered = sorted(output.outputs, key=lambda completion: completion.index)
    if [completion.index for completion in ordered] != list(range(request.n)):
        raise RequestFailed(f"vLLM returned {len(ordered)} of {request.n} completions")
    return Response(
        prompt_token_ids=tuple(output.prompt_token_ids),
        completions=tuple(_completion(request, completion, tokenizer) for completion in ordered),
        cached_tokens=output.num_cached_tokens or 0,
    )


def _completion(request: Request, completion: Any, tokenizer: Any) -> Completion:
    if completion.finish_reason not in _FINISH:
        reason = completion.finish_reason
        raise RequestFailed(f"vLLM ended the request: {reason}", again=reason in _AGAIN)
    ids = tuple(completion.token_ids)
    if completion.weight_versions is None:
        raise RequestFailed("vLLM did not say which weights sampled the tokens")
    found = completion.logprobs  # FlatLogprobs: for each position a slice, the sampled token first
    wanted = request.want_logprobs
    chosen = request.logprob_token_ids
    return Completion(
        text=tokenizer.decode(ids, skip_special_tokens=True),
        token_ids=ids,
        finish=_FINISH[completion.finish_reason],
        spans=tuple(
            VersionSpan(Version.parse(span.version), span.start, span.end)
            for span in completion.weight_versions
        ),
        logprobs=tuple(found.logprobs[start] for start in found.start_indices) if wanted else (),
        chosen_logprobs=_chosen(found, chosen) if chosen else {},
    )


def _chosen(found: Any, token_ids: tuple[int, ...]) -> dict[int, float]:
    """Log-probabilities of `token_ids` at the first generated position."""
    first = slice(found.start_indices[0], found.end_indices[0])
    by_id = dict(zip(found.token_ids[first], found.logprobs[first], strict=True))
    return {token: by_id[token] for token in token_ids}
