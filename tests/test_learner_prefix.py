"""The shared prefix equals the repeated computation: log-probabilities, loss and every gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_kit import BANNED, IMAGE, captions_of, compute_in_float64, noise, tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers.integrations.flex_attention import WrappedFlexAttention

from caprl_async.config import LearnerConfig, Prefix
from caprl_async.learner.batch import BadBatch, TrainSequence
from caprl_async.learner.losses import policy_loss
from caprl_async.learner.model import SHARED_FAMILIES, PolicyModel, choose_prefix, collator
from caprl_async.learner.prefix import GroupSpan, Layout, attend, flex, mask_of

TEMPERATURE = 0.7
GRIDS = [(1, 4, 4), (1, 4, 8), (1, 8, 6)]

shapes = st.lists(
    st.tuples(
        st.lists(st.sampled_from(GRIDS), min_size=1, max_size=2),
        st.integers(1, 6),
        st.lists(st.integers(1, 12), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these get slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SHARED_FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patches:
        yield compute_in_float64(tiny_family(request.param), patches)


@functools.cache
def policy_of(model: Any, prefix: Prefix, checkpointing: bool = False) -> PolicyModel:
    model = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModel(model, BANNED, TEMPERATURE, 7, prefix).train(checkpointing)


def found(
    policy: PolicyModel, prefix: Prefix, sequences: list[TrainSequence], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities, entropies, loss and the gradient of every parameter."""
    tensors = collator(policy.hf, IMAGE, noise(dtype), prefix, dtype)(sequences)
    policy.zero_grad()
    logprobs, entropy = policy(tensors)
    config = LearnerConfig(entropy_coef=0.1)
    loss, _ = policy_loss(logprobs, entropy, tensors.behaviour, tensors.loss_tokens, config)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return logprobs.detach(), entropy.detach(), loss.detach(), grads


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    size = other.double().norm().item()
    return (one.double() - other.double()).norm().item() / size if size else one.double().norm().item()


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    far = {name: apart(one[name], other[name]) for name in one}
    assert all(distance <= tolerance for distance in far.values()), far


@given(shapes=shapes, seed=st.integers(0, 1000), checkpointing=st.booleans())
@settings(max_examples=30)
def test_float64_equals_the_repeated_computation(
    family: Any, shapes: Any, seed: int, checkpointing: bool
) -> None:
    sequences = captions_of(shapes, seed)
    shared = policy_of(family, Prefix.shared, checkpointing)
    one = found(shared, Prefix.shared, sequences, torch.float64)
    other = found(policy_of(family, Prefix.repeated), Prefix.repeated, sequences, torch.float64)
    for mine, plain in zip(one[:3], other[:3], strict=True):
        assert apart(mine, plain) <= 1e-9
    assert_near(one[3], other[3], 1e-9)


LOWER = [([(1, 4, 8)], 3, [9, 4, 12, 1]), ([(1, 4, 4), (1, 8, 6)], 2, [7, 7, 2])]


@pytest.mark.parametrize("kind", SHARED_FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_float32_equals_the_repeated_computation_too(kind: str, tied: bool) -> None:
    model = tiny_family(kind, tied=tied)
    sequences = captions_of(LOWER)
    one = found(policy_of(model, Prefix.shared), Prefix.shared, sequences, torch.float32)
    other = found(policy_of(model, Prefix.repeated), Prefix.repeated, sequences, torch.float32)
    assert ("hf.lm_head.weight" in one[3]) != tied
    assert apart(one[0], other[0]) <= 1e-6
    assert_near(one[3], other[3], 1e-5)


@pytest.mark.parametrize("kind", SHARED_FAMILIES)
def test_bfloat16_is_about_as_far_from_float32_as_the_repeated_computation(kind: str) -> None:
    rounded = tiny_family(kind).to(torch.bfloat16)
    exactly = copy.deepcopy(rounded).float()
    sequences = captions_of(LOWER)
    exact = found(policy_of(exactly, Prefix.repeated), Prefix.repeated, sequences, torch.float32)
    off = {}
    for prefix in Prefix:
        mine = found(policy_of(rounded, prefix), prefix, sequences, torch.bfloat16)
        off[prefix] = apart(mine[0], exact[0]), apart(_flat(mine[3]), _flat(exact[3]))
    # Two kernels round twice.
    assert off[Prefix.shared][0] <= 1.6 * off[Prefix.repeated][0] <= 0.02
    assert off[Prefix.shared][1] <= 1.6 * off[Prefix.repeated][1] <= 0.1


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


def test_sharing_without_checkpoints_of_activations_too(family: Any) -> None:
    sequences = captions_of([([GRIDS[2]], 3, [5, 6])])
    one = found(policy_of(family, Prefix.shared), Prefix.shared, sequences, torch.float64)
    other = found(policy_of(family, Prefix.shared, True), Prefix.shared, sequences, torch.float64)
    assert_near(one[3], other[3], 1e-9)


def test_a_family_equals_its_own_plain_forward(family: Any) -> None:
    """One caption alone, scored from the logits of transformers' forward of the whole model."""
    sequences = captions_of([([GRIDS[1], GRIDS[0]], 4, [6, 9]), ([GRIDS[2]], 2, [3])])
    logprobs = found(policy_of(family, Prefix.shared), Prefix.shared, sequences, torch.float64)[0]
    at = 0
    for s in sequences:
        ids = torch.tensor([s.prompt + s.caption])
        with torch.no_grad():
            logits = family(
                input_ids=ids,
                pixel_values=torch.cat(
                    [noise(torch.float64)(i, g) for i, g in zip(s.images, s.grids, strict=True)]
                ),
                image_grid_thw=torch.tensor(s.grids),
                mm_token_type_ids=(ids == IMAGE).int(),
            ).logits[0, len(s.prompt) - 1 : -1]
        logits[:, list(BANNED)] = -torch.inf
        plain = (logits / TEMPERATURE).log_softmax(-1)[range(len(s.caption)), list(s.caption)]
        assert apart(logprobs[at : at + len(s.caption)], plain) <= 1e-9
        at += len(s.caption)


def test_the_vision_tower_sees_an_image_once_though_two_groups_show_it(family: Any) -> None:
    first, second = captions_of([([GRIDS[0]], 3, [5]), ([GRIDS[0]], 2, [4])])
    second = replace(second, images=first.images)
    policy = policy_of(family, Prefix.shared)
    seen: list[int] = []
    hook = policy.hf.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    one = found(policy, Prefix.shared, [first, second], torch.float64)
    hook.remove()
    assert seen == [1]
    other = found(policy_of(family, Prefix.repeated), Prefix.repeated, [first, second], torch.float64)
    assert_near(one[3], other[3], 1e-9)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1)
)
@settings(max_examples=40)
def test_the_mask_of_a_gpu_means_the_same_as_the_kernels_of_a_cpu(rows: list[tuple[int, list[int]]]) -> None:
    layout = layout_of(rows)
    size = layout.length
    query, key, value = torch.randn(3, 1, 2, size, 8, dtype=torch.float64)
    mask = create_mask(mask_of(layout.owners()), 1, 1, size, size, device="cpu")
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    mine, _ = attend(torch.nn.Identity(), query, key, value, None, scaling=8**-0.5, layout=layout)
    torch.testing.assert_close(mine, expected.transpose(1, 2), atol=1e-12, rtol=0)
    for group in layout.groups:
        for start, end in group.captions:
            for at in range(start, end):
                allowed = [*range(group.start, group.prompt_end), *range(start, at + 1)]
                assert mask[0, 0, at].nonzero().flatten().tolist() == allowed


