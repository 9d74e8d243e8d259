"""PrefixKV against recorded budgets, kept positions and decoding steps of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from pruning.prefixkv import PrefixKV, PrefixKVCache, layer_forget_ratios, received_attention, search_forget_counts
from tests.golden.listed import listed_cases
from tests.golden.util import load_tensors

CASES = listed_cases("prefixkv")


def attention_maps(golden: dict[str, Tensor]) -> Tensor:
    """Return recorded maps `(layers, heads, length, length)`, or ones that give the recorded importance.

    They have no zeros, so that their logarithms can be logits.
    """
    if "attentions" in golden:
        return golden["attentions"].clamp(min=1e-30)
    importance = golden["importance"]
    return (importance / importance.sum(-1, keepdim=True))[:, None, None].expand(-1, -1, importance.shape[1], -1)


def step(cache: PrefixKVCache, layer: int, maps: Tensor, positions: Tensor) -> None:
    """Let one layer attend by `maps` `(heads, new, length)`; what it stores are the positions of the tokens."""
    _, new, length = maps.shape
    with torch.device("meta"):
        module = LlamaAttention(LlamaConfig(num_key_value_heads=1, num_attention_heads=len(maps), head_dim=1), layer)
    # Logits of queries that are the maps' logarithms, and of keys that are unit vectors, are these logarithms.
    key = torch.eye(length)[None, None, -new:]
    value = positions.float().reshape(1, 1, -1, 1).expand(-1, -1, -1, length)
    keys, values = cache.update(key, value, layer)
    mask = torch.ones(1, 1, new, length, dtype=torch.bool)
    AttentionInterface()["prefixkv_sdpa"](module, maps.log()[None], keys, values, mask, scaling=1.0)


def stored(cache: PrefixKVCache, layer: int) -> list[int]:
    return cache.layers[layer].values[0, 0, :, 0].long().tolist()


@pytest.mark.parametrize("case", CASES)
def test_budgets(case: dict[str, Any]) -> None:
    golden = load_tensors("prefixkv", f"{case['name']}.safetensors")
    arguments = (golden["importance"], case["forget_ratio"], case["start_size"])
    assert torch.equal(search_forget_counts(*arguments), golden["raw_forget_counts"])
    assert search_forget_counts(*arguments).tolist() == case["raw_forget_counts"]
    assert layer_forget_ratios(*arguments) == case["forget_ratio_per_layer"]


@pytest.mark.parametrize("case", CASES)
def test_importance(case: dict[str, Any]) -> None:
    golden = load_tensors("prefixkv", f"{case['name']}.safetensors")
    maps = attention_maps(golden)
    keys = torch.eye(maps.shape[-1]).expand(len(maps), 1, -1, -1)
    open_mask = torch.ones(1, 1, *maps.shape[2:], dtype=torch.bool)
    importance = received_attention(maps.log(), keys, scaling=1.0, mask=open_mask)
    torch.testing.assert_close(importance, maps.mean(1).sum(1))
    if "attentions" in golden:
        torch.testing.assert_close(importance, golden["importance"])


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_cache(case: dict[str, Any], profiled: bool) -> None:
    """The prompt, then the decoding steps, through transformers' cache and attention interfaces."""
    golden = load_tensors("prefixkv", f"{case['name']}.safetensors")
    maps, length = attention_maps(golden), case["seq_len"]
    given: dict[str, Any] = {"layer_forget_ratios": case["forget_ratio_per_layer"]}
    method = PrefixKV(
        **given if profiled else {"keep_ratio": 1 - case["forget_ratio"]},
        start_size=case["start_size"],
        distance=-case["distance"],
    )
    cache = PrefixKVCache(method, LlamaConfig(num_hidden_layers=case["layers"]))
    for layer in range(case["layers"]):
        step(cache, layer, maps[layer], torch.arange(length))
    assert cache.forget_ratios == [[ratio] for ratio in case["forget_ratio_per_layer"]]
    assert cache.kept_lengths == [[kept] for kept in case["kept_lengths"]]
    for layer in range(case["layers"]):
        kept = golden[f"layer{layer}.kept" if profiled else f"layer{layer}.kept_profile"]
        assert stored(cache, layer) == kept.tolist()
        assert cache.layers[layer].positions[0].tolist() == kept.tolist()
        assert cache.layers[layer].rows[0].slot == case["dropped_position_at_each_decode_step"][layer]
    for number, lengths in enumerate(case["decode_lengths"]):
        assert [row[0] for row in cache.kept_lengths] == lengths
        if number + 1 == len(case["decode_lengths"]):
            break
        seen = length + number
        for layer in range(case["layers"]):
            new_maps = torch.full((maps.shape[1], 1, seen + 1), 1 / (seen + 1))
            pad = cache.layers[layer]
            # Keys grow with the length here, for they are unit vectors.
            pad.keys, pad.values = (torch.nn.functional.pad(x, (0, 1)) for x in (pad.keys, pad.values))
            step(cache, layer, new_maps, torch.tensor([seen]))
    for layer, kept_positions in enumerate(case["decode_kept_after_6_steps"]):
        assert stored(cache, layer) == kept_positions
