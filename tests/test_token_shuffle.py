"""Token-Shuffle: windows, equality with LlamaGen, generation, editing, training, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generators.guidance import HalfLinearGuidance
from generators.llamagen import LlamaGen
from generators.pipelines import ARImagePipeline
from generators.token_shuffle import TokenShuffle
from tests.tiny import caption_tokenizer, randomised, tiny_text_encoder, tiny_token_shuffle, tiny_vq


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(32, (batch, 16), generator=torch.Generator().manual_seed(3))


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


def test_windows_by_hand(model: TokenShuffle) -> None:
    raster = torch.arange(16)[None]
    windows = model.to_sequence(raster)
    assert windows[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(model.from_sequence(windows), raster)
    values = torch.randn(2, 16, 3)
    assert torch.equal(model.from_sequence(values)[:, 4], values[:, 2])


def test_the_sequence_is_a_quarter(model: TokenShuffle) -> None:
    output = model.generate([1], generator=seeded(0))
    assert output.trace.forwards == 4
    assert sum(output.trace.positions) == 1 + 3
    assert output.token_ids.shape == (1, 16)
    assert bool((output.token_ids >= 0).all())


def test_cached_decoding_equals_the_training_pass(model: TokenShuffle) -> None:
    ids = model.generate([1, 3], do_sample=False).token_ids
    logits = model(ids, [1, 3]).logits
    assert torch.equal(logits.argmax(-1), ids)


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


def test_batch_equals_single(model: TokenShuffle) -> None:
    batch = model.generate([0, 4, 2], guidance_scale=2.0, generator=seeded(1, 2, 3)).token_ids
    for i, label in enumerate([0, 4, 2]):
        single = model.generate([label], guidance_scale=2.0, generator=seeded(i + 1)).token_ids
        assert torch.equal(batch[i : i + 1], single)


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


def test_training_lowers_the_loss() -> None:
    model = tiny_token_shuffle(shuffle_ratio=2.0, shuffle_activation="silu", shuffle_norm=False).train()
    ids = random_ids(4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, [0, 1, 2, 3], labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_save_and_load(tmp_path: Path, model: TokenShuffle) -> None:
    model.save_pretrained(tmp_path)
    loaded = TokenShuffle.from_pretrained(tmp_path).eval()
    ids = random_ids()
    assert torch.equal(loaded(ids, [1, 2]).logits, model(ids, [1, 2]).logits)


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
        ({"shuffle_blocks": -1}, "shuffle_blocks"),
        ({"shuffle_ratio": 0.0}, "shuffle_ratio"),
        ({"shuffle_activation": "tanh"}, "shuffle_activation must be one of"),
        ({"z_loss_weight": -1.0}, "z_loss_weight"),
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
