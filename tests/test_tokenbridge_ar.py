"""TokenBridge-AR: its cache and savings against a plain loop, its head by hand, training, loading, what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generators.base import Trace
from generators.guidance import ConstantGuidance, Guidance, combine
from generators.heads.channel import ChannelHead
from generators.orders import RandomCosineMask
from generators.tokenbridge_ar import GENERATION_PRESETS, PRESETS, TokenBridgeAR
from mmsdk.errors import CheckpointError, UnknownNameError
from mmsdk.loading import resolve
from mmsdk.tokens import ImageTokens
from tests.tiny import tiny_tokenbridge, tiny_tokenbridge_ar, tiny_vae, tiny_vq
from tokenizers_img.quantizers import GaussianQuantizer

LABELS = torch.tensor([3, 0, 4])
TOKENS, CHANNELS, LEVELS = 16, 3, 8


@pytest.fixture(scope="module")
def model() -> TokenBridgeAR:
    return tiny_tokenbridge_ar()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_orders(batch: int = 3) -> Tensor:
    return torch.rand(batch, TOKENS, generator=seeded(11)).argsort(-1)


def make_uniforms(num_iter: int, batch: int = 3) -> list[Tensor]:
    steps = RandomCosineMask(num_iter).steps(make_orders(batch), TOKENS)
    return [torch.rand(*s.positions.shape, CHANNELS, generator=seeded(s.step), dtype=torch.float64) for s in steps]


def make_latents(batch: int = 3) -> Tensor:
    return torch.randn(batch, CHANNELS, 4, 4, generator=seeded(7))


def make_head(num_channels: int = 5, std: float = 0.5, **settings: Any) -> ChannelHead:
    head = ChannelHead(num_channels, 6, 10, 16, 2, 2, **settings)
    torch.manual_seed(0)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return head.eval()


@dataclass(frozen=True)
class Listed(Guidance):
    """A scale for every step."""

    listed: tuple[float, ...] = ()

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        return self.listed[step]


@torch.no_grad()
def plain(model: TokenBridgeAR, scales: list[float], uniforms: list[Tensor], temperature: float = 1.0) -> Tensor:
    """No savings: features of all positions, twice the rows always, all channels so far for each channel."""
    orders, num_iter = make_orders(), len(scales)
    batch = len(orders)
    condition = torch.cat([model.embed_condition(LABELS), model.unconditional(batch)])
    ids = torch.full((batch, TOKENS, CHANNELS), -1)
    for step, (scale, drawn) in enumerate(zip(scales, uniforms, strict=True)):
        left = RandomCosineMask(num_iter).lengths(TOKENS)[step] if step < num_iter - 1 else 0
        known = (ids >= 0).all(-1)
        new = ~known & torch.ones_like(known).scatter(1, orders[:, :left], False)
        places = known.nonzero()[:, 1].view(batch, -1).repeat(2, 1)
        tokens = model.quantize.dequantize(ids[known]).view(batch, -1, CHANNELS).repeat(2, 1, 1)
        everywhere = torch.arange(TOKENS).expand(2 * batch, -1)
        cond, uncond = model.decode(model.encode(tokens, places, condition), places, everywhere).chunk(2)
        z = combine(cond, uncond, scale)[new]
        ids[new] = model.head.sample(z, drawn.flatten(0, 1), temperature, use_cache=False)
    return ids


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0, 1.0, 1.0), (3.0, 3.0, 3.0, 3.0), (2.0, 1.0, 1.0, 1.0), (1.0, 0.0, 2.5, 1.0)]
)
def test_generation_equals_the_plain_loop(model: TokenBridgeAR, scales: tuple[float, ...]) -> None:
    uniforms = make_uniforms(4)
    settings: dict[str, Any] = {"num_iter": 4, "guidance_scale": Listed(1.0, scales), "orders": make_orders()}
    output = model.generate(LABELS, **settings, temperature=0.8, uniforms=uniforms)
    assert torch.equal(output.token_ids, plain(model, list(scales), uniforms, 0.8))
    assert output.trace.guidance == list(scales)
    assert output.trace.rows == [3 if scale == 1.0 else 6 for scale in scales]
    # Guidance comes before the head, which has no unconditional rows.
    assert output.trace.head_rows == [drawn[..., 0].numel() for drawn in uniforms]
    assert output.trace.head_steps == [CHANNELS] * 4


def test_a_number_guides_linearly(model: TokenBridgeAR) -> None:
    uniforms = make_uniforms(4)
    lengths = RandomCosineMask(4).lengths(TOKENS)
    scales = [1 + 2 * (TOKENS - left) / TOKENS for left in lengths]
    output = model.generate(LABELS, num_iter=4, guidance_scale=3.0, orders=make_orders(), uniforms=uniforms)
    assert torch.equal(output.token_ids, plain(model, scales, uniforms))
    unguided = model.generate(LABELS, num_iter=4, orders=make_orders(), uniforms=uniforms)
    assert not torch.equal(output.token_ids, unguided.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_equals_no_cache(model: TokenBridgeAR, temperature: float) -> None:
    settings: dict[str, Any] = {"num_iter": 5, "guidance_scale": 2.0, "temperature": temperature}
    cached, plain = (
        model.generate(LABELS, **settings, generator=seeded(3), use_cache=use_cache).token_ids
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_batch_equals_single(model: TokenBridgeAR) -> None:
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_iter": 5}
    together = model.generate(LABELS, generator=[seeded(i) for i in range(3)], **settings).token_ids
    for i in range(3):
        lone = model.generate(LABELS[i : i + 1], generator=[seeded(i)], **settings).token_ids
        assert torch.equal(lone[0], together[i])
        single = model.generate(LABELS[i : i + 1], generator=seeded(i), **settings).token_ids
        assert torch.equal(single, lone)


def test_random_numbers(model: TokenBridgeAR) -> None:
    before = torch.get_rng_state()
    one, other = (model.generate(LABELS, num_iter=2).token_ids for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, other)
    again = [model.generate(LABELS, num_iter=2, generator=seeded(5)).token_ids for _ in range(2)]
    assert torch.equal(*again)


def test_temperature_0(model: TokenBridgeAR) -> None:
    """The most probable index, as top-k 1 and almost no temperature give it, whatever the generator."""
    settings: dict[str, Any] = {"num_iter": 4, "guidance_scale": 2.0, "orders": make_orders()}
    greedy = model.generate(LABELS, **settings, temperature=0).token_ids
    for other in ({"top_k": 1}, {"temperature": 1e-4}):
        assert torch.equal(model.generate(LABELS, **settings, **other, generator=seeded(1)).token_ids, greedy)
    generator, orders_only = seeded(2), seeded(2)
    model.generate(LABELS, num_iter=4, temperature=0, generator=generator)
    torch.randn(len(LABELS), TOKENS, generator=orders_only)
    assert torch.equal(generator.get_state(), orders_only.get_state())


def test_streaming_and_callback(model: TokenBridgeAR) -> None:
    settings: dict[str, Any] = {"num_iter": 4, "orders": make_orders(), "uniforms": make_uniforms(4)}
    seen: list[tuple[int, Tensor]] = []
    trace = Trace()
    full, filled = model.generate(
        LABELS, **settings, callback=lambda *step: seen.append(step), trace=trace, return_dict=False
    )
    assert filled is trace
    assert trace.forwards == 4
    assert bool(((full >= 0) & (full < LEVELS)).all())
    streamed = list(model.iter_generate(LABELS, **settings))
    left = [*RandomCosineMask(4).lengths(TOKENS)[:-1], 0]
    for steps in (seen, streamed):
        assert [step for step, _ in steps] == list(range(4))
        for (_, ids), unknown in zip(steps, left, strict=True):
            assert (ids == -1).all(-1).sum(-1).tolist() == [unknown] * 3
            assert bool(((ids == full) | (ids == -1)).all())


def test_one_step(model: TokenBridgeAR) -> None:
    """All tokens at once, from what the condition alone tells."""
    uniforms = make_uniforms(1)
    output = model.generate(LABELS, num_iter=1, guidance_scale=ConstantGuidance(2.0), uniforms=uniforms)
    assert output.trace.rows == [6]
    assert torch.equal(output.token_ids, plain(model, [2.0], uniforms))


def test_more_steps_than_tokens(model: TokenBridgeAR) -> None:
    output = model.generate(LABELS, num_iter=40, temperature=0)
    assert output.trace.head_rows == [3] * TOKENS
    assert bool((output.token_ids >= 0).all())


def test_text_and_no_condition() -> None:
    model = tiny_tokenbridge_ar(condition="text")
    features = torch.randn(2, 3, 6, generator=seeded(1))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    settings: dict[str, Any] = {"num_iter": 3, "temperature": 0, "orders": make_orders(2)}
    ids = model.generate(caption_features=features, caption_mask=mask, **settings).token_ids
    assert not torch.equal(ids[0], ids[1])
    padded = features.clone()
    padded[0, 0] = 100.0
    assert torch.equal(model.generate(caption_features=padded, caption_mask=mask, **settings).token_ids, ids)
    none = model.generate(batch_size=2, **settings).token_ids
    unguided = model.generate(caption_features=features, guidance_scale=ConstantGuidance(0.0), **settings).token_ids
    assert torch.equal(none, unguided)


def test_half_precision(model: TokenBridgeAR) -> None:
    half = tiny_tokenbridge_ar().to(torch.bfloat16)
    ids = half.generate(LABELS, num_iter=3, guidance_scale=2.0, generator=seeded(1)).token_ids
    assert bool(((ids >= 0) & (ids < LEVELS)).all())
    z = torch.randn(2, 24, generator=seeded(1)).bfloat16()
    assert half.head.logits(z, ids[0, :2]).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- inpainting


def test_inpainting(model: TokenBridgeAR) -> None:
    latents = make_latents()
    before, ids = latents.clone(), model.quantize_latents(latents)
    mask = torch.zeros(3, TOKENS, dtype=torch.bool)
    mask[0, :5], mask[1, 3:8], mask[2, 11:] = True, True, True
    settings: dict[str, Any] = {"num_iter": 3, "guidance_scale": 2.0}
    steps = list(model.iter_generate(LABELS, **settings, latents=latents, mask=mask, generator=seeded(1)))
    assert torch.equal(latents, before)
    for _, partial in steps:
        assert torch.equal(partial[~mask], ids[~mask])
    assert bool((steps[0][1][mask] == -1).any())
    assert bool((steps[-1][1] >= 0).all())
    # What is masked does not matter, what is known does.
    hidden, shown = latents.clone(), latents.clone()
    hidden.flatten(2)[:, 0][mask] = 9.0
    shown.flatten(2)[:, 0][~mask] = 9.0
    results = [
        model.generate(LABELS, **settings, latents=x, mask=mask, generator=seeded(1)).token_ids for x in (hidden, shown)
    ]
    assert torch.equal(results[0], steps[-1][1])
    assert not torch.equal(results[1][mask], steps[-1][1][mask])


def test_masking_everything_is_a_generation(model: TokenBridgeAR) -> None:
    settings: dict[str, Any] = {"num_iter": 4, "generator": seeded(1)}
    everything = torch.ones(TOKENS, dtype=torch.bool)
    inpainted = model.generate(LABELS, **settings, latents=make_latents(), mask=everything).token_ids
    settings["generator"] = seeded(1)
    assert torch.equal(inpainted, model.generate(LABELS, **settings).token_ids)


def test_inpainting_of_ids() -> None:
    """Whole patches are regenerated, and ids are taken as they are."""
    model = tiny_tokenbridge_ar(patch_size=2, latent_channels=2, channel_order=None)
    ids = torch.randint(0, LEVELS, (2, 16, 2), generator=seeded(1))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 1] = True  # row 0, column 1: of the first patch
    edit = model.inpainting(ids, mask)
    assert edit["mask"].tolist() == [[True, False, False, False]] * 2
    result = model.generate(LABELS[:2], num_iter=2, generator=seeded(2), **edit).token_ids
    patch = torch.zeros(16, dtype=torch.bool)
    patch[[0, 1, 4, 5]] = True
    assert torch.equal(result[:, ~patch], ids[:, ~patch])
    assert not torch.equal(result[:, patch], ids[:, patch])


# ---------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_keep_their_indices(bits: int) -> None:
    """Ids that become latents and are quantized again are the same, whatever the range."""
    for value_range in (0.5, 3.0, 5.0, 40.0):
        quantizer = GaussianQuantizer(bits, value_range)
        indices = torch.arange(2**bits)
        assert torch.equal(quantizer.quantize(quantizer.dequantize(indices)), indices)


def test_ids_are_the_tokenizers() -> None:
    """Also where a token is a patch: the generator's ids decode as they are."""
    tokenizer = tiny_tokenbridge(bits=3)
    for patch_size in (1, 2):
        sizes: dict[str, Any] = {"grid_size": 8, "patch_size": patch_size, "latent_channels": 4}
        model = tiny_tokenbridge_ar(**sizes, channel_order=None)
        model.check_tokenizer(tokenizer)
        ids = model.generate([1, 2], num_iter=2, generator=seeded(1)).token_ids
        tokens = ImageTokens(token_ids=ids, spec=tokenizer.token_spec())
        assert tokenizer.decode(tokens).images.shape == (2, 3, 16, 16)
        normalised = model.dequantize_ids(ids)
        mean, std = (torch.tensor(tokenizer.config[name])[:, None, None] for name in ("latent_mean", "latent_std"))
        torch.testing.assert_close(normalised * std + mean, tokenizer.dequantize_ids(ids))
        assert torch.equal(model.quantize_latents(normalised), ids)
        cells = ids.mT.unflatten(2, (8, 8))
        first = model.to_tokens(cells)[0, 1]
        size = patch_size
        assert torch.equal(first, cells[0, :, :size, size : 2 * size].flatten())