def layout_of(rows: list[tuple[int, list[int]]]) -> Layout:
    groups, at = [], 0
    for prompt, captions in rows:
        ends = [at + prompt + sum(captions[: i + 1]) for i in range(len(captions))]
        groups.append(GroupSpan(at, at + prompt, tuple(ends)))
        at = ends[-1]
    return Layout(tuple(groups))


def test_a_group_with_two_prompts_is_refused() -> None:
    first, second = captions_of([([GRIDS[0]], 3, [5, 4])])
    second = replace(second, prompt=second.prompt[:-1])
    model = tiny_family("qwen2_5_vl")
    with pytest.raises(BadBatch, match=r"0\[1\].*same group"):
        collator(model, IMAGE, noise(), Prefix.shared)([first, second])


@pytest.mark.parametrize("heads", [1, 3])
def test_flex_attention_of_a_gpu_equals_the_kernels_of_a_cpu(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, but not compiled: that would need a compiler here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    for rows in ([(3, [4, 5, 1]), (130, [7]), (1, [1])], [(40, [9, 30])], [(300, [20, 150, 64])]):
        layout = layout_of(rows)
        query = torch.randn(1, 2 * heads, layout.length, 16)
        key, value = torch.randn(2, 1, 2, layout.length, 16)
        expected, _ = attend(torch.nn.Identity(), query, key, value, None, scaling=0.3, layout=layout)
        with torch.no_grad():
            masked = layout.with_block_mask(torch.device("cpu"))
            mine = flex(torch.nn.Identity(), query, key, value, masked, 0.3)
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_another_family_is_trained_by_its_plain_forward() -> None:
    experts = tiny_family("qwen3_vl_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    prefix, notice = choose_prefix(experts, Prefix.shared)
    assert prefix is Prefix.repeated
    assert "qwen3_vl_moe" in notice
    sequences = captions_of([([GRIDS[0]], 3, [5, 9]), ([GRIDS[1], GRIDS[0]], 2, [4])])
    policy = policy_of(experts, prefix)
    together = found(policy, prefix, sequences, torch.float32)
    alone = [found(policy, prefix, [s], torch.float32) for s in sequences]
    torch.testing.assert_close(together[0], torch.cat([one[0] for one in alone]), atol=1e-5, rtol=0)
    assert_near(together[3], {n: sum(one[3][n] for one in alone) for n in together[3]}, 1e-5)


def test_what_cannot_share_repeats_and_says_so() -> None:
    windows = tiny_family("qwen2_5_vl", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    prefix, notice = choose_prefix(windows, Prefix.shared)
    assert prefix is Prefix.repeated
    assert "sliding" in notice
    sequences = captions_of([([GRIDS[0]], 3, [5, 9])])
    logprobs = found(policy_of(windows, prefix), prefix, sequences, torch.float32)[0]
    alone = [found(policy_of(windows, prefix), prefix, [s], torch.float32)[0] for s in sequences]
    torch.testing.assert_close(logprobs, torch.cat(alone), atol=1e-5, rtol=0)
    windows.config.model_type = "another_vl"
    assert "another_vl" in choose_prefix(windows, Prefix.shared)[1]
    assert choose_prefix(windows, Prefix.repeated) == (Prefix.repeated, "")
