"""FlexTok against a plain path of the published design, over the same weights: time, memory, and work by count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmsdk.bench.measure import PeakMemory
from mmsdk.bench.runner import BenchResult
from mmsdk.errors import MMSDKError
from tokenizers_img.flextok import PUBLISHED_VAE, FlexTok, projected_guidance, register_mask

# As wide as the smallest published size, on which the ratios depend, but with few layers and a narrow VAE.
SHORT_SIZE: dict[str, Any] = {
    "vae_config": PUBLISHED_VAE | {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 8},
    "encoder_shape": (768, 3, 12),
    "decoder_shape": (768, 1, 12),
}
PUBLISHED_STEPS = 20
VELOCITY_TOLERANCE = 1e-5
# Guidance multiplies differences of velocities, and the VAE those of latents.
IMAGE_TOLERANCE = 1e-3


class PlainFlexTok:
    """The published path, written anew over the weights of a `FlexTok`.

    The images of a batch are packed in one sequence, and a mask keeps them apart. All registers are encoded, whatever
    is kept of them, and all are in every forward of the decoder. What the tokens and the time tell the decoder is
    computed anew in every forward, and the time's parameters are expanded to every position. Whatever this design
    allows is done well: fused attention, a mask that is made once, no copies between the steps.

    Args:
        model: read, not changed; its positional embeddings are sinusoids.
        packed: False keeps a batch as it is, without anything masked between images.
    """

    def __init__(self, model: FlexTok, packed: bool = True) -> None:
        self.model = model
        self.packed = packed

    def features(self, latents: Tensor) -> Tensor:
        """Return what is quantized, `(batch, num_registers, len(fsq_levels))`, for the latents of the VAE."""
        encoder: Any = self.model.register_encoder
        patches = encoder.enc_patch_emb(latents) + encoder.enc_posemb_module["posembs"].flatten(2).mT
        registers = encoder.enc_register_module["registers"].expand(len(latents), -1, -1)
        x = self._pack(torch.cat([patches, registers], 1))
        mask = self._mask(len(latents), register_mask(patches.shape[1], registers.shape[1]))
        for block in encoder.enc_transformer["blocks"]:
            x = block(x, mask)
        x = x.view(len(latents), -1, x.shape[-1])[:, patches.shape[1] :]
        return encoder.enc_to_latents["proj"](F.layer_norm(x, x.shape[-1:]))

    def velocity(
        self, x: Tensor, times: Tensor, codes: Tensor, lengths: Tensor, drop: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the velocity `(batch, channels, h, w)`.

        Args:
            x: noised latents, of the same shape.
            times: `(batch,)` in [0, 1].
            codes: `(batch, k, len(fsq_levels))`, k at least the largest length.
            lengths: `(batch,)`, tokens of each image.
            drop: `(batch,)`, True for images without condition.
            mask: what `decoder_mask` returned for this batch (default: it is made).
        """
        network: Any = self.model.flow_decoder
        patches = network.dec_noise_patch_emb(x) + network.dec_patches_posemb_module["posembs"].flatten(2).mT
        registers = self._registers(codes, lengths, drop)
        counts = torch.tensor([patches.shape[1], registers.shape[1]])
        hidden = self._pack(torch.cat([patches, registers], 1))
        mask = self.decoder_mask(len(x)) if mask is None else mask
        embedded = network.time_embedding(times)
        for block in network.blocks:
            table = rearrange(block.modulation(embedded), "b g n 1 d -> n b g d")
            expanded = [self._pack(rows) for rows in table.repeat_interleave(counts, 2)]
            gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = expanded
            normed = F.layer_norm(hidden, hidden.shape[-1:]) * (1 + scale_attn) + shift_attn
            hidden = hidden + gate_attn * block.attn(normed, normed, mask)
            normed = F.layer_norm(hidden, hidden.shape[-1:]) * (1 + scale_mlp) + shift_mlp
            hidden = hidden + gate_mlp * block.mlp(normed)
        hidden = hidden.view(len(x), -1, hidden.shape[-1])[:, : patches.shape[1]]
        velocity = network.dec_to_patches(hidden, network.dec_to_patches.modulation(embedded))
        size = network.dec_noise_patch_emb.patch_size
        height = x.shape[-2] // size
        return rearrange(velocity, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=height, p1=size, p2=size)

    @torch.no_grad()
    def sample(
        self, codes: Tensor, lengths: Tensor, noise: Tensor, num_inference_steps: int, guidance_scale: float
    ) -> Tensor:
        """Return latents `(batch, channels, h, w)`; arguments as those of `FlexTok.sample_latents`, with its APG."""
        keep, drop = (torch.full((len(noise),), value) for value in (False, True))
        mask, x = self.decoder_mask(len(noise)), noise
        running: Tensor | float = 0.0
        for step in range(num_inference_steps, 0, -1):
            times = torch.full((len(noise),), step / num_inference_steps)
            conditional = self.velocity(x, times, codes, lengths, keep, mask)
            unconditional = self.velocity(x, times, codes, lengths, drop, mask)
            velocity, running = projected_guidance(conditional, unconditional, guidance_scale, running)
            x = x - velocity / num_inference_steps
        return x

    def decoder_mask(self, batch: int) -> Tensor | None:
        """Return what keeps the images of a packed batch apart; None where nothing has to."""
        if not self.packed:
            return None
        network: Any = self.model.flow_decoder
        length = network.dec_patches_posemb_module["posembs"][0, 0].numel() + network.num_registers
        return self._mask(batch, torch.ones(length, length, dtype=torch.bool))

    def _registers(self, codes: Tensor, lengths: Tensor, drop: Tensor) -> Tensor:
        network: Any = self.model.flow_decoder
        total = network.num_registers
        codes = F.pad(codes, (0, 0, 0, total - codes.shape[1]))
        registers = network.dec_from_latents["proj"](codes) + network.dec_registers_posemb_module["posembs"][0].mT
        tail = torch.arange(total) >= lengths[:, None]
        registers = torch.where(tail[..., None], network.dec_nested_dropout["dropout_mask_token"], registers)
        return torch.where(drop[:, None, None], network.dec_latent_dropout["nullcond"], registers)

    def _pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[None] if self.packed else x

    def _mask(self, batch: int, allowed: Tensor) -> Tensor:
        if self.packed:
            allowed = torch.block_diag(*[allowed] * batch)
        # What attention adds, so that it does not convert the mask in every layer.
        return torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)