@pytest.mark.parametrize("tokenizer", [tiny_vq(), tiny_vae(), tiny_tokenbridge(bits=4)], ids=["vq", "vae", "bits"])
def test_other_tokenizers_are_refused(tokenizer: Any) -> None:
    model = tiny_tokenbridge_ar(grid_size=8, latent_channels=4, channel_order=None)
    with pytest.raises(ValueError, match="writes 4 indices of 3 bits at 8 x 8 positions"):
        model.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="at 4 x 4 positions"):
        tiny_tokenbridge_ar(latent_channels=4, channel_order=None).check_tokenizer(tiny_tokenbridge(bits=3))


# ---------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("rows", [1, 7, 200, 600])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_head_cache_equals_no_cache(rows: int, temperature: float) -> None:
    """Also where modulations of all, some or single channels are computed at once."""
    head = make_head(channel_order=(3, 0, 4, 1, 2))
    z = torch.randn(rows, 10, generator=seeded(1))
    uniforms = torch.rand(rows, 5, generator=seeded(2), dtype=torch.float64)
    cached, plain = (head.sample(z, uniforms, temperature, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    # Teacher-forced, the network gives the same distributions.
    logits = head.logits(z, cached, as_sampled=True)
    if temperature == 0:
        assert torch.equal(logits.argmax(-1), cached)
    else:
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        high = cumulative.gather(-1, cached[..., None])[..., 0]
        low = torch.where(cached > 0, cumulative.gather(-1, (cached - 1).clamp(min=0)[..., None])[..., 0], 0)
        drawn = uniforms[:, list(head.inverse_order)]
        assert bool(((low - 1e-5 <= drawn) & (drawn <= high + 1e-5)).all())


def test_channel_order() -> None:
    """An index depends on those before it in the order, and on nothing else."""
    order = (3, 0, 4, 1, 2)
    head, z = make_head(channel_order=order), torch.randn(4, 10, generator=seeded(1))
    target = torch.randint(0, 6, (4, 5), generator=seeded(2))
    with torch.no_grad():
        logits = head.logits(z, target)
        for place, channel in enumerate(order):
            changed = target.clone()
            changed[:, channel] = (changed[:, channel] + 1) % 6
            differs = (head.logits(z, changed) != logits).flatten(2).any(-1).any(0)
            assert {c for c in range(5) if differs[c]} == set(order[place + 1 :])


@torch.no_grad()
def test_head_by_hand() -> None:
    """Channel 1 comes first, by its bias; channel 0 follows it, by a table."""
    head = ChannelHead(2, 3, 4, 2, 1, 1, channel_order=(1, 0))
    for parameter in head.parameters():
        parameter.zero_()
    head.channel_norm.weight.fill_(1.0)
    # Without gates the blocks are the identity, and two numbers are normalised to (1, -1) or (-1, 1).
    head.token_embeddings[0].weight.copy_(torch.tensor([[3.0, 1.0], [-2.0, 5.0], [7.0, 0.0]]))
    head.channel_heads[0].bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    head.channel_heads[1].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    z = torch.randn(4, 4)
    # Halves and less of the probability 0.2 + 0.3 + 0.5.
    uniforms = torch.tensor([[0.1, 0.0], [0.4, 0.0], [0.6, 0.0], [0.6, 0.999]])
    # After 0 and 2 the logits are (2, -1, 0), after 1 (-2, 1, 0): 0.0 draws the first, 0.999 the last.
    assert head.sample(z, uniforms).tolist() == [[0, 0], [0, 1], [0, 2], [2, 2]]
    assert head.sample(z, temperature=0).tolist() == [[0, 2]] * 4
    target = torch.tensor([[0, 0], [1, 1], [2, 2], [2, 2]])
    expected = torch.tensor([[2.0, -1.0, 0.0], [-2.0, 1.0, 0.0], [2.0, -1.0, 0.0], [2.0, -1.0, 0.0]])
    logits = head.logits(z, target)
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, 1].exp(), torch.tensor([[0.2, 0.3, 0.5]]).expand(4, -1))
    nats = -torch.log_softmax(expected, -1)[range(4), target[:, 0]] - torch.tensor([0.2, 0.3, 0.5, 0.5]).log()
    torch.testing.assert_close(head.loss(z, target), nats / 2, atol=1e-4, rtol=0)


