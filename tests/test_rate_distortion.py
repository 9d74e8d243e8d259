"""Bytes against quality: the similarity, the codecs, and the ratio at equal quality."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from mmsdk.bench.rate_distortion import CODECS, _compressed, _times_smaller, _tokenized, rate_distortion, ssim
from mmsdk.errors import DataError
from mmsdk.images import tensor_to_pil


def pictures() -> torch.Tensor:
    """Two smooth pictures `(2, 3, 64, 64)`."""
    ramp = torch.linspace(0, 1, 64)
    first = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.full((64, 64), 0.5)])
    return torch.stack([first, 1 - first])


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    images = pictures()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    weak, strong = ((images + scale * noise).clamp(0, 1) for scale in (0.02, 0.2))
    assert torch.allclose(ssim(images, images), torch.ones(2))
    assert bool((ssim(strong, images) < ssim(weak, images)).all() and (ssim(weak, images) < 1).all())


def test_ssim_of_constant_images_by_hand() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("codec", list(CODECS))
def test_codecs_write_whole_files_that_grow_with_quality(codec: str) -> None:
    images = pictures()
    low, high = (_compressed(codec, quality, images) for quality in (10, 90))
    assert low.size < high.size
    assert low.images.shape == images.shape
    kind, options = CODECS[codec]
    sizes = []
    for image in tensor_to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=10, **options)
        assert Image.open(buffer).format == kind
        sizes.append(len(buffer.getvalue()))
    assert low.size == sum(sizes) / 2


def test_tokens_are_measured_as_files_with_headers() -> None:
    settings = list(_tokenized("one_d_piece", "emoji-64", pictures(), (4, 64, 1000), (), 1))
    assert [s.knob for s in settings] == ["4 tokens", "64 tokens"]
    # 60 more tokens of 12 bits, and the count of tokens in one byte either way.
    assert settings[1].size - settings[0].size == 60 * 12 / 8


def test_the_ratio_takes_the_smallest_file_that_is_no_worse() -> None:
    ours = ["one_d_piece", "8 tokens", 40.0, 16.0, 0.5, 300.0, 0.1, None, None]
    codec = [["WebP", f"quality {q}", size, 20.0, 0.7, fd, 0.1, None, None] for q, size, fd in (
        (0, 100.0, 400.0), (5, 120.0, 300.0), (9, 200.0, 100.0),
    )]  # fmt: skip
    assert _times_smaller([ours, *codec], ours, "WebP") == 3.0
    assert _times_smaller([ours, *codec], ours, "AVIF") is None


def test_unknown_codecs_are_refused() -> None:
    with pytest.raises(DataError, match="codecs must be some of"):
        rate_distortion(codecs=["JPEG 2000"])
