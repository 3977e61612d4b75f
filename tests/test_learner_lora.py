"""Adapters on the tiny policy: which layers have them, what they make with the base, and peft's own view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_kit import POLICY, tiny_config
from peft import PeftModel

from caprl_async.config import LoRAConfig
from caprl_async.learner.lora import (
    adapter_weights,
    adapters_off,
    add_adapters,
    dithered,
    merged_weights,
    save_adapter,
)
from caprl_async.learner.model import BadModel, checkpoint_activations, load_policy

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(dtype: str = "float32", **lora: Any) -> Any:
    """The policy with adapters that do something."""
    torch.manual_seed(0)
    model = load_policy(POLICY, dtype).eval()
    add_adapters(model, LoRAConfig(**{"rank": 4, "alpha": 6, **lora}))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def layers(model: Any) -> set[str]:
    """Names of the adapted layers."""
    return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 60)[None]).logits


def test_all_linear_layers_of_the_language_model_are_adapted_and_nothing_else_is_trained() -> None:
    model = adapted()
    found = layers(model)
    assert {name.rpartition(".")[2] for name in found} == LINEAR
    assert len(found) == len(LINEAR) * model.config.get_text_config().num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in found)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{side}.default.weight" for name in found for side in "AB"}


def test_targets_are_endings_of_names() -> None:
    found = layers(adapted(targets=["q_proj", "1.mlp.up_proj"]))
    assert {name.rpartition("layers.")[2] for name in found} >= {"0.self_attn.q_proj", "1.mlp.up_proj"}
    assert all(name.endswith(("q_proj", "layers.1.mlp.up_proj")) for name in found)


@pytest.mark.parametrize("target", ["qkv", "lm_head", "proj", "norm"])
def test_a_target_that_is_no_linear_layer_of_the_language_model_is_named(target: str) -> None:
    with pytest.raises(BadModel, match=rf"learner\.lora\.targets.* in {target}; there are down_proj"):
        adapted(targets=["q_proj", target])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_those_of_peft(tmp_path: Path, dtype: str) -> None:
    model = adapted(dtype)
    ours = {weight.name: weight.value() for weight in merged_weights(model)}
    start = load_policy(POLICY, dtype)
    assert list(ours) == [name for name, _ in start.named_parameters()]
    save_adapter(model, {w.name: w.value() for w in adapter_weights(model)}, tmp_path)
    merged = PeftModel.from_pretrained(load_policy(POLICY, dtype), tmp_path).merge_and_unload()
    for name, theirs in merged.named_parameters():
        assert ours[name].dtype == theirs.dtype
        atol = 1e-6 if dtype == "float32" else 2**-7 * theirs.abs().max().item()
        torch.testing.assert_close(ours[name], theirs.detach(), atol=atol, rtol=0, msg=name)
    changed = {name for name, p in start.named_parameters() if not torch.equal(p, ours[name])}
    assert changed == {f"{name}.weight" for name in layers(model)}


def test_a_plain_model_is_its_own_merged_weights() -> None:
    model = load_policy(POLICY, "float32")
    named = dict(model.named_parameters())
    merged = {weight.name: weight.value() for weight in merged_weights(model)}
    assert merged.keys() == named.keys()
    assert all(torch.equal(merged[name], named[name]) for name in named)
    assert all(merged[name].data_ptr() != named[name].data_ptr() for name in named)


def test_without_its_adapters_the_model_is_the_base() -> None:
    model, base = adapted(), load_policy(POLICY, "float32").eval()
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
    with_them = logits(model)
    assert (with_them - logits(base)).abs().max() > 0.1
    base.load_state_dict({weight.name: weight.value() for weight in merged_weights(model)}, strict=False)
    torch.testing.assert_close(logits(base), with_them, atol=1e-4, rtol=0)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(layers(model))


def test_small_adapters_reach_engines_in_bfloat16() -> None:
    """Rounded to the nearest they would not: they add far less than a step of the grid."""
    model = adapted("bfloat16")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, mean=1e-4, std=1e-5)
    state = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    for weight in merged_weights(model):
        if weight.adapter is None or weight.base.shape[1] != 128:
            continue
        down, up = (part.float() for part in weight.adapter)
        added = state @ (weight.scale * up @ down).T
        merged = state @ (weight.value().float() - weight.base.float()).T
        nearest = (weight.base.float() + weight.scale * up @ down).bfloat16().float() - weight.base.float()
        along = (merged * added).sum() / added.square().sum()
        assert 0.8 < along < 1.2
        assert (state @ nearest.T * added).sum() / added.square().sum() < 0.5
        assert torch.equal(weight.value(), weight.value())


def test_dithering_keeps_the_mean_and_what_is_on_the_grid() -> None:
    grid = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(dithered(grid, 7), grid)
    step = grid.abs() * 2**-9  # a quarter to half of a step
    moved = dithered(grid + step, 7) - grid
    assert (moved.sum() / step.sum()).item() == pytest.approx(1, abs=0.02)
    assert torch.equal(dithered(grid + step, 7).bfloat16().float(), dithered(grid + step, 7))


def test_a_frozen_tower_gets_no_gradient_though_activations_are_checkpointed() -> None:
    """transformers makes the output of each embedding need one when checkpointing is enabled."""
    config = tiny_config(freeze_vision=True, gradient_checkpointing=True)
    model = load_policy(POLICY, "float32")
    model.model.visual.requires_grad_(False)
    checkpoint_activations(model, config.learner)
    seen: list[bool] = []
    model.model.visual.register_forward_hook(
        lambda module, args, out: seen.append(out.last_hidden_state.requires_grad)
    )
    model.train()
    model.model.get_image_features(torch.randn(64, 1176), torch.tensor([[1, 8, 8]]), return_dict=True)
    assert seen == [False]