def test_the_first_input_differs_between_training_and_sampling() -> None:
    head, z = make_head(), torch.randn(4, 10, generator=seeded(1))
    target = torch.randint(0, 6, (4, 5), generator=seeded(2))
    with torch.no_grad():
        assert not torch.allclose(head.logits(z, target), head.logits(z, target, as_sampled=True), atol=1e-2)
        head.timesteps_embeddings[:, 0].zero_()
        assert torch.equal(head.logits(z, target), head.logits(z, target, as_sampled=True))


def test_one_channel() -> None:
    head, z = make_head(num_channels=1), torch.randn(4, 10, generator=seeded(1))
    sampled = head.sample(z, temperature=0)
    assert torch.equal(sampled[:, 0], head.logits(z, sampled, as_sampled=True)[:, 0].argmax(-1))


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected).square() / expected).sum())


@torch.no_grad()
def test_sampled_indices_follow_their_softmax() -> None:
    """The first channel, and the second after a given first; the softmax of training is the negative control."""
    head, z = make_head(channel_order=(3, 0, 4, 1, 2)), torch.randn(1, 10, generator=seeded(1))
    count = 12000
    uniforms = torch.rand(count, 5, generator=seeded(2), dtype=torch.float64)
    sampled = head.sample(z.expand(count, -1), uniforms, temperature=1.5)
    given = sampled.mode(0).values  # a first index that is frequent
    after = sampled[sampled[:, 3] == given[3]]
    critical = 20.5  # 5 degrees of freedom, one in a thousand
    for as_sampled in (True, False):
        probs = (head.logits(z, given[None], as_sampled)[0].double() / 1.5).softmax(-1)
        statistics = [
            chi_square(torch.bincount(rows[:, channel], minlength=6), probs[channel])
            for rows, channel in ((sampled, 3), (after, 0))
        ]
        assert (max(statistics) < critical) == as_sampled, statistics
    assert min(statistics) > critical


