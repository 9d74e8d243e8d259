"""DiffRate against recorded outputs of the published code: whole models, merging alone, and the rates' proxy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruning.diffrate import DiffRate, RateProxy, merge_tokens
from tests.golden.listed import listed_cases
from tests.golden.util import load_tensors

# What the recordings allow another timm than theirs.
MODEL_ATOL = 1e-3


def build(case: dict[str, Any], golden: dict[str, Tensor], mlp_ratio: float | None = None) -> VisionTransformer:
    return VisionTransformer(
        img_size=case["img"],
        patch_size=case["patch"],
        embed_dim=case["dim"],
        depth=case["depth"],
        num_heads=case["heads"],
        mlp_ratio=mlp_ratio or case["mlp_ratio"],
        num_classes=len(golden["weight.head.bias"]),
    ).eval()


def load(case: dict[str, Any]) -> tuple[VisionTransformer, dict[str, Tensor]]:
    golden = load_tensors("diffrate", f"{case['name']}.safetensors")
    vit = build(case, golden)
    vit.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    return vit, golden


def by_source(source: Tensor, *values: Tensor) -> list[Tensor]:
    """Order kept tokens by the first original one that each stands for: a block may keep them in any order."""
    order = source.argmax(-1).argsort(-1)
    return [v.gather(1, order.reshape(*order.shape, *[1] * (v.ndim - 2)).expand_as(v)) for v in (source, *values)]


@pytest.mark.parametrize("case", listed_cases("diffrate", "model_cases"))
@torch.no_grad()
def test_model(case: dict[str, Any]) -> None:
    vit, golden = load(case)
    torch.testing.assert_close(vit(golden["input"]), golden["logits_full"], atol=MODEL_ATOL, rtol=0)
    outputs: list[Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    method = DiffRate(keep=case["prune_kept"], merge=case["merge_kept"])
    with method(vit):
        logits = vit(golden["input"])
    torch.testing.assert_close(logits, golden["logits_compressed"], atol=MODEL_ATOL, rtol=0)
    report = method.report
    assert report.tokens == case["tokens"]
    for i, output in enumerate(outputs):
        source = report.assignments[i].unsqueeze(1) == torch.arange(report.tokens[i]).reshape(1, -1, 1)
        ours = by_source(source.float(), report.sizes[i], output)
        theirs = by_source(*[golden[f"block{i}.{name}"] for name in ("source", "size", "output")])
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1:], theirs[1:], atol=MODEL_ATOL, rtol=0)
        if report.importances[i] is not None:
            attention = golden[f"block{i}.cls_attention"].mean(1)[:, 1:]
            # Both sorted, for the tokens may have come in another order.
            torch.testing.assert_close(report.importances[i][:, 1:].sort().values, attention.sort().values)
    assert any(importance is not None for importance in report.importances)


@pytest.mark.parametrize("case", listed_cases("diffrate", "model_cases"))
def test_flops(case: dict[str, Any]) -> None:
    """The published count takes every MLP as four times as wide, and embeds the class token as if it were a patch."""
    golden = load_tensors("diffrate", f"{case['name']}.safetensors")
    vit = build(case, golden, mlp_ratio=4.0)
    flops = DiffRate(keep=case["prune_kept"], merge=case["merge_kept"]).flops(vit)
    assert flops + vit.patch_embed.proj.weight.numel() == case["flops"]


@pytest.mark.parametrize("case", listed_cases("diffrate", "merge_cases"))
def test_merge(case: dict[str, Any]) -> None:
    golden = load_tensors("diffrate", f"{case['name']}.safetensors")
    output = merge_tokens(golden["tokens"], golden["size"], case["kept"])
    assert torch.equal(output.destination, golden["destination"])
    torch.testing.assert_close(output.best_similarity, golden["best_similarity"])
    torch.testing.assert_close(output.tokens, golden["merged_tokens"])
    torch.testing.assert_close(output.size, golden["merged_size"])


@pytest.mark.parametrize("case", listed_cases("diffrate", "rate_proxy_cases"))
def test_rate_proxy(case: dict[str, Any]) -> None:
    proxy = RateProxy(case["patch_number"], case["granularity"])
    assert proxy.candidates.tolist() == case["kept_candidates"]
    with torch.no_grad():
        proxy.logits.copy_(torch.tensor(case["selected_probability"]))
    assert proxy.kept_tokens() == case["kept_token_number"]
    torch.testing.assert_close(proxy.token_probability(), torch.tensor(case["token_probability"]))
    assert proxy.mask().sum().item() == pytest.approx(case["mask_sum"])
