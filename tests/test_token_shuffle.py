"""Token-Shuffle: windows, equality with LlamaGen, generation, editing, training, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generators.base import Trace
from generators.guidance import HalfLinearGuidance, combine
from generators.llamagen import LlamaGen
from generators.pipelines import ARImagePipeline
from generators.token_shuffle import ResidualBlock, TokenShuffle
from mmsdk.decoding.sampling import process_logits, sample_inverse_cdf
from mmsdk.loading import resolve
from tests.tiny import (
    CONDITION_TOKENS,
    caption_tokenizer,
    randomised,
    tiny_one_d_piece,
    tiny_text_encoder,
    tiny_token_shuffle,
    tiny_vq,
)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(32, (batch, 16), generator=torch.Generator().manual_seed(3))


def conditions(kind: str, batch: int) -> dict[str, Any]:
    """Labels, or captions of 1, 2, ... tokens, padded on the left."""
    if kind == "class":
        return {"class_labels": torch.arange(batch)}
    features = torch.randn(batch, CONDITION_TOKENS, 16, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(CONDITION_TOKENS)[None] >= CONDITION_TOKENS - 1 - torch.arange(batch)[:, None]
    return {"caption_features": features, "caption_mask": mask.long()}


def by_window(logits: torch.Tensor) -> torch.Tensor:
    """Bring logits of 4 x 4 tokens in raster order into `(batch, 4 windows, 4 tokens, codebook_size)`."""
    order = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    return logits[:, torch.tensor(order)]


@pytest.fixture(scope="module", params=["rope2d", "learned"])
def model(request: Any) -> TokenShuffle:
    return tiny_token_shuffle(positions=request.param, shuffle_blocks=1).eval()


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("positions", ["rope2d", "learned"])
def test_windows_of_one_token_are_llamagen(positions: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "multiple_of": 8, "max_tokens": 16}
    sizes |= {"codebook_size": 32, "num_classes": 5, "positions": positions}
    plain = randomised(LlamaGen(**sizes)).eval()
    shuffled = TokenShuffle(**sizes, shuffle_size=1, z_loss_weight=0.0).eval()
    shuffled.load_state_dict(plain.state_dict())  # the same keys
    ids = random_ids()
    ours, theirs = (m(ids, [1, 2], labels=ids) for m in (shuffled, plain))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    settings: dict[str, Any] = {"class_labels": [1, 2], "guidance_scale": 2.0, "top_k": 9}
    ours, theirs = (m.generate(**settings, generator=seeded(1, 2)) for m in (shuffled, plain))
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert ours.trace.forwards == 16
    states = [m.prefill([1, 2]) for m in (shuffled, plain)]
    assert torch.equal(*(m.step(ids[:, 0], state) for m, state in zip((shuffled, plain), states, strict=True)))


def test_windows_of_one_token_begin_as_llamagen() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "num_classes": 5}
    sizes |= {"codebook_size": 32, "max_tokens": 6, "positions": "learned"}  # no grid, which only windows need
    models = []
    with torch.random.fork_rng():
        for model_class, further in ((LlamaGen, {}), (TokenShuffle, {"shuffle_size": 1})):
            torch.manual_seed(0)
            models.append(model_class(**sizes, **further).state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_windows_by_hand(model: TokenShuffle) -> None:
    raster = torch.arange(16)[None]
    windows = model.to_sequence(raster)
    assert windows[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(model.from_sequence(windows), raster)
    values = torch.randn(2, 16, 3)
    assert torch.equal(model.from_sequence(values)[:, 4], values[:, 2])


def test_tokens_lie_side_by_side_in_a_window() -> None:
    model = tiny_token_shuffle(shuffle_blocks=0).eval()
    raster = torch.arange(16)[None]
    second = model.embed_tokens(model.to_sequence(raster))[0, 1]
    narrow = model.compress(model.tok_embeddings(torch.tensor([2, 3, 6, 7])))  # two of row 0, two of row 1
    torch.testing.assert_close(second, narrow.flatten())
    logits = model.predict(second[None, None])[0]
    torch.testing.assert_close(logits, model.output(model.expand(narrow)))


def test_drawn_tokens_land_in_their_window(model: TokenShuffle) -> None:
    trace = Trace(keep_logits=True)
    ids = model.generate([1], do_sample=False, trace=trace).token_ids[0].view(4, 4)
    squares = [ids[:2, :2], ids[:2, 2:], ids[2:, :2], ids[2:, 2:]]
    for square, logits in zip(squares, trace.logits, strict=True):
        assert square.flatten().tolist() == logits[0].argmax(-1).tolist()


@pytest.mark.parametrize(("size", "side"), [(2, 4), (2, 8), (4, 8), (4, 4)])
def test_the_sequence_is_shorter(size: int, side: int) -> None:
    model = tiny_token_shuffle(shuffle_size=size, max_tokens=side**2, num_heads=1).eval()
    steps = (side // size) ** 2
    output = model.generate([1], generator=seeded(0))
    assert output.trace.forwards == model.count_steps() == steps
    assert output.trace.positions == [1] * steps
    assert output.token_ids.shape == (1, side**2)
    assert bool((output.token_ids >= 0).all())
    assert model._rotary_table.shape == (1 + steps, 8)  # one rotation per window
    logits = model(output.token_ids, [1]).logits
    assert logits.shape == (1, side**2, 32)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_norm_placement_by_hand(norm: str) -> None:
    block = ResidualBlock(4, 4, "relu", norm, 0.0)
    for index in (0, 2):  # the MLP becomes a ReLU
        torch.nn.init.eye_(block.mlp[index].weight)
        torch.nn.init.zeros_(block.mlp[index].bias)
    x = torch.tensor([3.0, -1.0, 1.0, -5.0])  # root mean square 3
    doubled = torch.tensor([6.0, -1.0, 2.0, -5.0])  # 66 / 4
    expected = {
        "pre": x + torch.tensor([1.0, 0.0, 1 / 3, 0.0]),
        "post": doubled / 16.5**0.5,
        "none": doubled,
    }
    torch.testing.assert_close(block(x), expected[norm])
    assert len(list(block.norm.parameters())) == (norm != "none")


def test_cached_decoding_equals_the_training_pass(model: TokenShuffle) -> None:
    ids = model.generate([1, 3], do_sample=False).token_ids
    logits = model(ids, [1, 3]).logits
    assert torch.equal(logits.argmax(-1), ids)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_generation_equals_the_plain_loop(kind: str, scale: float) -> None:
    model = tiny_token_shuffle(condition=kind).eval()
    condition, sampling = conditions(kind, 3), {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    uniforms = torch.rand(3, 16, dtype=torch.float64, generator=seeded(7)[0])
    trace = Trace(keep_logits=True)
    output = model.generate(**condition, guidance_scale=scale, uniforms=uniforms, trace=trace, **sampling)
    sequence, steps = torch.zeros(3, 16, dtype=torch.int64), []
    with torch.no_grad():
        for step in range(4):  # without a cache: the whole image at every step, what is not known yet as zeros
            here, raster = slice(4 * step, 4 * step + 4), model.from_sequence(sequence)
            cond, uncond = (
                by_window(model(raster, drop_condition=drop, **condition).logits)[:, step]
                for drop in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool))
            )
            logits = combine(cond, uncond, scale)
            probs = torch.softmax(process_logits(logits, **sampling), -1)
            sequence[:, here] = sample_inverse_cdf(probs, uniforms[:, here])
            steps.append(logits)
    assert torch.equal(output.token_ids, model.from_sequence(sequence))
    torch.testing.assert_close(torch.stack(trace.logits), torch.stack(steps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["class", "text"])
@torch.no_grad()
def test_state_takes_windows(kind: str) -> None:
    model, ids = tiny_token_shuffle(condition=kind).eval(), random_ids(3)
    windows, condition = model.to_sequence(ids).split(4, 1), conditions(kind, 3)
    expected = by_window(model(ids, **condition).logits)
    state = model.prefill(**condition)
    torch.testing.assert_close(model.step(windows[0], state), expected[:, 1], atol=1e-5, rtol=1e-5)
    model.advance(torch.cat([windows[3], windows[3]], 1), state)
    state.rollback(state.condition_length + 1)
    block = model.forward_block(torch.cat(windows[1:3], 1), state)
    torch.testing.assert_close(block, expected[:, 2:].flatten(1, 2), atol=1e-5, rtol=1e-5)
    assert state.num_tokens == 3  # windows


def test_windows_see_only_what_came_before(model: TokenShuffle) -> None:
    ids = random_ids(1)
    logits = model(ids, [1]).logits
    changed = ids.clone()
    changed[0, [2, 3, 6, 7]] = (changed[0, [2, 3, 6, 7]] + 1) % 32  # the second window
    again = model(changed, [1]).logits
    before = [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(logits[:, before], again[:, before])
    assert not torch.allclose(logits[:, 8:], again[:, 8:], atol=1e-4)


def test_guidance_combines_logits(model: TokenShuffle) -> None:
    trace = model.generate([1], guidance_scale=HalfLinearGuidance(3.0), generator=seeded(0)).trace
    assert trace.rows == [2] * 4
    assert trace.guidance == HalfLinearGuidance(3.0).scales(4)
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    guided = model.guided_logits(hidden, 2, 3.0)
    conditional, unconditional = (model.predict(rows[:, None]) for rows in hidden.split(2))
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_batch_equals_single(kind: str) -> None:
    model, condition = tiny_token_shuffle(condition=kind).eval(), conditions(kind, 3)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "top_k": 20, "top_p": 0.95}
    batch = model.generate(**condition, **settings, generator=seeded(1, 2, 3)).token_ids
    assert len({tuple(row) for row in batch.tolist()}) == 3
    for i in range(3):
        lone = {key: value[i : i + 1] for key, value in condition.items()}
        assert torch.equal(model.generate(**lone, **settings, generator=seeded(i + 1)).token_ids, batch[i : i + 1])


def test_callback_gets_all_positions(model: TokenShuffle) -> None:
    seen: list[torch.Tensor] = []
    full = model.generate([1], generator=seeded(3), callback=lambda step, ids: seen.append(ids)).token_ids
    assert len(seen) == 4
    known = torch.zeros(16, dtype=torch.bool)
    for ids, window in zip(seen, ([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]), strict=True):
        known[window] = True
        assert torch.equal(ids[0], torch.where(known, full[0], -1))


def test_a_prefix_of_windows_is_kept(model: TokenShuffle) -> None:
    full = model.generate([1], guidance_scale=2.0, generator=seeded(5)).token_ids
    prefix = model.to_sequence(full)[:, :8]
    again = model.generate([1], guidance_scale=2.0, prefix=prefix, generator=seeded(5))
    assert torch.equal(again.token_ids, full)
    assert again.trace.positions == [1, 2, 1]


def test_inpainting_begins_at_the_first_touched_window(model: TokenShuffle) -> None:
    ids = random_ids(1)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 7] = True  # in the second window
    assert torch.equal(model.inpainting(ids, mask)["prefix"], ids[:, [0, 1, 4, 5]])


# ---------------------------------------------------------------- training, files, pipeline


def test_z_loss_by_hand() -> None:
    model = tiny_token_shuffle(z_loss_weight=0.5).eval()
    ids, labels = random_ids(), random_ids()
    labels[0, 3] = -100
    output = model(ids, [1, 2], labels=labels)
    kept = labels != -100
    cross_entropy = F.cross_entropy(output.logits[kept], labels[kept])
    z = output.logits[kept].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(output.loss, cross_entropy + 0.5 * z)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_training_lowers_the_loss(norm: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TokenShuffle(
            hidden_size=16, num_layers=2, num_heads=2, multiple_of=8, max_tokens=16, codebook_size=32, num_classes=5,
            shuffle_ratio=2.0, shuffle_activation="silu", shuffle_norm=norm, token_dropout=0.0, residual_dropout=0.0,
            feed_forward_dropout=0.0,
        ).train()  # fmt: skip
    ids = random_ids(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(50):
        loss = model(ids, [0, 1, 2, 3], labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(32), abs=1e-3)  # the output layer starts at 0
    assert losses[-1] < 0.3
    assert torch.equal(model.eval().generate([0, 1, 2, 3], do_sample=False).token_ids, ids)


def test_save_and_load(tmp_path: Path, model: TokenShuffle) -> None:
    model.save_pretrained(tmp_path)
    loaded = resolve("token_shuffle").from_pretrained(tmp_path).eval()
    assert isinstance(loaded, TokenShuffle)
    ids = random_ids()
    assert torch.equal(loaded(ids, [1, 2]).logits, model(ids, [1, 2]).logits)


def test_class_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    pipeline = ARImagePipeline(tiny_token_shuffle().eval(), tiny_vq())
    pipeline.save_pretrained(tmp_path)
    loaded = ARImagePipeline.from_pretrained(tmp_path)
    outputs = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        guidance = HalfLinearGuidance(2.0)
        outputs.append(pipe(class_labels=[1, 3], guidance_scale=guidance, generator=seeded(1, 2), output_type="pt"))
    assert torch.equal(outputs[0].images, outputs[1].images)
    assert outputs[0].trace.forwards == 4


def test_in_a_pipeline() -> None:
    captions = caption_tokenizer()
    torch.manual_seed(0)
    encoder = tiny_text_encoder(len(captions), dim=16, num_layers=1).eval()
    transformer = tiny_token_shuffle(condition="text").eval()
    pipeline = ARImagePipeline(transformer, tiny_vq(), encoder, captions)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("pizza", guidance_scale=2.0, generator=seeded(1), output_type="pt")
    steps = list(pipeline.stream("pizza", guidance_scale=2.0, generator=seeded(1), output_type="pt"))
    assert [step.num_tokens for step in steps] == [4, 8, 12, 16]
    assert torch.equal(steps[-1].images, output.images)
    grey = (steps[0].images == 0.5).all(1)[0]
    assert not bool(grey[:8, :8].any())  # the first window
    assert bool(grey[8:].all())
    assert bool(grey[:8, 8:].all())
    mask = np.zeros((16, 16), bool)
    mask[8:, 8:] = True
    edited = pipeline.inpaint(output.images, mask, "cat face", generator=seeded(2)).tokens.token_ids
    known = pipeline.image_tokenizer.encode(output.images).token_ids
    kept = ~torch.tensor(mask[::4, ::4]).flatten()
    assert torch.equal(edited[:, kept], known[:, kept])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shuffle_size": 3}, r"shuffle_size must divide the side of the grid, 4 tokens: one of \[1, 2, 4\]; got 3"),
        ({"shuffle_size": 0}, "shuffle_size must divide"),
        ({"shuffle_size": 4, "hidden_size": 24}, "hidden_size must divide by the 16 tokens of a window, got 24"),
        ({"max_tokens": 12}, "square grid of tokens, got max_tokens=12"),
        ({"shuffle_size": 2.0}, r"shuffle_size must divide .* got 2\.0"),
        ({"shuffle_blocks": -1}, "shuffle_blocks must be at least 0, got -1"),
        ({"shuffle_ratio": 0.0}, "shuffle_ratio must be finite and leave hidden layers a width of 1 or more, got 0.0"),
        ({"shuffle_ratio": 0.05}, "width of 1 or more, got 0.05 of hidden_size=16"),
        ({"shuffle_ratio": float("inf")}, "shuffle_ratio must be finite"),
        ({"shuffle_activation": "tanh"}, "shuffle_activation must be one of"),
        ({"shuffle_norm": "before"}, r"shuffle_norm must be one of \['pre', 'post', 'none'\], got 'before'"),
        ({"z_loss_weight": -1.0}, r"z_loss_weight must be finite and at least 0, got -1\.0"),
        ({"z_loss_weight": float("nan")}, "z_loss_weight must be finite and at least 0, got nan"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_token_shuffle(**sizes)


def test_other_grids_are_refused(model: TokenShuffle) -> None:
    with pytest.raises(ValueError, match="all 16 tokens of an image, of the grid that was trained"):
        model(random_ids()[:, :8], [1, 2])
    with pytest.raises(ValueError, match="got num_tokens=8"):
        model.generate([1], num_tokens=8)
    with pytest.raises(ValueError, match="whole windows of 4 tokens"):
        model.generate([1], prefix=random_ids(1)[:, :3])
    with pytest.raises(ValueError, match="1 to 16"):
        model(torch.zeros(1, 64, dtype=torch.int64), [1])
    with pytest.raises(ValueError, match="must be 1 to 16, got 64"):
        model.generate([1], num_tokens=64)


def test_windows_need_a_grid_of_the_trained_size() -> None:
    with pytest.raises(ValueError, match="up to 64 tokens, but an image of VQ has 16"):
        ARImagePipeline(tiny_token_shuffle(max_tokens=64), tiny_vq())
    with pytest.raises(ValueError, match="writes up to 4 tokens, but an image of VQ has 16"):
        ARImagePipeline(tiny_token_shuffle(max_tokens=4), tiny_vq())
    with pytest.raises(ValueError, match="grid of 2 x 2 tokens, but that of OneDPiece is None; use LlamaGen"):
        ARImagePipeline(tiny_token_shuffle(max_tokens=4), tiny_one_d_piece())
    ARImagePipeline(tiny_token_shuffle(max_tokens=4, shuffle_size=1), tiny_one_d_piece())


def test_incomplete_windows_are_refused(model: TokenShuffle) -> None:
    state = model.prefill([0, 1])
    for count in (1, 3, 5):
        with pytest.raises(ValueError, match=rf"Windows hold 4 tokens each, got ids \(2, {count}\)"):
            model.advance(random_ids()[:, :count], state)
    for ids in (random_ids()[:, :8], random_ids()[:, 0]):
        with pytest.raises(ValueError, match=r"must be \(2, 4\), a window per row, got"):
            model.step(ids, state)
    assert state.num_tokens == 0