@torch.no_grad()
def test_top_k() -> None:
    head, z = make_head(), torch.randn(1, 10, generator=seeded(1))
    uniforms = torch.rand(500, 5, generator=seeded(2), dtype=torch.float64)
    sampled = head.sample(z.expand(500, -1), uniforms, top_k=2)
    likely = head.logits(z, sampled[:1], as_sampled=True)[0, 0].topk(2).indices
    assert set(sampled[:, 0].tolist()) == set(likely.tolist())


# ---------------------------------------------------------------------------------------------------- training


def test_loss_is_the_mean_over_masked_tokens(model: TokenBridgeAR) -> None:
    latents, mask = make_latents(), torch.zeros(3, TOKENS, dtype=torch.bool)
    mask[:, 4:] = True
    mask[0] = mask[0].flip(0)
    output = model(latents, LABELS, mask=mask)
    ids = model.quantize_latents(latents)
    logits = model.head.logits(output.hidden_states.flatten(0, 1), ids[mask])
    torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), ids[mask].flatten()))
    loss, same_mask, hidden_states = model(token_ids=ids, class_labels=LABELS, mask=mask, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(same_mask, mask)
    assert hidden_states.shape == (3, 12, 24)
    # Masked tokens are not seen.
    hidden = latents.clone()
    hidden.flatten(2)[:, 0][mask] = 9.0
    assert torch.equal(model(hidden, LABELS, mask=mask).hidden_states, hidden_states)


def test_drawn_masks_and_dropped_conditions(model: TokenBridgeAR) -> None:
    latents = make_latents()
    outputs = [model(latents, LABELS, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert not torch.equal(outputs[0].mask, outputs[2].mask)
    assert torch.equal(outputs[0].mask, model.draw_mask(3, seeded(1)))
    mask = outputs[0].mask
    dropped = model(latents, LABELS, mask=mask, drop_condition=torch.tensor([True, False, False])).hidden_states
    other = model(latents, LABELS.roll(1), mask=mask, drop_condition=torch.tensor([True, False, False])).hidden_states
    assert torch.equal(dropped[0], other[0])
    assert not torch.equal(dropped[1], other[1])


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder_shape": (16, 1, 2), "decoder_shape": (16, 1, 2), "head_shape": (16, 1, 2)}
    model = TokenBridgeAR(grid_size=2, latent_channels=2, bits=3, num_classes=2, buffer_size=2, **sizes).train()
    ids = torch.randint(0, 8, (2, 4, 2), generator=seeded(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = seeded(2), []
    for _ in range(80):
        loss = model(token_ids=ids, class_labels=[0, 1], generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(8))  # nothing is known yet
    assert sum(losses[-10:]) / 10 < 0.5
    # Every parameter is trained, but for the condition of images without one.
    half = torch.tensor([True, True, False, False])
    model(token_ids=ids, class_labels=[0, 1], mask=half).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert without == {"fake_latent"}
    generated = model.eval().generate([0, 1], num_iter=4, temperature=0, generator=seeded(3)).token_ids
    assert float((generated == ids).float().mean()) > 0.8


# ---------------------------------------------------------------------------------------------------- loading


def published(model: TokenBridgeAR) -> dict[str, Tensor]:
    """Return the weights under the published names, with the published tables."""
    names = {"diffusion_pos_embed_learned": "output_pos_embed"}
    state = {names.get(k, k.removeprefix("head.")): v for k, v in model.state_dict().items()}
    tables = {"boundaries": model.quantize.boundaries, "reconstruction_values": model.quantize.centroids}
    return state | tables | {"channel_mask": torch.full((CHANNELS, CHANNELS), -torch.inf).triu(1)}


SHAPES: dict[str, Any] = {"encoder_shape": (16, 1, 2), "decoder_shape": (24, 2, 2), "head_shape": (16, 2, 2)}


def test_published_names(model: TokenBridgeAR, tmp_path: Path) -> None:
    config = SHAPES | {"channel_order": (2, 0, 1)}
    state = published(model)
    parameters = {k: v for k, v in state.items() if k not in ("boundaries", "reconstruction_values", "channel_mask")}
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"model_ema": parameters, "model": zeros}, tmp_path / "checkpoint.pth")
    expected = model.generate(LABELS, num_iter=3, guidance_scale=2.0, generator=seeded(1)).token_ids
    for source in (state, {"model_ema": parameters, "model": zeros}, tmp_path / "checkpoint.pth"):
        loaded = TokenBridgeAR.from_original(source, config)
        ids = loaded.generate(LABELS, num_iter=3, guidance_scale=2.0, generator=seeded(1)).token_ids
        assert torch.equal(ids, expected)


def test_checkpoints_that_do_not_fit(model: TokenBridgeAR) -> None:
    config, state = SHAPES | {"channel_order": (2, 0, 1)}, published(model)
    with pytest.raises(CheckpointError, match="pass theirs: config={'channel_order'"):
        TokenBridgeAR.from_original(state, SHAPES)
    for name in SHAPES:
        with pytest.raises(CheckpointError, match=f"number of heads; pass it: config={{'{name}'"):
            TokenBridgeAR.from_original(state, {k: v for k, v in config.items() if k != name})
    with pytest.raises(CheckpointError, match=r"no TokenBridgeAR checkpoint: 'head\.channel_heads"):
        TokenBridgeAR.from_original({k: v for k, v in state.items() if "channel_heads" not in k}, config)
    with pytest.raises(CheckpointError, match=r"missing 'head\.condition_proj\.bias'"):
        TokenBridgeAR.from_original({k: v for k, v in state.items() if k != "condition_proj.bias"}, config)
    for table in (state["boundaries"] + 0.1, state["boundaries"][:-1]):
        with pytest.raises(CheckpointError, match="'boundaries' are not those of 3 bits"):
            TokenBridgeAR.from_original(state | {"boundaries": table}, config)


def test_save_and_load(model: TokenBridgeAR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = resolve("tokenbridge_ar").from_pretrained(tmp_path)
    assert tuple(loaded.head.channel_order) == (2, 0, 1)
    results = [m.generate(LABELS, num_iter=3, generator=seeded(1)).token_ids for m in (model, loaded)]
    assert torch.equal(*results)


def test_presets() -> None:
    assert set(PRESETS) == set(GENERATION_PRESETS)
    with torch.device("meta"):
        model = TokenBridgeAR.preset("L", image_size=512, num_classes=10)
    assert (model.num_tokens, model.config.num_classes, model.head.num_channels) == (1024, 10, 16)
    with pytest.raises(UnknownNameError, match="Unknown TokenBridge-AR preset 'XL'"):
        TokenBridgeAR.preset("XL")


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel_order": (0, 1)}, r"channel_order must be a permutation of 0\.\.2, got \[0, 1\]"),
        ({"channel_order": (0, 1, 1)}, r"channel_order must be a permutation of 0\.\.2"),
        ({"head_shape": (16, 2)}, r"head_shape must be width, layers and heads, got \(16, 2\)"),
        ({"head_shape": (16, 0, 2)}, "depth must be at least 1, got 0"),
        ({"head_shape": (16, 2, 3)}, "num_heads must divide width, got 3 and 16"),
        ({"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"value_range": 0.0}, "value_range must be positive"),
        ({"mask_ratio_min": 0.0}, "mask_ratio_min must be above 0 and at most 1, got 0.0"),
        ({"patch_size": 3}, "patch_size must divide grid_size, got 3 and 4"),
    ],
)
def test_bad_configuration(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_tokenbridge_ar(**settings)


def test_a_head_needs_two_levels() -> None:
    with pytest.raises(ValueError, match="num_levels must be at least 2, got 1"):
        ChannelHead(3, 1, 4, 4, 1, 1)


ORDERS = make_orders()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, "temperature must be positive and finite, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"top_k": -1}, "top_k must be an integer of at least 0"),
        ({"num_iter": 0}, "num_iter must be an integer of at least 1, got 0"),
        ({"guidance_scale": -1.0}, "guidance scale must be finite and at least 0"),
        ({"orders": ORDERS[:2]}, r"orders must be \(3, 16\)"),
        ({"orders": torch.zeros_like(ORDERS)}, "in each row all masked positions"),
        ({"mask": torch.ones(TOKENS, dtype=torch.bool)}, "Pass latents and mask together"),
        ({"latents": make_latents()}, "Pass latents and mask together"),
        ({"latents": make_latents(2), "mask": torch.ones(TOKENS, dtype=torch.bool)}, "3 conditions for 2 latents"),
        ({"latents": make_latents(), "mask": torch.zeros(TOKENS, dtype=torch.bool)}, "mask at least 1 token"),
        ({"latents": make_latents()[:, :2], "mask": torch.ones(TOKENS, dtype=torch.bool)}, r"latents must be \(batch"),
        ({"uniforms": make_uniforms(4)[:-1]}, "uniforms must hold tensors of the shapes"),
        ({"uniforms": [u + 1 for u in make_uniforms(4)]}, r"uniforms must be in \[0, 1\)"),
        ({"uniforms": make_uniforms(4), "temperature": 0}, "Nothing is drawn at temperature 0"),
        ({"uniforms": make_uniforms(4), "orders": ORDERS, "generator": seeded(0)}, "has nothing to draw"),
        ({"temperature": 0, "orders": ORDERS, "generator": seeded(0)}, "has nothing to draw"),
        ({"generator": [seeded(0)]}, "one for each of 3 rows, got 1"),
        ({"batch_size": 2}, "batch_size is for images without a condition"),
        ({"caption_features": torch.zeros(3, 3, 6)}, "class-conditional"),
    ],
)
def test_bad_generation(model: TokenBridgeAR, arguments: dict[str, Any], message: str) -> None:
    """Refused at once, not at the first step."""
    with pytest.raises(ValueError, match=message):
        model.iter_generate(LABELS, **({"num_iter": 4} | arguments))


def test_bad_labels(model: TokenBridgeAR) -> None:
    with pytest.raises(ValueError, match="Class labels must be 0 to 4, got 5 at position 1"):
        model.generate([0, 5])
    with pytest.raises(TypeError, match="Class labels must be integers"):
        model.generate([0.5])


def test_bad_training_batches(model: TokenBridgeAR) -> None:
    ids = model.quantize_latents(make_latents())
    for given in ({}, {"latents": make_latents(), "token_ids": ids}):
        with pytest.raises(ValueError, match="Pass either latents or token_ids"):
            model(class_labels=LABELS, **given)
    with pytest.raises(TypeError, match=r"token_ids must be int64, got torch\.float32"):
        model(token_ids=ids.float(), class_labels=LABELS)
    with pytest.raises(ValueError, match=r"token_ids must be \(batch, 16, 3\), got \(3, 3, 16\)"):
        model(token_ids=ids.mT, class_labels=LABELS)
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match="token_ids must be 0 to 7, got"):
            model(token_ids=ids.masked_fill(ids == ids[0, 0, 0], wrong), class_labels=LABELS)
    with pytest.raises(ValueError, match="3 conditions for 2 latents"):
        model(make_latents(2), LABELS)
    with pytest.raises(ValueError, match="as many tokens in every image"):
        mask = torch.ones(3, TOKENS, dtype=torch.bool)
        mask[0, 0] = False
        model(make_latents(), LABELS, mask=mask)


def test_bad_head_input() -> None:
    head, z = make_head(), torch.randn(4, 10)
    with pytest.raises(ValueError, match=r"target must be \(4, 5\), got \(4, 4\)"):
        head.loss(z, torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"uniforms must be \(4, 5\) unless temperature is 0, got None"):
        head.sample(z)
    with pytest.raises(ValueError, match=r"uniforms must be \(4, 5\) unless temperature is 0, got \(4, 6\)"):
        head.sample(z, torch.rand(4, 6))
    with pytest.raises(ValueError, match="temperature must be positive"):
        head.sample(z, torch.rand(4, 5), temperature=-1.0)
