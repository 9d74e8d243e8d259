"""DiffRate on tiny timm ViTs: exact where nothing is dropped, counted by hand, and learnt."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from pruning.diffrate import DiffRate, LearnableRates, RateProxy, merge_tokens

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "qk_norm_swiglu": {"qk_norm": True, "mlp_layer": SwiGLUPacked},
    "average_pool": {"global_pool": "avg"},
    "dynamic_size": {"dynamic_img_size": True},
}


def tiny_vit(seed: int = 0, **changes: Any) -> VisionTransformer:
    """16 patches, 3 blocks of width 16; every parameter random, so that every token counts."""
    torch.manual_seed(seed)
    config = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    vit = VisionTransformer(**config | changes)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return vit.eval()


def images(count: int = 2, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_nothing_dropped_is_the_model(variant: str) -> None:
    vit = tiny_vit(**VARIANTS[variant])
    total = vit.num_prefix_tokens + 16
    expected = vit(images())
    for method in (DiffRate(), DiffRate(keep=[total] * 3, merge=[total] * 3), DiffRate.uniform(vit)):
        with method(vit):
            assert torch.equal(vit(images()), expected)
        assert method.report.tokens == [total] * 3
    assert DiffRate().lossless
    assert not DiffRate(keep=[10] * 3).lossless


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_compresses_and_lets_go(variant: str) -> None:
    vit = tiny_vit(**VARIANTS[variant])
    expected, prefix = vit(images()), vit.num_prefix_tokens
    method = DiffRate(keep=[prefix + 16, prefix + 12, prefix + 6], merge=[prefix + 16, prefix + 8, prefix + 4])
    with method(vit):
        compressed = vit(images())
    assert method.report.tokens == [prefix + 16, prefix + 8, prefix + 4]
    assert not torch.allclose(compressed, expected)
    assert torch.equal(vit(images()), expected)
    with method(vit):
        assert torch.equal(vit(images()), compressed)
    with pytest.raises(RuntimeError, match="inside"), method(vit):
        raise RuntimeError("inside")
    assert torch.equal(vit(images()), expected)


@torch.no_grad()
def test_batch_equals_single() -> None:
    vit, batch = tiny_vit(init_values=0.3), images(4)
    method = DiffRate(keep=[17, 12, 7], merge=[17, 9, 5])
    with method(vit):
        together = vit(batch)
        assignments = method.report.assignments[-1]
        for i in range(len(batch)):
            torch.testing.assert_close(vit(batch[i : i + 1])[0], together[i])
            assert torch.equal(method.report.assignments[-1][0], assignments[i])
    assert len({tuple(row) for row in assignments.tolist()}) > 1


@torch.no_grad()
def test_attention_kernel_does_not_matter() -> None:
    vit, method = tiny_vit(), DiffRate(keep=[17, 12, 7], merge=[17, 9, 5])
    with method(vit):
        fused = vit(images())
    for block in vit.blocks:
        block.attn.fused_attn = False
    with method(vit):
        torch.testing.assert_close(vit(images()), fused)


@torch.no_grad()
def test_dropping_after_the_last_attention_changes_no_class_token() -> None:
    vit = tiny_vit()
    with DiffRate(keep=[17, 17, 2])(vit):
        torch.testing.assert_close(vit(images()), vit.forward_head(vit.forward_features(images())))
        compressed = vit(images())
    torch.testing.assert_close(compressed, vit(images()))


@torch.no_grad()
def test_merging_equal_tokens_loses_nothing() -> None:
    """Equal patches without positions stay equal: attention that counts sizes is then exact, pruning is not."""
    vit = tiny_vit(pos_embed="none")
    flat = images()[:, :, :1, :1].expand(-1, -1, 16, 16)
    expected = vit(flat)
    method = DiffRate(merge=[17, 6, 2])
    with method(vit):
        torch.testing.assert_close(vit(flat), expected)
    torch.testing.assert_close(method.report.sizes[-1], torch.tensor([[1.0, 16.0]] * 2))
    with DiffRate(keep=[17, 6, 2])(vit):
        assert not torch.allclose(vit(flat), expected, atol=1e-3)


@torch.no_grad()
def test_prefix_tokens_stay() -> None:
    vit = tiny_vit(reg_tokens=3)
    method = DiffRate(keep=[20, 9, 6], merge=[20, 7, 5])
    with method(vit):
        vit(images())
    for assignment, sizes in zip(method.report.assignments, method.report.sizes, strict=True):
        assert torch.equal(assignment[:, :4], torch.arange(4).expand(2, -1))
        assert int((assignment[:, 4:] == -1).sum()) < assignment[:, 4:].numel()
        assert torch.equal(sizes[:, :4], torch.ones(2, 4))
    kept = method.report.assignments[-1]
    assert set(kept.unique().tolist()) == {-1, 0, 1, 2, 3, 4}
    assert int((kept[0] == -1).sum()) == 11 + 1


def test_merge_by_hand() -> None:
    class_token, east, north, near_east, near_north = [9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [3.0, 4.0]
    tokens = torch.tensor([[class_token, east, north, near_east, near_north]])
    output = merge_tokens(tokens, torch.tensor([[1.0, 2.0, 1.0, 4.0, 5.0]]), left=3)
    assert output.destination.tolist() == [[1, 2]]
    torch.testing.assert_close(output.best_similarity, torch.tensor([[1.0, 0.8]]))
    torch.testing.assert_close(output.tokens, torch.tensor([[class_token, [2.0, 0.0], [1.5, 3.0]]]))
    torch.testing.assert_close(output.size, torch.tensor([[1.0, 2 + 4.0, 1 + 0.8 * 5]]))
    with pytest.raises(ValueError, match=r"left must lie in 2\.\.5 .* got 1"):
        merge_tokens(tokens, torch.ones(1, 5), left=1)


@torch.no_grad()
def test_opposite_tokens_stay_finite() -> None:
    """A destination may end up with a negative size; attention must not."""
    vit = tiny_vit(depth=2, pos_embed="none")
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [-2.0, 0.0]]])
    assert merge_tokens(tokens, torch.tensor([[1.0, 1.0, 3.0]]), left=2).size[0, 1] < 0
    with DiffRate(merge=[2, 2])(vit):
        assert bool(torch.isfinite(vit(images() * 50)).all())


@torch.no_grad()
def test_half_precision() -> None:
    vit, method = tiny_vit().bfloat16(), DiffRate(keep=[17, 12, 7], merge=[17, 9, 5])
    with method(vit):
        assert vit(images().bfloat16()).dtype == torch.bfloat16
    assert method.report.sizes[-1].dtype == method.report.importances[-1].dtype == torch.float32


@torch.no_grad()
def test_smaller_images_than_the_table() -> None:
    vit = tiny_vit(dynamic_img_size=True)
    method = DiffRate(keep=[17, 8, 4])
    with method(vit):
        vit(images(size=8))
    assert method.report.tokens == [5, 5, 4]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "layer_scale", "registers"])
def test_flops(variant: str) -> None:
    """Counted by torch, which also sees the selection: one row of attention and the similarities."""
    vit = tiny_vit(embed_dim=64, **VARIANTS[variant])
    for block in vit.blocks:
        block.attn.fused_attn = False  # torch does not count all fused kernels
    method = DiffRate.uniform(vit, 0.1, 0.2)
    with FlopCounterMode(display=False) as counter, method(vit):
        vit(images(1))
    assert method.flops(vit) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        vit(images(1))
    assert DiffRate().flops(vit) == counter.get_total_flops() // 2
    assert method.flops(vit) < DiffRate().flops(vit)


def test_uniform_table() -> None:
    method = DiffRate.uniform(tiny_vit(), prune_rate=0.25, merge_rate=0.5)
    assert (method.keep, method.merge) == ([17, 13, 6], [17, 7, 4])
    assert method.table(tiny_vit()) == [(17, 17), (13, 7), (6, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": [17.0, 8.0, 4.0]}, TypeError, "keep must hold integers"),
        ({"merge": [17, 0, 0]}, ValueError, "merge must hold numbers of tokens of at least 1"),
        ({"keep": [17, 8, 9]}, ValueError, "keep must not increase"),
        ({"keep": [17, 8], "merge": [17, 8, 4]}, ValueError, "one entry per block each, got 2 and 3"),
        ({"keep": [17, 8, 4], "merge": [17, 9, 4]}, ValueError, "merge must not exceed keep"),
    ],
)
def test_bad_table(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DiffRate(**arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DiffRate(keep=[17, 8]), "one entry for each of the 3 blocks, got 2"),
        (DiffRate(merge=[17, 8, 4, 4]), "one entry for each of the 3 blocks, got 4"),
        (DiffRate(keep=[17, 8, 1]), "Every block must keep at least 2 tokens .* got 1"),
    ],
)
def test_table_that_does_not_fit(method: DiffRate, message: str) -> None:
    with pytest.raises(ValueError, match=message), method(tiny_vit()):
        pass


@pytest.mark.parametrize(
    ("vit", "error", "message"),
    [
        (lambda: timm.create_model("resnet18"), TypeError, "takes a timm VisionTransformer, got ResNet"),
        (lambda: tiny_vit(class_token=False, global_pool="avg"), ValueError, "this model has none"),
        (lambda: VisionTransformerDistilled(img_size=16, patch_size=4, depth=1), ValueError, "distillation token"),
        (lambda: tiny_vit(block_fn=ParallelScalingBlock), ValueError, "got ParallelScalingBlock"),
        (lambda: tiny_vit(attn_layer="diff"), ValueError, "got Block with DiffAttention"),
    ],
)
def test_models_refused(vit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), DiffRate()(vit()):
        pass


def test_refused_use() -> None:
    vit, method = tiny_vit(), DiffRate(keep=[17, 8, 4])
    with method(vit):
        with pytest.raises(ValueError, match="already replaced"), method(vit):
            pass
        with pytest.raises(ValueError, match="neither attn_mask nor is_causal"):
            vit(images(), is_causal=True)
    vit.set_grad_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"), method(vit):
        pass
    with pytest.raises(ValueError, match=r"merge_rate must lie in \[0, 1\), got 1"):
        DiffRate.uniform(vit, merge_rate=1)


# ------------------------------------------------------------ learning the rates


def set_kept(proxy: RateProxy, patches: int) -> None:
    """Make a proxy all but sure of one number of patches; the expectation, rounded up, must not go above it."""
    with torch.no_grad():
        proxy.logits.fill_(-30.0)
        proxy.logits[proxy.num_patches - patches] = 0.0
        if patches > 1:
            proxy.logits[proxy.num_patches - patches + 1] = -6.0


@pytest.mark.parametrize("variant", ["plain", "layer_scale", "registers", "qk_norm_swiglu"])
def test_masks_do_what_dropping_does(variant: str) -> None:
    vit = tiny_vit(**VARIANTS[variant])
    prefix = vit.num_prefix_tokens
    rates = LearnableRates(vit)
    with torch.no_grad(), rates.masked(vit):
        torch.testing.assert_close(vit(images()), tiny_vit(**VARIANTS[variant])(images()))
    for proxies, counts in ((rates.prune, (11, 6)), (rates.merge, (8, 4))):
        for proxy, count in zip(proxies, counts, strict=True):
            set_kept(proxy, count)
    compression = rates.compression()
    assert compression.keep == [prefix + 16, prefix + 11, prefix + 6]
    assert compression.merge == [prefix + 16, prefix + 8, prefix + 4]
    with rates.masked(vit):
        masked = vit(images())
    with compression(vit):
        torch.testing.assert_close(masked, vit(images()))
    assert rates.flops(vit).item() == compression.flops(vit)


def test_rates_learn() -> None:
    """The loss passes gradients to every rate, and the target is met: fewer tokens, and the first block is left out."""
    vit = tiny_vit().requires_grad_(False)
    rates, full = LearnableRates(vit), DiffRate().flops(vit) / 1e9
    labels = vit(images(8)).argmax(-1)
    optimizer = torch.optim.Adam(rates.parameters(), lr=0.3)
    target = 0.7 * full
    for step in range(40):
        with rates.masked(vit):
            loss = F.cross_entropy(vit(images(8)), labels)
        if step == 0:
            loss.backward(retain_graph=True)
            # What the last block drops no later attention sees: only the FLOPs move its rates.
            assert all(float(proxies[0].logits.grad.abs().max()) > 0 for proxies in (rates.prune, rates.merge))
        loss = 0.1 * loss + rates.flops_loss(vit, target) / full**2 * 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    compression = rates.compression()
    assert compression.keep[0] == compression.merge[0] == 17
    assert compression.flops(vit) / 1e9 == pytest.approx(target, rel=0.1)
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_rates_of_a_large_model_move() -> None:
    """All are tied at first, and none may be stuck there by rounding."""
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224")
    rates = LearnableRates(vit)
    assert rates.compression().merge == [197] * 12
    rates.flops_loss(vit, 2.9).backward()
    assert all(float(proxy.logits.grad.abs().max()) > 0 for proxy in (*rates.prune, *rates.merge))


def test_masked_tokens_have_gradients() -> None:
    """A rate must feel what the tokens that it drops would do, which an additive mask of -inf would not pass on."""
    vit, rates = tiny_vit(), LearnableRates(tiny_vit())
    set_kept(rates.merge[0], 9)
    probabilities: list[torch.Tensor] = []

    def recorded() -> torch.Tensor:
        probability = RateProxy.token_probability(rates.merge[0])
        probability.retain_grad()
        probabilities.append(probability)
        return probability

    rates.merge[0].token_probability = recorded  # type: ignore[method-assign]
    with rates.masked(vit):
        vit(images(1))[0, 0].backward()
    assert rates.compression().merge == [17, 10, 10]
    assert bool((probabilities[0].grad[10:].abs() > 0).all())


def test_rate_proxy_by_hand() -> None:
    proxy = RateProxy(num_patches=5, granularity=2, num_prefix_tokens=2)
    assert proxy.candidates.tolist() == [5, 3, 1]
    with torch.no_grad():
        proxy.logits.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    assert proxy.expected_tokens().item() == pytest.approx(2 + 2.8)
    assert proxy.kept_tokens() == 5
    torch.testing.assert_close(proxy.token_probability(), torch.tensor([1, 1, 1, 0.7, 0.7, 0.2, 0.2]))
    assert proxy.mask().tolist() == pytest.approx([1, 1, 1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"granularity must lie in 1\.\.5, .* got 6"):
        RateProxy(5, 6)


def test_learning_refused() -> None:
    with pytest.raises(ValueError, match="global_pool='avg'"):
        LearnableRates(tiny_vit(global_pool="avg"))
    vit = tiny_vit(dynamic_img_size=True)
    rates = LearnableRates(vit)
    with pytest.raises(ValueError, match="target_gflops must be positive, got 0"):
        rates.flops_loss(vit, 0)
    with rates.masked(vit), pytest.raises(ValueError, match="images of 17 tokens, got 5"):
        vit(images(size=8))