# ---------------------------------------------------------------- counting


def _count_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of operations, which by itself passes over fused attention on the CPU."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: _count_attention})


def transformer_flops(
    model: FlexTok, num_tokens: int, batch_size: int, packed: bool = True
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Count by formula the operations of the transformer blocks for a batch, all but what makes adaLN parameters.

    Args:
        model: read only for its sizes; may be on the meta device.
        num_tokens: tokens of each image.
        batch_size: images.
        packed: whether the plain path attends to the whole batch, masked.

    Returns:
        For the encoder, ours and those of the plain path; for a guided step of the decoder, ours and plain.
    """

    def block(width: int, queries: int, keys: int, attended: int | None = None) -> int:
        projections = 4 * width * width * (queries + keys)
        mlp = 6 * width * (8 * width // 3) * queries
        return projections + mlp + 4 * width * queries * (attended or keys)

    patches, registers = _num_patches(model), model.config.num_registers
    total = patches + registers
    attended = batch_size * total if packed else total
    width, layers, _ = model.config.encoder_shape
    length = patches + num_tokens
    ours = (layers - 1) * block(width, length, length) + block(width, num_tokens, length)
    encoder = batch_size * ours, batch_size * layers * block(width, total, total, attended)
    width, layers, _ = model.config.decoder_shape
    ours = sum(block(width, length, length) for length in _decoder_lengths(model, num_tokens))
    decoder = batch_size * layers * ours, batch_size * layers * 2 * block(width, total, total, attended)
    return encoder, decoder


def _num_patches(model: FlexTok) -> int:
    return (model.config.image_size // (model.vae.downsample * model.config.patch_size)) ** 2


def _decoder_lengths(model: FlexTok, num_tokens: int) -> tuple[int, int]:
    """Return how many positions of an image our decoder runs over, with its tokens and without."""
    patches = _num_patches(model)
    return patches + min(num_tokens + 1, model.config.num_registers), patches + 1


def _published_rows(preset: str, num_tokens: int, batch_size: int, packed: bool) -> list[list[Any]]:
    """Count for a published size what the measured rows count."""
    with torch.device("meta"), torch.no_grad():
        model = FlexTok.preset(preset)
        with flop_counter() as to_latents:
            latents = model.encode_latents(torch.empty(1, 3, model.config.image_size, model.config.image_size))
        with flop_counter() as to_pixels:
            model.decode_latents(latents)
    encoder, step = transformer_flops(model, num_tokens, batch_size, packed)
    decoder = [PUBLISHED_STEPS * flops for flops in step]
    rows = []
    for only, both, flops, vae in (
        ("encoder", "tokenize", encoder, to_latents),
        ("flow decoder", "detokenize", decoder, to_pixels),
    ):
        shared = batch_size * vae.get_total_flops()
        for operation, counts in ((only, flops), (both, [shared + count for count in flops])):
            rows.append([f"{preset}, counted", operation, None, None, None, *_counts(*counts), None, None])
    return rows


# ---------------------------------------------------------------- measuring


Parts = Sequence[Callable[[Any], Any]]


@dataclass
class Work:
    """What one side did, part by part.

    Attributes:
        output: of the last part.
        flops: operations of each part.
        peaks: bytes of each part.
        seconds: of each part, for each timed run.
    """

    output: Tensor
    flops: list[int]
    peaks: list[int]
    seconds: list[list[float]]


def _count(parts: Parts, value: Tensor, model: nn.Module) -> Work:
    """Run parts one after the other, each on what the one before returned, and count; this warms up, too."""
    work = Work(value, [], [], [[] for _ in parts])
    for part in parts:
        with flop_counter() as counter, PeakMemory([value, *model.parameters(), *model.buffers()]) as memory:
            work.output = part(value)
        value = work.output
        work.flops.append(counter.get_total_flops())
        work.peaks.append(memory.peak)
    return work


def _time(sides: Sequence[tuple[Parts, Work]], value: Tensor, repeats: int) -> None:
    """Time the sides in turn, so that what else the machine does hits both alike."""
    for repeat in range(repeats):
        # Each goes first every other time.
        for parts, work in sides if repeat % 2 == 0 else reversed(sides):
            current: Any = value
            for part, seconds in zip(parts, work.seconds, strict=True):
                started = time.perf_counter()
                current = part(current)
                seconds.append(time.perf_counter() - started)


def _row(size: str, operation: str, sides: Sequence[Work], parts: Sequence[int]) -> list[Any]:
    """Compare what some parts took together."""
    ours, plain = (
        statistics.median(sum(run) for run in zip(*(work.seconds[i] for i in parts), strict=True)) for work in sides
    )
    flops = (sum(work.flops[i] for i in parts) for work in sides)
    peaks = (max(work.peaks[i] for i in parts) / 2**20 for work in sides)
    return [size, operation, ours, plain, plain / ours, *_counts(*flops), *peaks]


def _counts(ours: int, plain: int) -> list[float]:
    return [ours / 1e9, plain / 1e9, plain / ours]


def flextok(
    preset: str | None = None,
    num_tokens: int = 32,
    batch_size: int = 8,
    num_inference_steps: int = 2,
    guidance_scale: float = 7.5,
    packed: bool = True,
    repeats: int = 3,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Tokenize and detokenize random images on both sides in turn, and check that the results agree.

    Args:
        preset: published size, such as `d12_d12`; by default one of its width with 3 layers in the encoder, 1 in the
            decoder and a narrow VAE, which takes a minute or two on one core. All have random weights.
        num_tokens: tokens of each image.
        batch_size: images at once.
        num_inference_steps: of the sampler, each of which costs the same; the published call makes 20.
        guidance_scale: of adaptive projected guidance; other than 1, so that both need unconditional passes.
        packed: False gives the plain path real batches: what a kernel would reach that skips what is masked.
        repeats: timed runs of each side, after one that counts.
        seed: of weights, images and noise.
        output_dir: not used.

    Raises:
        MMSDKError: the two sides gave different ids, velocities or images.
        ValueError: `guidance_scale` is 1, which needs no unconditional passes, or a count is below 1.
    """
    if guidance_scale == 1:
        raise ValueError("guidance_scale must differ from 1: without guidance there is no unconditional pass.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    model, label = _random_model(preset, seed)
    if not 1 <= num_tokens <= model.max_tokens:
        raise ValueError(f"num_tokens must lie in 1..{model.max_tokens}, got {num_tokens}.")
    plain = PlainFlexTok(model, packed)
    generator = torch.Generator().manual_seed(seed)
    size = model.config.image_size
    images = torch.rand(batch_size, 3, size, size, generator=generator)
    noise, lengths = model.draw_noise(batch_size, generator), torch.full((batch_size,), num_tokens)
    sampler: tuple[Any, ...] = lengths, noise, num_inference_steps, guidance_scale
    quantize, dequantize = model.quantize.quantize, model.quantize.dequantize
    with torch.no_grad():
        to_ids: tuple[Parts, Parts] = (
            (model.encode_latents, lambda latents: quantize(model.encode_features(latents, num_tokens))),
            (model.encode_latents, lambda latents: quantize(plain.features(latents))[:, :num_tokens]),
        )
        encoding = [_count(parts, images, model) for parts in to_ids]
        ids = encoding[0].output
        _check_ids(ids, encoding[1].output)
        velocity_error = _check_velocities(model, plain, dequantize(ids), lengths, noise)
        to_images: tuple[Parts, Parts] = (
            (lambda ids: model.sample_latents(dequantize(ids), *sampler), model.decode_latents),
            (lambda ids: plain.sample(dequantize(ids), *sampler), model.decode_latents),
        )
        decoding = [_count(parts, ids, model) for parts in to_images]
        image_error = _check_close("images", decoding[0].output, decoding[1].output, IMAGE_TOLERANCE)
        _time(list(zip(to_ids, encoding, strict=True)), images, repeats)
        _time(list(zip(to_images, decoding, strict=True)), ids, repeats)
    table = [
        _row(label, "encoder", encoding, [1]),
        _row(label, "tokenize", encoding, [0, 1]),
        _row(label, "flow decoder", decoding, [0]),
        _row(label, "detokenize", decoding, [0, 1]),
        *(row for name in FlexTok.presets for row in _published_rows(name, num_tokens, batch_size, packed)),
    ]
    with_tokens, without = _decoder_lengths(model, num_tokens)
    notes = [
        f"{batch_size} images of {size} x {size} pixels, {num_tokens} of {model.max_tokens} tokens each, "
        f"{num_inference_steps} steps with guidance (APG) {guidance_scale:g}; random weights, images and noise. "
        f"Medians of {repeats} runs of each side, in turn.",
        f"Checked before: equal ids; velocities differ by {velocity_error:.1e} (accepted: {VELOCITY_TOLERANCE:g}), "
        f"images, of range 1, by {image_error:.1e} (accepted: {IMAGE_TOLERANCE:g}).",
        "plain: the published design over the same weights: all registers in every pass, "
        + ("the batch packed in one masked sequence, " if packed else "here in real batches, ")
        + "what the tokens and the time tell computed anew in every pass.",
        "encoder: latents to ids; flow decoder: ids to latents. tokenize and detokenize add the VAE, the same on both "
        "sides.",
        f"Both sides run {2 * num_inference_steps} passes of the flow decoder: plain over "
        f"{_num_patches(model) + model.max_tokens} positions of each image, ours over {with_tokens} with tokens and "
        f"{without} without.",
        "MB: most bytes of tensors alive at once, without weights.",
        f"counted: by formula, the transformer blocks and the VAE at the published {PUBLISHED_STEPS} steps.",
    ]
    columns = [
        "size", "operation", "ours s", "plain s", "ratio", "GFLOP ours", "GFLOP plain", "GFLOP ratio", "MB ours",
        "MB plain",
    ]  # fmt: skip
    return BenchResult("flextok", columns, table, notes)


def _random_model(preset: str | None, seed: int) -> tuple[FlexTok, str]:
    """Return a model without zeros, as it would be after training, and its name in the table."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FlexTok(**SHORT_SIZE) if preset is None else FlexTok.preset(preset)
        for parameter in model.parameters():
            # What a new model starts from would make every output zero.
            if parameter.ndim == 2 and not bool(parameter.any()):
                nn.init.xavier_uniform_(parameter)
    if preset is not None:
        return model.eval(), preset
    (width, encoder_layers, _), (_, decoder_layers, _) = SHORT_SIZE["encoder_shape"], SHORT_SIZE["decoder_shape"]
    return model.eval(), f"{width} wide, {encoder_layers} + {decoder_layers} layers"


def _check_ids(ours: Tensor, plain: Tensor) -> None:
    if not torch.equal(ours, plain):
        row, position = (ours != plain).nonzero()[0].tolist()
        raise MMSDKError(
            f"Both sides must give the same ids, but token {position} of image {row} is {int(ours[row, position])} "
            f"with ours and {int(plain[row, position])} with the plain path: their speeds cannot be compared."
        )


def _check_velocities(model: FlexTok, plain: PlainFlexTok, codes: Tensor, lengths: Tensor, x: Tensor) -> float:
    """Compare with tokens and without, half way."""
    errors, network = [], model.flow_decoder
    times = torch.full((len(x),), 0.5)
    for value in (False, True):
        drop = torch.full((len(x),), value)
        ours = network(x, *network.registers(codes, lengths, drop), network.modulations(times[:1]))[0]
        errors.append(
            _check_close("velocities", ours, plain.velocity(x, times, codes, lengths, drop), VELOCITY_TOLERANCE)
        )
    return max(errors)


def _check_close(what: str, ours: Tensor, plain: Tensor, tolerance: float) -> float:
    """Return the largest difference.

    Raises:
        MMSDKError: it is above `tolerance`, or no number.
    """
    error = float((ours - plain).abs().max())
    if not error <= tolerance:
        raise MMSDKError(
            f"The {what} of both sides differ by {error:.2g}, more than {tolerance:g}: their speeds cannot be compared."
        )
    return error
