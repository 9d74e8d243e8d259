"""Token-Shuffle: windows of grid tokens share one position of the transformer.

Ma et al., 2025, "Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models" (arXiv
2504.17789).
No code was published; what the paper leaves open is an argument here.
"""

from __future__ import annotations

import math

import torch
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from generators.guidance import combine
from generators.llamagen import LlamaGen, LlamaGenState
from tokenizers_img.base import ImageTokenizer

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
NORMS = ("pre", "post", "none")


def _mlp(width: int, hidden_size: int, out_size: int, activation: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden_size), ACTIVATIONS[activation](), nn.Linear(hidden_size, out_size))


class ResidualBlock(nn.Module):
    """A two-layer MLP beside the identity."""

    def __init__(self, width: int, hidden_size: int, activation: str, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.is_post = norm == "post"
        self.norm = nn.Identity() if norm == "none" else nn.RMSNorm(width, eps=norm_eps)
        self.mlp = _mlp(width, hidden_size, width, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        return self.norm(x + self.mlp(x)) if self.is_post else x + self.mlp(self.norm(x))


class TokenShuffle(LlamaGen):
    """LlamaGen that reads and writes a grid window by window: its sequence is `shuffle_size ** 2` times shorter.

    The embeddings of the tokens of a window are made narrow, laid side by side and mixed; behind the transformer the
    window is spread out again, and all its tokens are predicted at once from the windows before it. With
    `shuffle_size=1` nothing but the z-loss is added, and this is LlamaGen with its weights and outputs.

    Ids are in raster order everywhere but in `prefix`, `advance` and `step`, which take them window by window, those of
    a window in raster order (`to_sequence`); so are `uniforms` and the logits of a trace, `(batch, tokens_per_step,
    codebook_size)` per step. What a generation yields or calls back with are all positions, -1 where there is no id
    yet. The tokens of a window are drawn without knowing each other: draw conservatively, or guide with
    `HalfLinearGuidance`, as in the paper.

    Args:
        shuffle_size: tokens along each side of a window; divides the side of the grid, and its square `hidden_size`.
        shuffle_blocks: residual MLPs that mix a window, before and behind the transformer each.
        shuffle_ratio: width of the hidden layers of all these MLPs, as a multiple of `hidden_size`.
        shuffle_activation: `"gelu"`, `"silu"` or `"relu"`.
        shuffle_norm: where the residual MLPs normalise: `"pre"` (their input), `"post"` (the sum) or `"none"`.
        z_loss_weight: weight of the mean squared log of the softmax's denominator in the loss, which keeps it near 1.
        hidden_size: this and the others: see `LlamaGen`.
        num_layers: see there.
        num_heads: see there.
        intermediate_size: see there.
        multiple_of: see there.
        codebook_size: see there.
        max_tokens: see there; a square number where windows hold several tokens.
        condition: see there.
        num_classes: see there.
        caption_dim: see there.
        num_condition_tokens: see there.
        positions: see there; positions are those of windows.
        rope_base: see there.
        norm_eps: see there.
        condition_dropout: see there.
        token_dropout: see there.
        residual_dropout: see there.
        feed_forward_dropout: see there.
        initializer_range: see there; the MLPs of the windows start as `nn.Linear` does.
        padding_attends: see there.

    Raises:
        ValueError: sizes are not positive or do not fit each other, or a name is unknown.
    """

    registry_name = "token_shuffle"

    @register_to_config
    def __init__(
        self,
        shuffle_size: int = 2,
        shuffle_blocks: int = 2,
        shuffle_ratio: float = 1.0,
        shuffle_activation: str = "gelu",
        shuffle_norm: str = "pre",
        z_loss_weight: float = 1e-5,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int | None = None,
        multiple_of: int = 256,
        codebook_size: int = 16384,
        max_tokens: int = 256,
        condition: str = "class",
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        num_condition_tokens: int = 1,
        positions: str = "rope2d",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        condition_dropout: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        feed_forward_dropout: float = 0.1,
        initializer_range: float = 0.02,
        padding_attends: bool = False,
    ) -> None:
        side = math.isqrt(max(max_tokens, 0))
        if shuffle_size != 1 and side**2 != max_tokens:
            raise ValueError(f"Windows need a square grid of tokens, got max_tokens={max_tokens}.")
        if not isinstance(shuffle_size, int) or shuffle_size < 1 or side % shuffle_size:
            divisors = [size for size in range(1, side + 1) if side % size == 0]
            raise ValueError(
                f"shuffle_size must divide the side of the grid, {side} tokens: one of {divisors}; got {shuffle_size}."
            )
        if hidden_size % shuffle_size**2:
            raise ValueError(f"hidden_size must divide by the {shuffle_size**2} tokens of a window, got {hidden_size}.")
        if shuffle_blocks < 0:
            raise ValueError(f"shuffle_blocks must be at least 0, got {shuffle_blocks}.")
        if not 0 <= z_loss_weight < math.inf:
            raise ValueError(f"z_loss_weight must be finite and at least 0, got {z_loss_weight}.")
        if not 1 <= shuffle_ratio * hidden_size < math.inf:
            raise ValueError(
                f"shuffle_ratio must be finite and leave hidden layers a width of 1 or more, got {shuffle_ratio} of "
                f"hidden_size={hidden_size}."
            )
        if shuffle_activation not in ACTIVATIONS:
            raise ValueError(f"shuffle_activation must be one of {list(ACTIVATIONS)}, got {shuffle_activation!r}.")
        if shuffle_norm not in NORMS:
            raise ValueError(f"shuffle_norm must be one of {list(NORMS)}, got {shuffle_norm!r}.")
        self.tokens_per_step = shuffle_size**2
        super().__init__(
            hidden_size, num_layers, num_heads, intermediate_size, multiple_of, codebook_size, max_tokens, condition,
            num_classes, caption_dim, num_condition_tokens, positions, rope_base, norm_eps, condition_dropout,
            token_dropout, residual_dropout, feed_forward_dropout, initializer_range, padding_attends,
        )  # fmt: skip
        self._side = side
        if self.tokens_per_step == 1:
            return
        hidden, narrow = int(shuffle_ratio * hidden_size), hidden_size // self.tokens_per_step
        block = (hidden_size, hidden, shuffle_activation, shuffle_norm, norm_eps)
        self.compress = _mlp(hidden_size, hidden, narrow, shuffle_activation)
        self.mix_inputs = nn.Sequential(*(ResidualBlock(*block) for _ in range(shuffle_blocks)))
        self.mix_outputs = nn.Sequential(*(ResidualBlock(*block) for _ in range(shuffle_blocks)))
        self.expand = _mlp(narrow, hidden, hidden_size, shuffle_activation)

    def check_tokenizer(self, image_tokenizer: ImageTokenizer) -> None:
        """Check that this transformer writes the tokens of an image tokenizer, and that they lie in its grid.

        Raises:
            ValueError: it does not, or they do not.
        """
        super().check_tokenizer(image_tokenizer)
        if self.tokens_per_step > 1 and image_tokenizer.grid != (self._side, self._side):
            raise ValueError(
                f"Windows need a grid of {self._side} x {self._side} tokens, but that of "
                f"{type(image_tokenizer).__name__} is {image_tokenizer.grid}; use LlamaGen for tokens without a grid."
            )

    # ------------------------------------------------------------------------------------------------ order

    def to_sequence(self, token_ids: Tensor) -> Tensor:
        """Bring ids `(batch, max_tokens)` from raster order into that of windows.

        Raises:
            ValueError: these are not the tokens of whole images.
        """
        size, side = self.config.shuffle_size, self._side
        if size == 1:
            return token_ids
        if token_ids.ndim != 2 or token_ids.shape[1] != side**2:
            raise ValueError(
                f"Windows need all {side**2} tokens of an image, of the grid that was trained; got "
                f"{tuple(token_ids.shape)}."
            )
        windows = token_ids.unflatten(1, (side // size, size, side // size, size)).transpose(2, 3)
        return windows.reshape(len(token_ids), -1)

    def from_sequence(self, values: Tensor) -> Tensor:
        """Undo `to_sequence`, for values `(batch, max_tokens, ...)`."""
        size, side = self.config.shuffle_size, self._side
        if size == 1:
            return values
        grid = values.unflatten(1, (side // size, side // size, size, size)).transpose(2, 3)
        return grid.reshape(values.shape)

    def _written(self, token_ids: Tensor, count: int) -> Tensor:
        """Return ids in raster order, -1 where none is written yet; with `shuffle_size=1` the ids so far."""
        if self.tokens_per_step == 1:
            return super()._written(token_ids, count)
        known = torch.arange(self._side**2, device=token_ids.device) < count
        return self.from_sequence(torch.where(known, token_ids, -1))

    # ------------------------------------------------------------------------------------------------ windows

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Embed windows `(batch, length * tokens_per_step)` as `(batch, length, hidden_size)`, without positions.

        Raises:
            ValueError: a window is incomplete.
        """
        if token_ids.shape[1] % self.tokens_per_step:
            raise ValueError(f"Windows hold {self.tokens_per_step} tokens each, got ids {tuple(token_ids.shape)}.")
        embedded = super().embed_tokens(token_ids)
        if self.tokens_per_step == 1:
            return embedded
        narrow = self.compress(embedded)
        return self.mix_inputs(narrow.unflatten(1, (-1, self.tokens_per_step)).flatten(2))

    def predict(self, hidden: Tensor) -> Tensor:
        """Map `(..., length, hidden_size)` to the logits of the windows' tokens, see `LlamaGen.predict`."""
        if self.tokens_per_step == 1:
            return super().predict(hidden)
        spread = self.mix_outputs(hidden).unflatten(-1, (self.tokens_per_step, -1))
        return super().predict(self.expand(spread)).flatten(-3, -2)

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: LlamaGenState) -> Tensor:
        """Append one window to every row; return the logits of the next one.

        Args:
            token_ids: `(rows, tokens_per_step)`; with `shuffle_size=1` `(rows,)`, as of LlamaGen.
            state: changed in place.

        Returns:
            `(rows, tokens_per_step, codebook_size)`; with `shuffle_size=1` `(rows, codebook_size)`.

        Raises:
            ValueError: this is not one window for each row, or the state is full.
        """
        if self.tokens_per_step == 1:
            return super().step(token_ids, state)
        if token_ids.shape != (state.num_rows, self.tokens_per_step):
            raise ValueError(
                f"token_ids must be ({state.num_rows}, {self.tokens_per_step}), a window per row, got "
                f"{tuple(token_ids.shape)}."
            )
        return self.forward_block(token_ids, state)

    def guided_logits(self, hidden: Tensor, batch: int, scale: float) -> Tensor:
        """Return the logits of the next window, `(batch, tokens_per_step, codebook_size)`; see `LlamaGen`."""
        if self.tokens_per_step == 1:
            return super().guided_logits(hidden, batch, scale)
        # What spreads a window is not linear, so that logits are guided and not its input.
        rows = hidden if scale != 1.0 else hidden[:batch]
        logits = self.predict(rows[:, None]).float()
        return logits if scale == 1.0 else combine(logits[:batch], logits[batch:], scale)

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of LlamaGen and the weighted z-loss."""
        loss = super().token_loss(logits, labels)
        if not self.config.z_loss_weight:
            return loss
        z = torch.logsumexp(logits.flatten(0, 1), -1)[labels.flatten() != -100]
        return loss + self.config.z_loss_weight * z.square().mean()

    # ------------------------------------------------------------------------------------------------ editing

    def _check_num_tokens(self, num_tokens: int | None) -> int:
        count = super()._check_num_tokens(num_tokens)
        if self.tokens_per_step > 1 and count != self.config.max_tokens:
            raise ValueError(f"Windows need all {self.config.max_tokens} tokens of an image, got num_tokens={count}.")
        return count

    def _check_prefix(self, prefix: Tensor, num_tokens: int) -> int:
        length = super()._check_prefix(prefix, num_tokens)
        if length % self.tokens_per_step:
            raise ValueError(
                f"prefix must hold whole windows of {self.tokens_per_step} tokens, got {tuple(prefix.shape)}."
            )
        return length

    def inpainting(self, token_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the argument of a generation that writes anew from the first window with a masked token.

        Args:
            token_ids: `(batch, max_tokens)`, in raster order.
            mask: bool `(batch, max_tokens)`.

        Raises:
            ValueError: nothing is masked, or the images of a batch begin to differ at different windows.
        """
        windows = self.to_sequence(mask).unflatten(1, (-1, self.tokens_per_step)).any(-1)
        touched = windows.repeat_interleave(self.tokens_per_step, 1)
        return super().inpainting(self.to_sequence(token_ids), touched)
