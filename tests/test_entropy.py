"""Entropy coding: exact, never larger, refused rather than wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from generators.entropy import LlamaGenEntropyModel
from generators.llamagen import LlamaGen
from mmsdk.entropy import BATCH_SIZE, code_ids, cross_entropy, decode_ids
from mmsdk.errors import TokenStreamError
from mmsdk.tokens import ImageTokens, TokenSpec
from tests.tiny import tiny_pipeline, tiny_token_shuffle

SPEC = TokenSpec("one_d_piece", "0123456789abcdef", (16,), True, None, (64, 64), 8)


class Sticky:
    """Expects each id to be the one before it; the first may be any."""

    codebook_size, max_tokens = 16, 8

    def __init__(self, certainty: float = 0.9) -> None:
        self.certainty = certainty
        self.fingerprint = f"{round(certainty * 2**20):08x}"

    def start(self, batch_size: int, num_tokens: int) -> Callable[[Tensor | None], Tensor]:
        def predict(token_ids: Tensor | None) -> Tensor:
            if token_ids is None:
                return torch.full((batch_size, 16), 1 / 16)
            likely = torch.nn.functional.one_hot(token_ids, 16).float()
            return likely * self.certainty + (1 - likely) * (1 - self.certainty) / 15

        return predict


def repeated(batch: int, generator: torch.Generator | None = None) -> ImageTokens:
    """Images of one id each, of different lengths."""
    generator = generator or torch.Generator().manual_seed(0)
    ids = torch.randint(16, (batch, 1), generator=generator).expand(-1, 8)
    lengths = torch.randint(1, 9, (batch,), generator=generator)
    lengths[0] = 8
    return ImageTokens(ids * (torch.arange(8) < lengths[:, None]), lengths=lengths, spec=SPEC)


def test_streams_shrink_and_come_back_exactly() -> None:
    tokens = repeated(200)
    tight, coded = tokens.to_bytes(), tokens.to_bytes(Sticky())
    total = int(tokens.lengths.sum())
    # Four bits for each first id, 0.152 for each expected one.
    ideal = (200 * 4 + (total - 200) * -np.log2(0.9)) / 8
    payload = len(coded) - (len(tight) - (4 * total + 7) // 8) - 4
    assert ideal - 1 <= payload <= ideal + 5
    assert ImageTokens.from_bytes(coded, entropy_model=Sticky()).equal(tokens)
    assert ImageTokens.from_bytes(tight, entropy_model=Sticky()).equal(tokens)


def test_unlikely_tokens_are_packed_tightly() -> None:
    ids = torch.randint(16, (20, 8), generator=torch.Generator().manual_seed(1))
    tokens = ImageTokens(ids, spec=SPEC)
    assert tokens.to_bytes(Sticky()) == tokens.to_bytes()
    single = tokens[:1]
    assert ImageTokens.from_bytes(single.to_bytes(Sticky())).equal(single)


@pytest.mark.parametrize("batch", [1, 2, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1, 2 * BATCH_SIZE + 3])
def test_every_batch_size(batch: int) -> None:
    tokens = repeated(batch, torch.Generator().manual_seed(batch))
    ids, lengths = tokens.token_ids.numpy(), tokens.lengths.numpy()
    data = code_ids(ids, lengths, Sticky())
    assert np.array_equal(decode_ids(data, lengths, 8, Sticky()), ids)


def test_another_model_is_refused_before_it_is_asked() -> None:
    class Silent(Sticky):
        def start(self, batch_size: int, num_tokens: int) -> Callable[[Tensor | None], Tensor]:
            raise AssertionError("decoded although it is another model")

    data = repeated(50).to_bytes(Sticky())
    with pytest.raises(TokenStreamError, match="pass the `entropy_model` with the fingerprint 000e6666"):
        ImageTokens.from_bytes(data)
    with pytest.raises(TokenStreamError, match="with the entropy model 000e6666; received another one, 000ccccd"):
        ImageTokens.from_bytes(data, entropy_model=Silent(0.8))


def test_a_model_that_computes_otherwise_is_noticed() -> None:
    data = repeated(50).to_bytes(Sticky())
    elsewhere = Sticky(0.8)
    elsewhere.fingerprint = Sticky().fingerprint
    with pytest.raises(TokenStreamError, match="coded on a machine that rounds differently"):
        ImageTokens.from_bytes(data, entropy_model=elsewhere)


def test_a_malformed_fingerprint_is_refused() -> None:
    model = Sticky()
    model.fingerprint = "sticky"
    with pytest.raises(ValueError, match="8 lower-case hexadecimal characters, received 'sticky'"):
        repeated(3).to_bytes(model)


def test_damage_is_refused() -> None:
    tokens = repeated(12)
    data, model = tokens.to_bytes(Sticky()), Sticky()
    assert data[3] & 0x40
    for length in range(len(data)):
        with pytest.raises(TokenStreamError):
            ImageTokens.from_bytes(data[:length], entropy_model=model)
    for position in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(TokenStreamError):
            ImageTokens.from_bytes(bytes(damaged), entropy_model=model)
    with pytest.raises(TokenStreamError):
        ImageTokens.from_bytes(data + b"\0", entropy_model=model)


def test_models_run_on_one_thread() -> None:
    seen = []

    class Watching(Sticky):
        def start(self, batch_size: int, num_tokens: int) -> Callable[[Tensor | None], Tensor]:
            seen.append(torch.get_num_threads())
            return super().start(batch_size, num_tokens)

    tokens, before = repeated(20), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ImageTokens.from_bytes(tokens.to_bytes(Watching()), entropy_model=Watching()).equal(tokens)
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_cross_entropy_by_hand() -> None:
    ids = np.array([[3, 3, 3], [3, 4, 0]])
    expected = (2 * 4 - 2 * np.log2(0.9) - np.log2(0.1 / 15)) / 5
    assert cross_entropy(ids, np.array([3, 2]), Sticky()) == pytest.approx(expected, rel=1e-6)


def test_the_fingerprint_follows_weights_and_temperature() -> None:
    model = tiny_pipeline().transformer
    first = LlamaGenEntropyModel(model).fingerprint
    assert LlamaGenEntropyModel(model).fingerprint == first
    assert LlamaGenEntropyModel(model, temperature=1.5).fingerprint != first
    with torch.no_grad():
        model.norm.weight[0] += 1
    assert LlamaGenEntropyModel(model).fingerprint != first


def test_streams_without_end_are_refused() -> None:
    # A model that is certain needs no bits at all, so a short stream could ask for any number of tokens.
    spec = TokenSpec("one_d_piece", "0123456789abcdef", (16,), True, None, (64, 64), 2**12)

    class Certain(Sticky):
        max_tokens = 2**12

    tokens = ImageTokens(torch.zeros(1, 2**12, dtype=torch.int64), spec=spec)
    assert tokens.to_bytes(Certain(1 - 1e-6)) == tokens.to_bytes()


def test_tokens_that_do_not_fit_the_model() -> None:
    with pytest.raises(ValueError, match="codebook of 16; received 8 of a codebook of 32"):
        spec = TokenSpec("one_d_piece", "0123456789abcdef", (32,), True, None, (64, 64), 8)
        ImageTokens(torch.zeros(1, 8, dtype=torch.int64), spec=spec).to_bytes(Sticky())
    with pytest.raises(ValueError, match="latents or have several channels"):
        spec = TokenSpec("vae", "0123456789abcdef", None, False, (2, 2), (16, 16), 4)
        ImageTokens(latents=torch.zeros(1, 4, 3), spec=spec).to_bytes(Sticky())


def test_a_generator_codes_what_it_expects() -> None:
    model = tiny_pipeline().transformer.eval()
    entropy_model = LlamaGenEntropyModel(model, temperature=1.0)
    count = model.config.max_tokens
    spec = TokenSpec("one_d_piece", "0123456789abcdef", (model.config.codebook_size,), True, None, (64, 64), count)
    ids = torch.randint(model.config.codebook_size, (5, count), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([count, 1, 2, count, count - 1])
    tokens = ImageTokens(ids * (torch.arange(count) < lengths[:, None]), lengths=lengths, spec=spec)
    # The probabilities are those of one parallel unconditional forward.
    predict = entropy_model.start(5, count)
    seen = [predict(None)] + [predict(tokens.token_ids[:, i]) for i in range(count - 1)]
    features = torch.randn(5, model.config.num_condition_tokens, model.config.caption_dim)
    mask = torch.zeros(5, model.config.num_condition_tokens, dtype=torch.long)
    mask[:, -4:] = 1
    drop = torch.ones(5, dtype=torch.bool)
    with torch.no_grad():
        logits = model(tokens.token_ids, caption_features=features, caption_mask=mask, drop_condition=drop).logits
    torch.testing.assert_close(torch.stack(seen, 1), logits.softmax(-1), atol=1e-5, rtol=1e-4)
    data = code_ids(tokens.token_ids.numpy(), lengths.numpy(), entropy_model)
    assert np.array_equal(decode_ids(data, lengths.numpy(), count, entropy_model), tokens.token_ids.numpy())
    with pytest.raises(ValueError, match="temperature"):
        LlamaGenEntropyModel(model, temperature=0.0)


def test_embedded_models_code_pictures() -> None:
    from tokenizers_img.one_d_piece import OneDPiece

    tokenizer = OneDPiece.from_pretrained("emoji-64")
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    pictures = torch.stack([ramp, ramp.mT, torch.ones(3, 64, 64), torch.zeros(3, 64, 64)])
    tokens = tokenizer.encode(pictures, 32)
    entropy_model = LlamaGenEntropyModel(LlamaGen.from_pretrained("emoji-64-1d"))
    data = tokens.to_bytes(entropy_model)
    assert ImageTokens.from_bytes(data, entropy_model=entropy_model).equal(tokens)
    assert len(data) <= len(tokens.to_bytes())


def test_generators_of_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="TokenShuffle writes 4 at once; pass a LlamaGen"):
        LlamaGenEntropyModel(tiny_token_shuffle())
