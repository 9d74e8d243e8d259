"""Feature alignment (REPA): what a decoder knows inside should resemble what a pretrained vision model sees."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureAlignment(nn.Module):
    """Cosine loss between projected hidden patches and the patch features of a frozen timm ViT.

    Paper: Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You
    Think", ICLR 2025, https://arxiv.org/abs/2410.06940. Only the projector, three layers, is trained.

    Args:
        teacher: name of a timm model whose pretrained weights are fetched (published: DINOv2), or a timm
            `VisionTransformer`.
        hidden_size: width of the hidden patches.
        projector_size: width of the projector.

    Raises:
        ValueError: the teacher has no patch features `(batch, tokens, width)`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, teacher: str | nn.Module, hidden_size: int, projector_size: int = 2048) -> None:
        super().__init__()
        model: Any = timm.create_model(teacher, pretrained=True) if isinstance(teacher, str) else teacher
        if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
            raise ValueError(f"The teacher must be a timm ViT, received {type(model).__name__}.")
        # Outside the module's parameters: it is neither trained nor averaged nor saved.
        self._teacher = [model.eval().requires_grad_(False)]
        settings = timm.data.resolve_model_data_config(model)
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"]).view(1, 3, 1, 1), persistent=False)
        self.projector = nn.Sequential(
            nn.Linear(hidden_size, projector_size),
            nn.SiLU(),
            nn.Linear(projector_size, projector_size),
            nn.SiLU(),
            nn.Linear(projector_size, model.embed_dim),
        )

    @torch.no_grad()
    def features(self, images: Tensor, grid: int) -> Tensor:
        """Return the teacher's features `(batch, grid * grid, width)` of `images` `(batch, 3, H, W)` in [0, 1]."""
        teacher = self._teacher[0]
        size = teacher.patch_embed.img_size
        resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        tokens = teacher.forward_features((resized - self.mean) / self.std)[:, teacher.num_prefix_tokens :]
        height, width = teacher.patch_embed.grid_size
        maps = tokens.mT.unflatten(2, (height, width))
        return F.interpolate(maps, (grid, grid), mode="bilinear", antialias=True).flatten(2).mT

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Return the loss: minus the mean cosine of the projected patches and the teacher's.

        Args:
            hidden: patches of a square grid, row by row, `(batch, patches, hidden_size)`.
            images: what the patches show, `(batch, 3, H, W)` in [0, 1].
        """
        grid = round(hidden.shape[1] ** 0.5)
        return -F.cosine_similarity(self.projector(hidden).float(), self.features(images, grid).float(), dim=-1).mean()
