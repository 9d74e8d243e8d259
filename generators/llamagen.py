"""LlamaGen: a decoder-only transformer that writes image tokens one after another.

Sun et al., 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Generator, Tensor, nn

from generators.base import Trace
from generators.guidance import Guidance, IntervalGuidance, combine, make_guidance
from generators.layers import Linear
from generators.speculation import DRAFT_SLOTS, ConditionedDrafter, Conditions, LlamaGenTarget, speculate
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.sampling import check_sampling, draw_uniforms, sample_ids
from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.loading import load_into, load_original
from mmsdk.modeling import PretrainedModel
from tokenizers_img.base import ImageTokenizer

PRESETS: dict[str, tuple[int, int, int]] = {
    # name: layers, heads, hidden size
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "XXXL": (48, 40, 2560),
    "1B": (22, 32, 2048),
    "3B": (24, 32, 3200),
    "7B": (32, 32, 4096),
}

# The names that published configurations use, and ours.
_PUBLISHED_NAMES = {
    "dim": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "vocab_size": "codebook_size",
    "block_size": "max_tokens",
    "cls_token_num": "num_condition_tokens",
    "model_type": "condition",
    "class_dropout_prob": "condition_dropout",
    "token_dropout_p": "token_dropout",
    "resid_dropout_p": "residual_dropout",
    "ffn_dropout_p": "feed_forward_dropout",
}
_CONDITIONS = {"c2i": "class", "t2i": "text"}

# LANTERN publishes LlamaGen (and its draft head) in the layout of transformers' Llama: other names, and other matrices.
_LLAMA_KEYS = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.cls_embedding.": "cls_embedding.",
    "model.layers.": "layers.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    ".self_attn.": ".attention.",
    ".o_proj.": ".wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}
_LLAMA_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "codebook_size",
    "block_size": "max_tokens",
    "cls_token_num": "num_condition_tokens",
}


@dataclass
class LlamaGenForwardOutput(BaseOutput):
    """What `LlamaGen.forward` returns.

    Attributes:
        logits: `(batch, num_tokens, codebook_size)`; those at i predict token i from the condition and the ones before.
        loss: scalar mean cross entropy, where labels were given.
        hidden_states: `(batch, num_condition_tokens + num_tokens - 1, hidden_size)`, where asked for: of the last layer
            after its norm, the condition included.
    """

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: Tensor | None = None


@dataclass
class LlamaGenOutput(BaseOutput):
    """What `LlamaGen.generate` returns.

    Attributes:
        token_ids: `(batch, num_tokens)` int64.
        trace: what was executed.
    """

    token_ids: Tensor
    trace: Trace


class LayerCache(NamedTuple):
    """Keys and values of a layer, `(rows, num_heads, capacity, head_dim)`, and the slot where the next block begins."""

    keys: Tensor
    values: Tensor
    start: int


class LlamaGenState:
    """Keys and values of a batch of sequences, preallocated; every row has the same length.

    A block of tokens is appended by `LlamaGen.advance`, then kept, or cut by `rollback`, or reduced to one path of a
    tree by `commit`. All methods change the state in place.

    Args:
        cache: `(num_layers, 2, rows, num_heads, capacity, head_dim)`, keys and values, not initialised.
        condition_length: slots that the condition fills.
        position_offset: position of slot 0; above 0 where padding that all rows share was left out.
        key_bias: `(rows, 1, 1, capacity)`, 0 for slots to attend to, -inf for padding; None without padding.

    Attributes:
        length: number of slots that are filled.
        block_start: slot where the last block begins.
        condition_hidden_states: `(rows, condition_length, hidden_size)`, what the model made of the condition.
    """

    condition_hidden_states: Tensor

    def __init__(self, cache: Tensor, condition_length: int, position_offset: int, key_bias: Tensor | None) -> None:
        self.condition_length = condition_length
        self.position_offset = position_offset
        self.key_bias = key_bias
        self.length = 0
        self.block_start = 0
        self._set_cache(cache)

    def _set_cache(self, cache: Tensor) -> None:
        self._cache = cache
        # Indexing costs microseconds per layer and step, so the views are made once.
        self._layers = [(layer[0], layer[1]) for layer in cache]

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer, to be written from the current length on."""
        keys, values = self._layers[index]
        return LayerCache(keys, values, self.length)

    @property
    def condition_hidden(self) -> Tensor:
        """`(rows, hidden_size)`; `model.predict` of it gives the logits of the first token."""
        return self.condition_hidden_states[:, -1]

    @property
    def num_rows(self) -> int:
        """Number of sequences, unconditional ones included."""
        return self._cache.shape[2]

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._cache.shape[4]

    @property
    def num_tokens(self) -> int:
        """Image tokens that are held."""
        return self.length - self.condition_length

    def append(self, size: int) -> None:
        """Count `size` slots, which the layers have written, as filled."""
        self.block_start, self.length = self.length, self.length + size

    def commit(self, path: Sequence[int] | Tensor) -> None:
        """Keep only the positions `path` `(k,)` of the last block, in that order; offsets count from its start.

        Raises:
            ValueError: an offset is outside the last block.
        """
        offsets = torch.as_tensor(path, dtype=torch.int64, device=self._cache.device)
        size = self.length - self.block_start
        kept = len(offsets)
        if kept and not 0 <= int(offsets.min()) <= int(offsets.max()) < size:
            raise ValueError(f"The path must stay within the last block of {size} positions, got {offsets.tolist()}.")
        if offsets.tolist() != list(range(kept)):
            moved = self._cache.index_select(-2, self.block_start + offsets)
            self._cache.narrow(-2, self.block_start, kept).copy_(moved)
        self.length = self.block_start + kept

    def commit_rows(self, paths: Tensor, starts: Tensor) -> None:
        """Move positions of the last block, other ones in each row, to where each row goes on.

        The state then ends where the longest row does; of shorter ones, the slots behind them mean nothing.

        Args:
            paths: `(rows, k)` int64, offsets from the start of the block; after a row's own, any.
            starts: `(rows,)` int64, slot that each row's first position moves to.
        """
        layers, parts, rows, heads, _, width = self._cache.shape
        steps = torch.arange(paths.shape[1], device=paths.device)
        source, target = (
            slots[:, None, :, None].expand(layers, parts, rows, heads, -1, width)
            for slots in (self.block_start + paths, starts[:, None] + steps)
        )
        self._cache.scatter_(-2, target, self._cache.gather(-2, source))

    def rollback(self, length: int) -> None:
        """Forget every slot from `length` on.

        Raises:
            ValueError: `length` is above the current length, or would cut into the condition.
        """
        if not self.condition_length <= length <= self.length:
            raise ValueError(
                f"Can roll back to lengths from {self.condition_length} (the condition) to {self.length}, got {length}."
            )
        self.length = length
        self.block_start = min(self.block_start, length)

    def select_rows(self, rows: slice | Sequence[int] | Tensor) -> None:
        """Keep only these rows, in that order; a slice copies nothing."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self._cache.device)
        self._set_cache(self._cache[:, :, index])
        self.condition_hidden_states = self.condition_hidden_states[index]
        if self.key_bias is not None:
            self.key_bias = self.key_bias[index]


def rotary_table(grid_size: int, head_dim: int, base: float = 10000.0, num_condition_tokens: int = 0) -> Tensor:
    """Return the rotations of a square grid in raster order, complex64 `(num_condition_tokens + grid, head_dim / 2)`.

    The first half of the pairs turns with the row, the second half with the column. Condition tokens get 0 instead of
    a rotation: the published models were trained with queries and keys of 0 there, and checkpoints need it.
    """
    frequencies = base ** -(torch.arange(0, head_dim // 2, 2, device="cpu").float() / (head_dim // 2))
    angles = torch.outer(torch.arange(grid_size, device="cpu").float(), frequencies)
    rows = angles[:, None].expand(-1, grid_size, -1)
    columns = angles[None].expand(grid_size, -1, -1)
    grid = torch.cat([rows, columns], -1).flatten(0, 1)
    return F.pad(torch.polar(torch.ones_like(grid), grid), (0, 0, num_condition_tokens, 0))


def check_sizes(positions: str, **sizes: int) -> None:
    """Raise `ValueError` unless the sizes are positive and fit each other and the kind of positions."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    hidden_size, num_heads, max_tokens = sizes["hidden_size"], sizes["num_heads"], sizes["max_tokens"]
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must divide by num_heads, got {hidden_size} and {num_heads}.")
    if positions not in ("rope2d", "learned"):
        raise ValueError(f"positions must be 'rope2d' or 'learned', got {positions!r}.")
    if positions == "rope2d":
        if math.isqrt(max_tokens) ** 2 != max_tokens:
            raise ValueError(f"2-D rotary positions need a square number of tokens, got max_tokens={max_tokens}.")
        if hidden_size // num_heads % 4:
            raise ValueError(
                f"2-D rotary positions need a head dimension that divides by 4, got {hidden_size // num_heads}."
            )


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighbouring pairs of `x` `(batch, length, ..., head_dim)` by complex `rotary`, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with one matrix for queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.wo = Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: Tensor | None, mask: Tensor | None, is_causal: bool, cache: LayerCache | None
    ) -> Tensor:
        """Attend from `x` `(batch, length, hidden_size)` to itself and to what `cache` holds before it."""
        batch, length, width = x.shape
        qkv = self.wqkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query_key = qkv[:, :, :2] if rotary is None else _rotate(qkv[:, :, :2], rotary)
        query = query_key[:, :, 0].transpose(1, 2)
        key = query_key[:, :, 1].transpose(1, 2)
        value = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            end = cache.start + length
            cache.keys[:, :, cache.start : end] = key
            cache.values[:, :, cache.start : end] = value
            key = cache.keys[:, :, :end]
            value = cache.values[:, :, :end]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        return self.wo(attended.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1(x)) * w3(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., hidden_size)` to the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward; dropout in training, never with a cache."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        norm_eps: float,
        residual_dropout: float,
        feed_forward_dropout: float,
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, num_heads)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)
        self.attention_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.ffn_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.residual_dropout = residual_dropout
        self.feed_forward_dropout = feed_forward_dropout

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map `(batch, length, hidden_size)` to the same shape."""
        attended = self.attention(self.attention_norm(x), rotary, mask, is_causal, cache)
        if self.training and cache is None:
            x = x + F.dropout(attended, self.residual_dropout)
            return x + F.dropout(self.feed_forward(self.ffn_norm(x)), self.feed_forward_dropout)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x))


class LabelEmbedder(nn.Module):
    """Class labels to one condition token; the row after the last class is the unconditional one."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Map labels `(batch,)` to `(batch, 1, hidden_size)`."""
        return self.embedding_table(class_labels)[:, None]

    def unconditional(self) -> Tensor:
        """Return the embedding of no class, `(1, 1, hidden_size)`."""
        return self.embedding_table.weight[-1:, None]


class CaptionProjection(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, caption_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, hidden_size, bias=False)
        self.fc2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., caption_dim)` to `(..., hidden_size)`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features to condition tokens, with fixed random features for no caption."""

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, hidden_size: int, num_condition_tokens: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, hidden_size)
        # A buffer as in the published model: it is saved with the weights and not trained.
        self.register_buffer(
            "uncond_embedding", torch.randn(num_condition_tokens, caption_dim) / math.sqrt(caption_dim)
        )

    def forward(self, caption_features: Tensor) -> Tensor:
        """Map `(batch, num_condition_tokens, caption_dim)` to `(batch, num_condition_tokens, hidden_size)`."""
        return self.cap_proj(caption_features)

    def unconditional(self) -> Tensor:
        """Return the embedding of no caption, `(1, num_condition_tokens, hidden_size)`."""
        return self.cap_proj(self.uncond_embedding[None])


class LlamaGen(PretrainedModel):
    """Predicts image tokens in order from a class label or text features (Sun et al., 2024).

    The published models write a square grid in raster order with 2-D rotary positions (`positions="rope2d"`). With
    learned positions (`"learned"`) the same transformer writes one-dimensional tokens, of which any prefix is an image.

    Args:
        hidden_size: width.
        num_layers: number of blocks.
        num_heads: attention heads; with rotary positions the head dimension must divide by 4.
        intermediate_size: width of the feed-forward layers; by default the published rule, `8 / 3 * hidden_size`
            rounded down, then up to a multiple of `multiple_of`.
        multiple_of: see `intermediate_size`.
        codebook_size: number of different image tokens.
        max_tokens: image tokens of a full image; a square number with rotary positions.
        condition: `"class"` or `"text"`.
        num_classes: number of classes, for `"class"`.
        caption_dim: width of the text features, for `"text"`.
        num_condition_tokens: positions before the image; 1 for `"class"`.
        positions: `"rope2d"` or `"learned"` (absolute, condition included).
        rope_base: base of the rotary frequencies.
        norm_eps: epsilon of the RMS norms.
        condition_dropout: how often a trainer should drop the condition; the model itself never draws.
        token_dropout: dropout on the embeddings, in training.
        residual_dropout: dropout after attention, in training.
        feed_forward_dropout: dropout after the feed-forward layers, in training.
        initializer_range: standard deviation of the initial weights; the output layer starts at 0.
        padding_attends: whether the padding of a caption attends to all that precedes it and to the whole caption, as
            in LANTERN's version, or just to itself. Nothing attends to padding; only a draft head that was trained on
            its states sees a difference.
    """

    registry_name = "llamagen"
    generates = "token_ids"
    # Tokens that one position of the transformer stands for.
    tokens_per_step = 1

    @register_to_config
    def __init__(
        self,
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
        super().__init__()
        self.padding_attends = padding_attends
        check_sizes(
            positions,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            multiple_of=multiple_of,
            codebook_size=codebook_size,
            max_tokens=max_tokens,
            num_condition_tokens=num_condition_tokens,
        )
        if intermediate_size is None:
            intermediate_size = multiple_of * math.ceil(int(2 * 4 * hidden_size / 3) / multiple_of)

        self.cls_embedding: LabelEmbedder | CaptionEmbedder
        if condition == "class":
            if num_classes is None or num_classes < 1 or num_condition_tokens != 1:
                raise ValueError(
                    "A class condition needs num_classes of at least 1 and num_condition_tokens=1, "
                    f"got {num_classes} and {num_condition_tokens}."
                )
            self.cls_embedding = LabelEmbedder(num_classes, hidden_size)
        elif condition == "text":
            if caption_dim is None or caption_dim < 1:
                raise ValueError(
                    f"A text condition needs caption_dim, the width of the text features, got {caption_dim}."
                )
            self.cls_embedding = CaptionEmbedder(caption_dim, hidden_size, num_condition_tokens)
        else:
            raise ValueError(f"condition must be 'class' or 'text', got {condition!r}.")

        self.tok_embeddings = nn.Embedding(codebook_size, hidden_size)
        self.position_embedding = (
            nn.Embedding(num_condition_tokens + self.num_steps(max_tokens), hidden_size)
            if positions == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            TransformerBlock(
                hidden_size, num_heads, intermediate_size, norm_eps, residual_dropout, feed_forward_dropout
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.output = Linear(hidden_size, codebook_size, bias=False)
        self._rotary_table: Tensor | None = None

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)
        nn.init.zeros_(self.output.weight)

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def preset_config(
        cls, name: str, image_size: int = 256, condition: str = "class", **overrides: Any
    ) -> dict[str, Any]:
        """Return the configuration of a published model; see `preset`."""
        if name not in PRESETS:
            raise unknown_name("LlamaGen preset", name, list(PRESETS))
        if image_size < 16 or image_size % 16:
            raise ValueError(
                f"image_size must be a multiple of 16 (the published ones: 256, 384, 512), got {image_size}."
            )
        num_layers, num_heads, hidden_size = PRESETS[name]
        config: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "max_tokens": (image_size // 16) ** 2,
            "condition": condition,
        }
        if condition == "text":
            config |= {"num_classes": None, "caption_dim": 2048, "num_condition_tokens": 120}
        return config | overrides

    @classmethod
    def preset(cls, name: str, image_size: int = 256, condition: str = "class", **overrides: Any) -> LlamaGen:
        """Build a published model with new weights.

        Args:
            name: `"B"`, `"L"`, `"XL"`, `"XXL"`, `"XXXL"`, `"1B"`, `"3B"` or `"7B"`.
            image_size: side of the images in pixels; 16 of them to a token.
            condition: `"class"` (ImageNet) or `"text"` (120 features of flan-t5-xl).
            **overrides: configuration values to change.
        """
        return cls(**cls.preset_config(name, image_size, condition, **overrides))

    @classmethod
    def from_original(cls, checkpoint: Any, config: Mapping[str, Any] | None = None) -> LlamaGen:
        """Load a checkpoint in the published format.

        Args:
            checkpoint: path, or state dict; nested under `model` or `module`, or plain. LANTERN's version, in the
                layout of transformers' Llama, is recognised by its keys.
            config: values that the shapes do not tell, under our names or the published ones (`dim`, `n_layer`, ...);
                they go before what is inferred. Needed are `max_tokens` for models with rotary positions, since a
                checkpoint of a 256 pixel model fits a 384 pixel one too, and `num_heads` for sizes that are not among
                the presets. For LANTERN's version it may be the published `config.json`; what it says beyond the sizes
                is not used.

        Raises:
            CheckpointError: keys or shapes do not fit, or a needed value is neither given nor known.
        """
        state_dict = load_original(checkpoint)
        if "lm_head.weight" in state_dict:
            state_dict = convert_llama_keys(state_dict)
            given = {"norm_eps": 1e-6, "padding_attends": True} | translate_llama_config(config or {})
        else:
            given = _translate_config(config or {})
        values = _infer_config(state_dict) | given
        for name, hint in (("num_heads", 16), ("max_tokens", 256)):
            if name not in values:
                raise CheckpointError(
                    f"The checkpoint does not tell {name}; pass it, as in config={{'{name}': {hint}}}, "
                    "or a whole configuration, as LlamaGen.preset_config returns it."
                )
        model = cls(**values)
        load_into(model, state_dict, allow_unexpected=("freqs_cis",))
        return model.eval()

    # ------------------------------------------------------------------------------------------------ parts

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt."""
        return self.config.num_condition_tokens

    def check_tokenizer(self, image_tokenizer: ImageTokenizer) -> None:
        """Check that this transformer writes the tokens of an image tokenizer, or a prefix of ordered ones.

        Raises:
            ValueError: it does not.
        """
        name, count = type(image_tokenizer).__name__, self.config.max_tokens
        if image_tokenizer.codebook_sizes != (self.config.codebook_size,):
            raise ValueError(
                f"The transformer writes tokens of one codebook with {self.config.codebook_size} entries, but the "
                f"image tokenizer {name} has {image_tokenizer.codebook_sizes}: they do not belong together."
            )
        most = image_tokenizer.max_tokens
        if count > most or count < most and not image_tokenizer.ordered:
            raise ValueError(f"The transformer writes up to {count} tokens, but an image of {name} has {most}.")

    def count_steps(self, num_tokens: int | None = None, num_kept_tokens: int = 0, **settings: Any) -> int:
        """Return how many steps a generation takes; other settings do not matter."""
        return self.num_steps((num_tokens or self.config.max_tokens) - num_kept_tokens)

    def inpainting(self, token_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the argument of a generation that writes all tokens anew from the first masked one.

        Args:
            token_ids: `(batch, max_tokens)`.
            mask: bool `(batch, max_tokens)`.

        Raises:
            ValueError: nothing is masked, or the images of a batch begin to differ at different tokens.
        """
        firsts = [int(row.nonzero()[0]) if bool(row.any()) else -1 for row in mask]
        if min(firsts) < 0:
            raise ValueError("The mask touches no token; there is nothing to regenerate.")
        if len(set(firsts)) > 1:
            raise ValueError(
                f"The masks of a batch must begin at the same token for a causal transformer, got {firsts}; pass the "
                "images one by one."
            )
        return {"prefix": token_ids[:, : firsts[0]]}

    def embed_condition(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
    ) -> Tensor:
        """Return the condition tokens `(batch, num_condition_tokens, hidden_size)`.

        Args:
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, num_condition_tokens, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, num_condition_tokens)`, nonzero for real tokens; features elsewhere count as 0.
            drop_condition: `(batch,)` bool; rows that become unconditional.
        """
        if self.config.condition == "class":
            if class_labels is None or caption_features is not None or caption_mask is not None:
                raise ValueError("This model is class-conditional: pass class_labels and no caption.")
            labels = torch.as_tensor(class_labels, device=self.tok_embeddings.weight.device)
            if labels.ndim != 1 or not len(labels):
                raise ValueError(f"class_labels must be (batch,), got {tuple(labels.shape)}.")
            _check_ids("Class labels", labels, self.config.num_classes)
            embedded = self.cls_embedding(labels)
        else:
            if caption_features is None or class_labels is not None:
                raise ValueError("This model is text-conditional: pass caption_features and no class_labels.")
            shape = (self.config.num_condition_tokens, self.config.caption_dim)
            if caption_features.ndim != 3 or tuple(caption_features.shape[1:]) != shape or not len(caption_features):
                raise ValueError(
                    f"caption_features must be (batch, {shape[0]}, {shape[1]}), got {tuple(caption_features.shape)}."
                )
            if caption_mask is not None:
                caption_features = caption_features.masked_fill(~self._check_mask(caption_features, caption_mask), 0)
            embedded = self.cls_embedding(caption_features.to(self.tok_embeddings.weight.dtype))
        if drop_condition is None:
            return embedded
        if drop_condition.shape != embedded.shape[:1]:
            raise ValueError(
                f"drop_condition must be ({len(embedded)},), one per row, got {tuple(drop_condition.shape)}."
            )
        return torch.where(drop_condition.bool()[:, None, None], self.cls_embedding.unconditional(), embedded)

    def _check_mask(self, caption_features: Tensor, caption_mask: Tensor) -> Tensor:
        if caption_mask.shape != caption_features.shape[:2]:
            raise ValueError(
                f"caption_mask must be {tuple(caption_features.shape[:2])}, as the features, "
                f"got {tuple(caption_mask.shape)}."
            )
        return caption_mask.bool()[..., None]

    def build_attention_mask(self, caption_mask: Tensor, num_positions: int) -> Tensor:
        """Return who attends to whom, bool `(batch, num_positions, num_positions)`.

        Causal, without the padding of the caption; every position attends to itself, so that no row is empty. What
        padding attends to depends on `padding_attends`.

        Args:
            caption_mask: `(batch, num_condition_tokens)`, nonzero for real tokens.
            num_positions: condition and image positions.
        """
        columns = F.pad(caption_mask.bool(), (0, num_positions - caption_mask.shape[1]), value=True)
        past = torch.ones(num_positions, num_positions, dtype=torch.bool, device=columns.device).tril()
        if self.padding_attends:
            return torch.where(columns[:, :, None], past & columns[:, None], past | columns[:, None])
        return (past & columns[:, None]) | torch.eye(num_positions, dtype=torch.bool, device=columns.device)

    def num_steps(self, num_tokens: int) -> int:
        """Return how many positions so many tokens take."""
        return num_tokens // self.tokens_per_step

    def to_sequence(self, token_ids: Tensor) -> Tensor:
        """Bring the tokens of whole images `(batch, max_tokens)` into the order in which they are written."""
        return token_ids

    def from_sequence(self, values: Tensor) -> Tensor:
        """Undo `to_sequence`, for values `(batch, max_tokens, ...)` of the tokens."""
        return values

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Embed ids `(batch, length * tokens_per_step)` as `(batch, length, hidden_size)`, without positions."""
        return self.tok_embeddings(token_ids)

    def predict(self, hidden: Tensor) -> Tensor:
        """Map what the transformer returns, `(..., length, hidden_size)`, to logits of the tokens of these positions.

        Returns:
            `(..., length * tokens_per_step, codebook_size)`.
        """
        return self.output(hidden)

    def guided_logits(self, hidden: Tensor, batch: int, scale: float) -> Tensor:
        """Return the logits in float32 of the next token, `(batch, codebook_size)`.

        Args:
            hidden: `(rows, hidden_size)`: `batch` conditional rows, then as many unconditional ones where needed.
            batch: number of conditional rows.
            scale: guidance scale.
        """
        if scale != 1.0:
            # The output layer is linear and has no bias: guiding its input guides the logits, with half of the rows.
            guided = combine(hidden[:batch].float(), hidden[batch:].float(), scale).to(hidden.dtype)
        else:
            guided = hidden[:batch]
        return self.predict(guided).float()

    def _positions(
        self, start: int, length: int, positions: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return position embeddings to add, and rotations; one of them is None.

        Args:
            start: first position.
            length: number of positions that follow each other.
            positions: `(length,)` or `(rows, length)`, in place of both.
        """
        index = slice(start, start + length) if positions is None else positions
        if self.position_embedding is not None:
            return self.position_embedding.weight[index], None
        device = self.tok_embeddings.weight.device
        if self._rotary_table is None or self._rotary_table.device != device:
            # Not a buffer: conversions to half precision would reach it, and loading on the meta device would lose it.
            # Made outside of inference mode, whose tensors could not be used in training later.
            with torch.inference_mode(False):
                self._rotary_table = rotary_table(
                    math.isqrt(self.num_steps(self.config.max_tokens)),
                    self.config.hidden_size // self.config.num_heads,
                    self.config.rope_base,
                    self.config.num_condition_tokens,
                ).to(device)
        return None, self._rotary_table[index].unsqueeze(-2).unsqueeze(-2)

    # ------------------------------------------------------------------------------------------------ training

    def forward(
        self,
        token_ids: Tensor,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> LlamaGenForwardOutput | tuple[Tensor, ...]:
        """Predict every token from the condition and the tokens before it.

        Gradients reach `caption_features`, so that a text encoder can learn too.

        Args:
            token_ids: `(batch, num_tokens)` int64, 1 to `max_tokens` of them; the last one is never an input.
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, num_condition_tokens, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, num_condition_tokens)`, nonzero for real tokens, which stand on the right.
            drop_condition: `(batch,)` bool; rows trained without their condition, for guidance.
            attention_mask: bool `(batch, length, length)` or `(length, length)` with `length = num_condition_tokens +
                num_tokens - 1`, in place of the mask of `build_attention_mask`.
            labels: `(batch, num_tokens)`; gives the loss. Usually `token_ids`; -100 is left out.
            output_hidden_states: return the states that the logits are made of, and those at the condition.
            return_dict: False returns a tuple.
        """
        if token_ids.ndim != 2 or not 1 <= token_ids.shape[1] <= self.config.max_tokens:
            raise ValueError(f"token_ids must be (batch, 1 to {self.config.max_tokens}), got {tuple(token_ids.shape)}.")
        _check_ids("Token ids", token_ids, self.config.codebook_size)
        condition = self.embed_condition(class_labels, caption_features, caption_mask, drop_condition)
        if len(condition) != len(token_ids):
            raise ValueError(f"Got {len(condition)} conditions for {len(token_ids)} rows of token_ids.")
        if labels is not None and labels.shape != token_ids.shape:
            raise ValueError(f"labels must be {tuple(token_ids.shape)}, as token_ids, got {tuple(labels.shape)}.")

        sequence = self.to_sequence(token_ids)
        hidden = torch.cat([condition, self.embed_tokens(sequence[:, : -self.tokens_per_step])], dim=1)
        length = hidden.shape[1]
        if attention_mask is None and caption_mask is not None:
            attention_mask = self.build_attention_mask(caption_mask, length)
        if attention_mask is not None and attention_mask.ndim == 3:
            attention_mask = attention_mask[:, None]

        embedded, rotary = self._positions(0, length)
        if embedded is not None:
            hidden = hidden + embedded
        hidden = F.dropout(hidden, self.config.token_dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, rotary, attention_mask, attention_mask is None)
        first = self.config.num_condition_tokens - 1
        hidden = self.norm(hidden if output_hidden_states else hidden[:, first:])
        logits = self.from_sequence(self.predict(hidden[:, first:] if output_hidden_states else hidden))
        loss = None if labels is None else self.token_loss(logits.float(), labels)
        states = hidden if output_hidden_states else None
        output = LlamaGenForwardOutput(logits=logits, loss=loss, hidden_states=states)
        return output if return_dict else output.to_tuple()

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of `labels` `(batch, num_tokens)`, without those of -100."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    # ------------------------------------------------------------------------------------------------ decoding

    def extend(
        self,
        hidden: Tensor,
        state: LlamaGenState,
        mask: Tensor | None,
        is_causal: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run `hidden` `(rows, length, hidden_size)` behind what the state holds; return its shape, normalised."""
        length = hidden.shape[1]
        embedded, rotary = self._positions(state.position_offset + state.length, length, positions)
        if embedded is not None:
            hidden = hidden + embedded
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, mask, is_causal, state.layer(i))
        state.append(length)
        return self.norm(hidden)

    @torch.no_grad()
    def prefill(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        guided: bool = False,
        draft_slots: int = 0,
    ) -> LlamaGenState:
        """Read the condition and return a state that is ready for the first token.

        Padding that all captions share is left out, which changes nothing: nobody attends to it. Where it attends to
        others (`padding_attends`), its states are wanted, and it stays.

        Args:
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, num_condition_tokens, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, num_condition_tokens)`, nonzero for real tokens, which stand on the right.
            max_new_tokens: tokens to make room for; all by default.
            guided: add an unconditional row for every conditional one, behind all of those. It keeps the caption's
                mask, as published.
            draft_slots: slots to have beside those of the tokens, for drafts of which only some stay.
        """
        config = self.config
        num_slots = self.num_steps(self._check_num_tokens(max_new_tokens)) + draft_slots
        condition = self.embed_condition(class_labels, caption_features, caption_mask)
        if guided:
            condition = torch.cat([condition, self.cls_embedding.unconditional().expand_as(condition)])

        padding = 0
        mask = key_bias = None
        if caption_mask is not None:
            columns = caption_mask.bool()
            if not self.padding_attends:
                padding = int(columns.any(0).int().argmax()) if bool(columns.any()) else config.num_condition_tokens - 1
            condition, columns = condition[:, padding:], columns[:, padding:]
            if not bool(columns.all()):
                columns = columns.repeat(1 + guided, 1)
                mask = self.build_attention_mask(columns, condition.shape[1])[:, None]
                key_bias = torch.zeros(len(columns), 1, 1, condition.shape[1] + num_slots).to(condition)
                key_bias[:, 0, 0, : condition.shape[1]].masked_fill_(~columns, float("-inf"))

        rows, length, _ = condition.shape
        head_dim = config.hidden_size // config.num_heads
        cache = condition.new_empty(config.num_layers, 2, rows, config.num_heads, length + num_slots, head_dim)
        state = LlamaGenState(cache, length, padding, key_bias)
        state.condition_hidden_states = self.extend(condition, state, mask, is_causal=mask is None)
        return state

    def _check_num_tokens(self, num_tokens: int | None) -> int:
        if num_tokens is None:
            return self.config.max_tokens
        most = self.config.max_tokens
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= most:
            raise ValueError(f"The number of tokens must be 1 to {most}, got {num_tokens!r}.")
        return num_tokens

    @torch.no_grad()
    def advance(
        self,
        token_ids: Tensor,
        state: LlamaGenState,
        block_mask: Tensor | None = None,
        depths: Tensor | None = None,
    ) -> Tensor:
        """Append a block of tokens to the state; return `(rows, block, hidden_size)`, the input of `predict`.

        Without further arguments the tokens of a block follow each other: a block gives what its tokens give singly.

        Args:
            token_ids: `(rows, block)` int64, one row per row of the state, unconditional ones included.
            state: changed in place.
            block_mask: bool `(block, block)` or `(rows, block, block)`: which tokens of the block a token attends to,
                itself included; for the branches of a tree. What the state held before is attended to by all.
            depths: `(block,)` or `(rows, block)` int64: position of each token behind what the state holds; siblings in
                a tree share one.
        """
        if token_ids.ndim != 2 or len(token_ids) != state.num_rows or not token_ids.shape[1]:
            raise ValueError(f"token_ids must be ({state.num_rows}, block), got {tuple(token_ids.shape)}.")
        _check_ids("Token ids", token_ids, self.config.codebook_size)
        start, size = state.length, self.num_steps(token_ids.shape[1])
        if start + size > state.capacity:
            raise ValueError(
                f"The state has room for {state.capacity - start} more tokens, got a block of {size}; "
                "pass a larger max_new_tokens to prefill."
            )
        positions = None
        if depths is not None:
            positions = state.position_offset + start + depths
            last = self.config.num_condition_tokens + self.num_steps(self.config.max_tokens) - 1
            if int(depths.min()) < 0 or int(positions.max()) > last:
                raise ValueError(f"depths must be 0 to {last - state.position_offset - start}, got {depths.tolist()}.")
        if size == 1:
            return self._step(token_ids, state, positions)
        if block_mask is None:
            block_mask = torch.ones(size, size, dtype=torch.bool, device=token_ids.device).tril()
        hidden = self.embed_tokens(token_ids)
        block_mask = block_mask.view(-1, 1, size, size)
        mask = hidden.new_zeros(len(block_mask), 1, size, start + size)
        mask[..., start:].masked_fill_(~block_mask, float("-inf"))
        if state.key_bias is not None:
            mask = mask + state.key_bias[..., : start + size]
        return self.extend(hidden, state, mask, positions=positions)

    def _step(self, token_ids: Tensor, state: LlamaGenState, positions: Tensor | None = None) -> Tensor:
        """Append one token `(rows, 1)` to every row, unchecked; returns `(rows, 1, hidden_size)`."""
        mask = None if state.key_bias is None else state.key_bias[..., : state.length + 1]
        return self.extend(self.embed_tokens(token_ids), state, mask, positions=positions)

    @torch.no_grad()
    def forward_block(
        self,
        token_ids: Tensor,
        state: LlamaGenState,
        block_mask: Tensor | None = None,
        depths: Tensor | None = None,
    ) -> Tensor:
        """Append a block as `advance` does; return the logits after each token, `(rows, block, codebook_size)`."""
        return self.predict(self.advance(token_ids, state, block_mask, depths))

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: LlamaGenState) -> Tensor:
        """Append one token `(rows,)` to every row; return the logits of the next, `(rows, codebook_size)`."""
        return self.predict(self.advance(token_ids[:, None], state)[:, 0])

    def iter_generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        num_tokens: int | None = None,
        guidance_scale: float | Guidance = 1.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        do_sample: bool = True,
        prefix: Tensor | None = None,
        speculation: SpeculativeDecoder | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        uniforms: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate step by step: yields the step and the tokens so far, `(batch, step + 1)`; see `generate`.

        Arguments are checked at once, not at the first step. The tokens are views of one tensor: do not change them.
        """
        num_tokens = self._check_num_tokens(num_tokens)
        check_sampling(temperature, top_k, top_p)
        guidance = make_guidance(guidance_scale)
        if cfg_interval != -1:
            if isinstance(guidance_scale, Guidance):
                raise ValueError(
                    f"cfg_interval={cfg_interval} needs a number as guidance_scale, got {guidance_scale!r}."
                )
            guidance = IntervalGuidance(guidance.target, cfg_interval)
        scales = guidance.scales(self.num_steps(num_tokens))
        for step, scale in enumerate(scales):
            if not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"Guidance scales must be finite and at least 0, got {scale} at step {step}.")
        first = 0 if prefix is None else self.num_steps(self._check_prefix(prefix, num_tokens))
        last_guided = max((step for step, scale in enumerate(scales) if scale != 1.0 and step >= first), default=-1)
        if uniforms is not None and generator is not None:
            raise ValueError("Pass uniforms or a generator, not both.")

        state = self.prefill(
            class_labels, caption_features, caption_mask, num_tokens, guided=last_guided >= 0,
            draft_slots=0 if speculation is None else DRAFT_SLOTS,
        )  # fmt: skip
        batch = state.num_rows // 2 if last_guided >= 0 else state.num_rows
        if prefix is not None and len(prefix) != batch:
            raise ValueError(f"prefix must have one row for each of {batch} images, got {len(prefix)}.")
        if not do_sample:
            uniforms = None
        elif uniforms is None:
            uniforms = draw_uniforms(generator, batch, num_tokens)
        else:
            _check_uniforms(uniforms, batch, num_tokens)
        device = state.condition_hidden.device
        if uniforms is not None and device.type != "mps":  # which has no float64; the sampler works on the CPU there
            uniforms = uniforms.to(device)
        trace = Trace() if trace is None else trace
        sampling = (temperature, top_k, top_p)
        if speculation is not None:
            if not isinstance(speculation, SpeculativeDecoder):
                raise TypeError(
                    f"{type(self).__name__} writes token ids: speculation must be a SpeculativeDecoder, got "
                    f"{type(speculation).__name__}."
                )
            if isinstance(speculation.drafter, ConditionedDrafter):
                arguments = {"class_labels": class_labels} if caption_features is None else {}
                if caption_features is not None:
                    arguments = {"caption_features": caption_features, "caption_mask": caption_mask}
                speculation.drafter.condition(Conditions(arguments, scales))
            target = LlamaGenTarget(self, state, batch, scales, trace)
            return speculate(speculation, target, sampling, prefix, uniforms, generator, num_tokens)
        return self._iterate(state, batch, scales, last_guided, sampling, prefix, uniforms, trace)

    def _check_prefix(self, prefix: Tensor, num_tokens: int) -> int:
        if prefix.ndim != 2 or not prefix.shape[1] < num_tokens:
            raise ValueError(
                f"prefix must be (batch, k) with k below the {num_tokens} tokens to come to, got {tuple(prefix.shape)}."
            )
        _check_ids("The ids of the prefix", prefix, self.config.codebook_size)
        return prefix.shape[1]

    @torch.no_grad()
    def _iterate(
        self,
        state: LlamaGenState,
        batch: int,
        scales: list[float],
        last_guided: int,
        sampling: tuple[float, int, float],
        prefix: Tensor | None,
        uniforms: Tensor | None,
        trace: Trace,
    ) -> Iterator[tuple[int, Tensor]]:
        hidden = state.condition_hidden
        trace.record_forward(state.num_rows, state.length)
        size = self.tokens_per_step
        token_ids = torch.empty(batch, len(scales) * size, dtype=torch.int64, device=hidden.device)
        first = 0 if prefix is None else self.num_steps(prefix.shape[1])
        if prefix is not None and first:
            token_ids[:, : first * size] = prefix
            hidden = self.advance(token_ids[:, : first * size].repeat(state.num_rows // batch, 1), state)[:, -1]
            trace.record_forward(state.num_rows, first)
        for step, scale in enumerate(scales[first:], first):
            here = slice(step * size, (step + 1) * size)
            if step > first:
                previous = token_ids[:, here.start - size : here.start]
                if state.num_rows > batch:
                    if step > last_guided:
                        state.select_rows(slice(0, batch))
                    else:
                        previous = previous.repeat(2, 1)
                hidden = self._step(previous, state)[:, 0]
                trace.record_forward(state.num_rows, 1)
            logits = self.guided_logits(hidden, batch, scale)
            trace.record_step(scale, logits)
            try:
                draws = None if uniforms is None else uniforms[:, here]
                token_ids[:, here] = sample_ids(logits.view(batch, size, -1), sampling, draws)
            except ValueError as error:
                raise ValueError(f"Token {here.start}: {error}") from error
            yield step, self._written(token_ids, here.stop)

    def _written(self, token_ids: Tensor, count: int) -> Tensor:
        """Return the first `count` tokens of a sequence, as a generation yields them."""
        return token_ids[:, :count]

    def generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        num_tokens: int | None = None,
        guidance_scale: float | Guidance = 1.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        do_sample: bool = True,
        prefix: Tensor | None = None,
        speculation: SpeculativeDecoder | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        uniforms: Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        trace: Trace | None = None,
        return_dict: bool = True,
    ) -> LlamaGenOutput | tuple[Tensor, Trace]:
        """Generate the tokens of a batch of images.

        With one generator per image, an image depends on its own generator and condition only, not on the rest of the
        batch, as far as floating point allows. Fewer tokens are the beginning of more. Unconditional rows are computed
        up to the last step that is guided, and not at all where none is.

        Args:
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, num_condition_tokens, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, num_condition_tokens)`, nonzero for real tokens, which stand on the right.
            num_tokens: tokens to generate, 1 to `max_tokens`; all by default.
            guidance_scale: a number, or a `Guidance`; 1 is none.
            cfg_interval: as published: guide token 0, and token k where `k - 1 <= cfg_interval`; -1 guides all.
            temperature: divides the logits.
            top_k: keep the k most probable ids; 0 keeps all.
            top_p: keep the most probable ids up to this sum; 1 keeps all.
            do_sample: False takes the most probable id.
            prefix: `(batch, k)` int64, the first k of the tokens, which are given; with k = 0 to `num_tokens` - 1.
            speculation: writes several tokens with one forward; whether they are those that are written without, its
                acceptance rule says.
            generator: one, or one per image; none draws with a new seed. The global one is never used.
            uniforms: `(batch, num_tokens)` in [0, 1), draws in place of a generator's.
            callback: called as `callback(step, token_ids)` with `(batch, step + 1)` tokens: after every token, or with
                `speculation` whenever all images have more of them.
            trace: filled with what is executed; `Trace(keep_logits=True)` also keeps the logits.
            return_dict: False returns `(token_ids, trace)`.

        Raises:
            ValueError: an argument is out of its range, or the logits are not finite.
        """
        trace = Trace() if trace is None else trace
        steps = self.iter_generate(
            class_labels, caption_features, caption_mask, num_tokens, guidance_scale, cfg_interval, temperature, top_k,
            top_p, do_sample, prefix, speculation, generator, uniforms, trace,
        )  # fmt: skip
        for step, token_ids in steps:
            if callback is not None:
                callback(step, token_ids)
        return LlamaGenOutput(token_ids=token_ids, trace=trace) if return_dict else (token_ids, trace)


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}.")
    wrong = (ids < 0) | (ids >= size)
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} must be 0 to {size - 1}, got {int(ids[position])} at position {position}.")


def _check_uniforms(uniforms: Tensor, batch: int, num_tokens: int) -> None:
    if tuple(uniforms.shape) != (batch, num_tokens):
        raise ValueError(f"uniforms must be ({batch}, {num_tokens}), got {tuple(uniforms.shape)}.")
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must be in [0, 1).")


def convert_llama_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the layout of `LlamaGen` from one in that of transformers' Llama.

    Keys that neither layout has stay, to be refused when they are loaded. LANTERN turns neighbouring pairs as LlamaGen
    does, not halves as Llama does, so that no row moves.
    """
    converted = {}
    for key, value in state_dict.items():
        for llama, ours in _LLAMA_KEYS.items():
            key = key.replace(llama, ours)
        converted[key] = value
    for key in [key for key in converted if key.endswith(".attention.q_proj.weight")]:
        parts = [key.replace("q_proj", f"{name}_proj") for name in "qkv"]
        if all(part in converted for part in parts):
            converted[key.replace("q_proj", "wqkv")] = torch.cat([converted.pop(part) for part in parts])
    return converted


def translate_llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes in a configuration in the manner of transformers' Llama, under our names.

    Raises:
        CheckpointError: the model has fewer heads for keys than for queries, which none here has.
    """
    heads = {config[key] for key in ("num_attention_heads", "num_key_value_heads") if key in config}
    if len(heads) > 1:
        raise CheckpointError(f"num_key_value_heads must be num_attention_heads, got {sorted(heads)}.")
    ours = {"hidden_size", "intermediate_size", "rope_base", *_LLAMA_NAMES.values()}
    translated = {_LLAMA_NAMES.get(key, key): value for key, value in config.items()}
    return {name: value for name, value in translated.items() if name in ours}


def _infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read from the shapes what they tell."""
    try:
        codebook_size, hidden_size = state_dict["tok_embeddings.weight"].shape
        num_layers = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("layers."))
        config: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "codebook_size": codebook_size,
            "intermediate_size": state_dict["layers.0.feed_forward.w1.weight"].shape[0],
        }
        if "cls_embedding.embedding_table.weight" in state_dict:
            config["condition"] = "class"
            config["num_classes"] = state_dict["cls_embedding.embedding_table.weight"].shape[0] - 1
        else:
            num_condition_tokens, caption_dim = state_dict["cls_embedding.uncond_embedding"].shape
            config |= {"condition": "text", "num_classes": None}
            config |= {"caption_dim": caption_dim, "num_condition_tokens": num_condition_tokens}
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"This is no LlamaGen checkpoint: {error} is missing or has no fitting shape.") from error
    for layers, heads, width in PRESETS.values():
        if (layers, width) == (num_layers, hidden_size):
            config["num_heads"] = heads
    condition_tokens = config.get("num_condition_tokens", 1)
    if "position_embedding.weight" in state_dict:
        config["positions"] = "learned"
        config["max_tokens"] = state_dict["position_embedding.weight"].shape[0] - condition_tokens
    elif "freqs_cis" in state_dict:
        positions, pairs = state_dict["freqs_cis"].shape[:2]
        config["max_tokens"] = positions - condition_tokens
        config["num_heads"] = hidden_size // (2 * pairs)
    return config


def _translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration under our names from one under ours or the published ones."""
    known = set(inspect.signature(LlamaGen.__init__).parameters) - {"self"}
    translated = {}
    for key, value in config.items():
        if key.startswith("_"):  # notes of diffusers, such as the version
            continue
        name = _PUBLISHED_NAMES.get(key, key)
        if name not in known:
            raise unknown_name("LlamaGen configuration value", key, sorted(known | set(_PUBLISHED_NAMES)))
        translated[name] = _CONDITIONS.get(value, value) if name == "condition" else value
    return translated
