"""DiffRate: prune and merge the tokens of a timm ViT, at rates per layer that can be learnt.

Chen et al., 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers" (arXiv 2305.17997).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

# Merging may make a token's size tiny, and the logarithm of none is finite.
_SMALLEST_SIZE = 1e-6
# Logits of tokens that are masked out may exceed all others: beyond this their exponential says no more.
_LARGEST_LOGIT = 30.0


@dataclass
class MergeOutput:
    """What `merge_tokens` returns.

    Attributes:
        tokens: `(batch, left, dim)`.
        size: how much each of them stands for, `(batch, left)`.
        destination: index of the token that took in each merged one, `(batch, num_tokens - left)`.
        best_similarity: the cosine of the two, in [-1, 1], of the same shape.
    """

    tokens: Tensor
    size: Tensor
    destination: Tensor
    best_similarity: Tensor


def merge_tokens(tokens: Tensor, size: Tensor, left: int, num_prefix_tokens: int = 1) -> MergeOutput:
    """Merge all tokens past the first `left` into the most similar of these.

    Lossy. Deterministic on the CPU; on CUDA the sums are taken in any order.

    Args:
        tokens: `(batch, num_tokens, dim)`, most important first.
        size: how much each token stands for, `(batch, num_tokens)`.
        left: number of tokens that stay.
        num_prefix_tokens: class and register tokens, which come first and take nothing in.

    Raises:
        ValueError: no token would be left to merge into, or `left` exceeds the number of tokens.
    """
    if not num_prefix_tokens < left <= tokens.shape[1]:
        raise ValueError(
            f"left must lie in {num_prefix_tokens + 1}..{tokens.shape[1]} ({num_prefix_tokens} prefix tokens of "
            f"{tokens.shape[1]} take nothing in), got {left}."
        )
    directions = F.normalize(tokens.float(), dim=-1)
    similarity = directions[:, left:] @ directions[:, num_prefix_tokens:left].mT
    best_similarity, destination = similarity.max(-1)
    destination = destination + num_prefix_tokens
    merged = tokens[:, :left].scatter_reduce(
        1, destination.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), tokens[:, left:], "mean", include_self=True
    )
    sizes = size[:, :left].scatter_add(1, destination, (size[:, left:] * best_similarity).to(size.dtype))
    return MergeOutput(merged, sizes, destination, best_similarity)


@dataclass
class DiffRateReport:
    """What the last forward did, one entry per block.

    Attributes:
        tokens: number of tokens behind the block, class and register tokens included.
        sizes: how much each token stands for, `(batch, tokens)`.
        assignments: for every token of the image the one that stands for it behind the block, `(batch, num_tokens)`;
            -1: pruned.
        importances: class attention by which the block sorted its tokens, `(batch, tokens before)`; None where it
            compressed nothing.
    """

    tokens: list[int] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    assignments: list[Tensor] = field(default_factory=list)
    importances: list[Tensor | None] = field(default_factory=list)


@dataclass
class DiffRate:
    """Prunes and merges tokens between the attention and the MLP of every block, by a table of token counts.

    Each block sorts its tokens by the attention that the class token pays them, keeps the first `keep[i]`, and merges
    those past the first `merge[i]` into the most similar of the latter. Attention counts a merged token by its size.
    Class and register tokens are never pruned, merged or merged into. Blocks that drop nothing are left untouched, so
    a table that drops nothing gives the same bits.

    Lossy. Costs one row of attention and one similarity matrix per compressing block.

        with DiffRate.uniform(vit, prune_rate=0.05, merge_rate=0.05)(vit):
            logits = vit(images)

    Args:
        keep: tokens of an image that each block keeps after pruning, class and register tokens included, one entry per
            block and not increasing; None prunes nothing. A block that gets fewer keeps them all.
        merge: tokens left after merging, likewise; None merges nothing.

    Attributes:
        report: what the last forward did.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: the lists differ in length, an entry is below 1, one increases, or `merge` exceeds `keep`.
    """

    keep: Sequence[int] | None = None
    merge: Sequence[int] | None = None
    report: DiffRateReport = field(default_factory=DiffRateReport, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, counts in (("keep", self.keep), ("merge", self.merge)):
            if counts is None:
                continue
            if any(isinstance(c, bool) or not isinstance(c, int) for c in counts):
                raise TypeError(f"{name} must hold integers, numbers of tokens; got {list(counts)}.")
            if any(c < 1 for c in counts):
                raise ValueError(f"{name} must hold numbers of tokens of at least 1, got {list(counts)}.")
            if any(later > earlier for earlier, later in zip(counts, counts[1:], strict=False)):
                raise ValueError(f"{name} must not increase from block to block, got {list(counts)}.")
        if self.keep is not None and self.merge is not None:
            if len(self.keep) != len(self.merge):
                raise ValueError(
                    f"keep and merge must have one entry per block each, got {len(self.keep)} and {len(self.merge)}."
                )
            if any(left > kept for kept, left in zip(self.keep, self.merge, strict=True)):
                raise ValueError(
                    f"merge must not exceed keep, for merging comes after pruning; got keep={list(self.keep)} and "
                    f"merge={list(self.merge)}."
                )

    @classmethod
    def uniform(cls, vit: VisionTransformer, prune_rate: float = 0.0, merge_rate: float = 0.0) -> DiffRate:
        """Make the table in which every block but the first prunes, then merges, the same fractions of its patches.

        Args:
            vit: the model, for its number of tokens and blocks.
            prune_rate: fraction of the patch tokens that a block gets and prunes, in [0, 1).
            merge_rate: fraction of the remaining ones that it merges, in [0, 1).

        Raises:
            TypeError, ValueError: `vit` is none that DiffRate takes, or a rate is outside [0, 1).
        """
        for name, rate in (("prune_rate", prune_rate), ("merge_rate", merge_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {rate}.")
        prefix, patches = _check_vit(vit), vit.patch_embed.num_patches
        keep, merge = [prefix + patches], [prefix + patches]
        for _ in range(len(vit.blocks) - 1):
            kept = patches - int(patches * prune_rate)
            patches = kept - int(kept * merge_rate)
            keep.append(prefix + kept)
            merge.append(prefix + patches)
        return cls(keep, merge)

    @property
    def lossless(self) -> bool:
        """Whether it compresses no model at all."""
        return self.keep is None and self.merge is None

    def table(self, vit: VisionTransformer) -> list[tuple[int, int]]:
        """Return `(kept, left)` of every block, for images of the model's own size.

        Raises:
            TypeError, ValueError: DiffRate does not take this model, or the table does not fit it.
        """
        return self._table(vit, _check_vit(vit) + vit.patch_embed.num_patches)

    def _table(self, vit: VisionTransformer, num_tokens: int) -> list[tuple[int, int]]:
        prefix, depth = vit.num_prefix_tokens, len(vit.blocks)
        keep = [num_tokens] * depth if self.keep is None else self.keep
        merge = keep if self.merge is None else self.merge
        if len(keep) != depth or len(merge) != depth:
            raise ValueError(
                f"The table must have one entry for each of the {depth} blocks, got "
                f"{len(keep) if self.keep is not None else len(merge)}."
            )
        table = []
        for kept, left in zip(keep, merge, strict=True):
            kept = min(kept, num_tokens)
            num_tokens = min(kept, left)
            if num_tokens <= prefix:
                raise ValueError(
                    f"Every block must keep at least {prefix + 1} tokens ({prefix} class and register tokens and one "
                    f"patch), got {num_tokens}."
                )
            table.append((kept, num_tokens))
        return table

    def flops(self, vit: VisionTransformer) -> int:
        """Count the multiply-adds of one image: embedding, attention, MLPs and head; GFLOPs are these / 1e9.

        Norms, activations and the selection itself are left out, as everybody does.

        Raises:
            TypeError, ValueError: as `table`.
        """
        table = self.table(vit)
        start = vit.num_prefix_tokens + vit.patch_embed.num_patches
        return _multiply_adds(vit, [start, *(left for _, left in table)])

    @contextmanager
    def __call__(self, vit: VisionTransformer) -> Iterator[VisionTransformer]:
        """Compress every forward of `vit` within the block; the model is as before when it ends.

        Raises:
            TypeError: `vit` is no timm `VisionTransformer`.
            ValueError: it has no class token, a distillation token, blocks of another kind than `Block` with plain
                `Attention`, gradient checkpointing, or forwards that are already replaced; or the table does not fit.
        """
        self.table(vit)
        run = _Run(self, vit)
        with _replaced(vit, run.block):
            yield vit


def _check_vit(vit: VisionTransformer) -> int:
    """Refuse models that DiffRate cannot compress; return the number of class and register tokens."""
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"DiffRate takes a timm VisionTransformer, got {type(vit).__name__}.")
    if not vit.has_class_token:
        raise ValueError("DiffRate sorts tokens by the attention of the class token, and this model has none.")
    if vit.num_prefix_tokens != 1 + vit.num_reg_tokens:
        raise ValueError(
            f"DiffRate knows class and register tokens only, and {type(vit).__name__} has others, such as a "
            "distillation token."
        )
    for block in vit.blocks:
        if type(block) is not Block or not isinstance(block.attn, Attention):
            kind = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            raise ValueError(f"DiffRate works on timm's pre-norm Block with plain Attention, got {kind}.")
    if vit.grad_checkpointing:
        raise ValueError("DiffRate cannot run under gradient checkpointing: call `vit.set_grad_checkpointing(False)`.")
    return vit.num_prefix_tokens


@contextmanager
def _replaced(vit: VisionTransformer, make: Callable[[int, Any], Callable[..., Tensor]]) -> Iterator[None]:
    """Give every block the forward that `make(index, block)` returns, and take it away again."""
    if any("forward" in vars(block) for block in vit.blocks):
        raise ValueError("The blocks' forwards are already replaced: leave the other context manager first.")
    try:
        for index, block in enumerate(vit.blocks):
            cast(Any, block).forward = make(index, block)
        yield
    finally:
        for block in vit.blocks:
            vars(block).pop("forward", None)


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("DiffRate moves tokens, so it takes neither attn_mask nor is_causal.")


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _attend(attn: Any, x: Tensor, bias: Tensor | None, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the attention's output and the importance of its inputs, `(batch, num_tokens)`; prefix: infinite."""
    seen: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, norm in (("query", attn.q_norm), ("key", attn.k_norm))
    ]
    try:
        out = attn(x, attn_mask=bias)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        logits = (seen["query"][:, :, :1].float() * attn.scale) @ seen["key"].float().mT
        if bias is not None:
            logits = logits + bias
        importance = logits.softmax(-1)[:, :, 0].mean(1)
    importance[:, :num_prefix_tokens] = torch.inf
    return out, importance


class _Run:
    """The state of one forward, from block to block."""

    def __init__(self, method: DiffRate, vit: VisionTransformer) -> None:
        self.method, self.vit = method, vit
        self.size: Tensor | None = None

    def block(self, index: int, block: Any) -> Callable[..., Tensor]:
        original = block.forward

        def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            _refuse_mask(attn_mask, is_causal)
            if index == 0:
                self.start(x)
            kept, left = self.table[index]
            importance = None
            if self.size is None and left == x.shape[1]:
                x = original(x)
            else:
                bias = None
                if self.size is not None:
                    bias = self.size.clamp(min=_SMALLEST_SIZE).log().to(x.dtype)[:, None, None, :]
                attended = block.norm1(x)
                if left < x.shape[1]:
                    attended, importance = _attend(block.attn, attended, bias, self.vit.num_prefix_tokens)
                else:
                    attended = block.attn(attended, attn_mask=bias)
                x = x + block.drop_path1(block.ls1(attended))
                if importance is not None:
                    x = self.compress(x, importance, kept, left)
                x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            self.note(x, importance)
            return x

        return forward

    def start(self, x: Tensor) -> None:
        self.table = self.method._table(self.vit, x.shape[1])
        self.size = None
        self.assignment = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        self.method.report = DiffRateReport()

    def compress(self, x: Tensor, importance: Tensor, kept: int, left: int) -> Tensor:
        order = importance.argsort(dim=-1, descending=True, stable=True)
        # Where each token goes: its place in the order, its destination, or nowhere.
        place = torch.full_like(order, -1).scatter_(
            1, order[:, :kept], torch.arange(kept, device=x.device).expand(len(x), -1)
        )
        order = order[:, :kept]
        x = _gather(x, order)
        if self.size is not None:
            self.size = self.size.gather(1, order)
        if left < kept:
            size = x.new_ones(x.shape[:2], dtype=torch.float32) if self.size is None else self.size
            merged = merge_tokens(x, size, left, self.vit.num_prefix_tokens)
            x, self.size = merged.tokens, merged.size
            target = torch.cat([torch.arange(left, device=x.device).expand(len(x), -1), merged.destination], 1)
            place = torch.where(place >= 0, target.gather(1, place.clamp(min=0)), -1)
        self.assignment = torch.where(
            self.assignment >= 0, place.gather(1, self.assignment.clamp(min=0)), self.assignment
        )
        return x

    def note(self, x: Tensor, importance: Tensor | None) -> None:
        report = self.method.report
        report.tokens.append(x.shape[1])
        report.sizes.append(x.new_ones(x.shape[:2], dtype=torch.float32) if self.size is None else self.size)
        report.assignments.append(self.assignment)
        report.importances.append(importance)


def _multiply_adds(vit: VisionTransformer, tokens: Sequence[Any]) -> Any:
    """Count multiply-adds where `tokens[0]` enter the first block and `tokens[i + 1]` leave the block i."""

    def weights(module: Any) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))

    total: Any = weights(vit.patch_embed) * vit.patch_embed.num_patches + weights(vit.head)
    for block, before, after in zip(cast(Any, vit.blocks), tokens[:-1], tokens[1:], strict=True):
        total = total + weights(block.attn) * before + 2 * block.attn.attn_dim * before * before
        total = total + weights(block.mlp) * after
    return total


class RateProxy(nn.Module):
    """A learnable number of tokens to keep: probabilities over candidate numbers, and masks that pass gradients.

    The number of patches kept is the expectation over the candidates, rounded up. A token's probability to be kept is
    that of all candidates which reach its rank.

    Args:
        num_patches: patch tokens of an image, and the largest candidate.
        granularity: step from one candidate down to the next.
        num_prefix_tokens: class and register tokens, always kept and counted.
    """

    candidates: Tensor

    def __init__(self, num_patches: int, granularity: int = 1, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        if not 1 <= granularity <= num_patches:
            raise ValueError(f"granularity must lie in 1..{num_patches}, the number of patches, got {granularity}.")
        self.num_patches, self.num_prefix_tokens, self.granularity = num_patches, num_prefix_tokens, granularity
        candidates = torch.arange(num_patches, 0, -granularity, dtype=torch.float32)
        self.register_buffer("candidates", candidates, persistent=False)
        # Nearly all is on keeping everything, and a heavy tail gives gradients to every other candidate.
        self.logits = nn.Parameter(-3 * torch.arange(1.0, 1 + len(candidates)).log())

    def expected_tokens(self) -> Tensor:
        """Return the expected number of tokens kept, prefix included; a differentiable scalar."""
        return self.num_prefix_tokens + (self.logits.softmax(0) * self.candidates).sum()

    def kept_tokens(self) -> int:
        """Return the number of tokens kept, prefix included."""
        return min(int(self.expected_tokens().ceil()), self.num_prefix_tokens + self.num_patches)

    def token_probability(self) -> Tensor:
        """Return the probability that each token is kept, most important first, `(num_tokens,)`."""
        reached = (self.num_patches - 1 - torch.arange(self.num_patches, device=self.logits.device)) // self.granularity
        patches = self.logits.softmax(0).cumsum(0)[reached]
        return torch.cat([patches.new_ones(self.num_prefix_tokens), patches])

    def mask(self) -> Tensor:
        """Return 1 for each token kept and 0 for the others, most important first, `(num_tokens,)`.

        Its gradient is that of `token_probability`.
        """
        probability = self.token_probability()
        kept = torch.arange(len(probability), device=probability.device) < self.kept_tokens()
        return kept + (probability - probability.detach())


class LearnableRates(nn.Module):
    """The rates of DiffRate as parameters: a pruning and a merging rate for every block but the first.

    In training no token is dropped but masked out of attention, so that gradients tell what another rate would do. The
    forward equals that of the table which `compression` returns. Freeze the model, train these few parameters on its
    own loss plus `flops_loss`:

        rates = LearnableRates(vit)
        with rates.masked(vit):
            loss = F.cross_entropy(vit(images), labels) + rates.flops_loss(vit, target_gflops=2.9)
        loss.backward()
        compression = rates.compression()

    Args:
        vit: the model that they are for.
        granularity: step between the candidate numbers of tokens.

    Raises:
        TypeError, ValueError: DiffRate does not take this model, or it pools other tokens than the class token.
    """

    def __init__(self, vit: VisionTransformer, granularity: int = 1) -> None:
        super().__init__()
        self.num_prefix_tokens, self.num_patches = _check_vit(vit), vit.patch_embed.num_patches
        if vit.global_pool != "token":
            raise ValueError(
                f"Rates are learnt on models that pool the class token, got global_pool={vit.global_pool!r}: masked "
                "tokens would count."
            )
        shape = (self.num_patches, granularity, self.num_prefix_tokens)
        self.prune = nn.ModuleList(RateProxy(*shape) for _ in range(len(vit.blocks) - 1))
        self.merge = nn.ModuleList(RateProxy(*shape) for _ in range(len(vit.blocks) - 1))

    def compression(self) -> DiffRate:
        """Return the method with the rates learnt so far."""
        keep = merge = [self.num_prefix_tokens + self.num_patches]
        for prune_proxy, merge_proxy in self._proxies():
            kept = min(prune_proxy.kept_tokens(), merge[-1])
            keep, merge = [*keep, kept], [*merge, min(merge_proxy.kept_tokens(), kept)]
        return DiffRate(keep, merge)

    def _proxies(self) -> list[tuple[RateProxy, RateProxy]]:
        return cast(Any, list(zip(self.prune, self.merge, strict=True)))

    def flops(self, vit: VisionTransformer) -> Tensor:
        """Return the multiply-adds of one image, a scalar that passes gradients to the rates."""
        count = torch.tensor(float(self.num_prefix_tokens + self.num_patches))
        counts = [count, count]
        for pair in self._proxies():
            for proxy in pair:
                expected = proxy.expected_tokens()
                kept = proxy.kept_tokens() + (expected - expected.detach())
                count = torch.minimum(count.to(kept.device), kept)
            counts.append(count)
        return _multiply_adds(vit, counts)

    def flops_loss(self, vit: VisionTransformer, target_gflops: float) -> Tensor:
        """Return the squared distance to the target, in (1e9 multiply-adds)^2.

        Raises:
            ValueError: the target is not positive.
        """
        if not target_gflops > 0:
            raise ValueError(f"target_gflops must be positive, got {target_gflops}.")
        return (self.flops(vit) / 1e9 - target_gflops) ** 2

    @contextmanager
    def masked(self, vit: VisionTransformer) -> Iterator[VisionTransformer]:
        """Let every forward of `vit` within the block run with masks in place of dropped tokens.

        Raises:
            TypeError, ValueError: as `DiffRate.__call__`.
        """
        self.compression().table(vit)
        run = _MaskedRun(self)
        with _replaced(vit, run.block):
            yield vit


def _masked_attention(attn: Any, x: Tensor, mask: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with weights `mask * size * exp(logit)`; return the output and the class attention `(batch, num_tokens)`.

    Unlike an additive mask this has gradients for tokens that are masked out. `mask` and `size` are `(batch,
    num_tokens)`.
    """
    batch, count, _ = x.shape
    gate = attn.gate(x).sigmoid() if attn.gate is not None else None
    heads = attn.qkv(x).reshape(batch, count, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = attn.q_norm(heads[0]), attn.k_norm(heads[1]), heads[2]
    logits = (query * attn.scale) @ key.mT + size.clamp(min=_SMALLEST_SIZE).log()[:, None, None, :].to(x.dtype)
    present = mask[:, None, None, :]
    largest = logits.masked_fill(present == 0, -torch.inf).amax(-1, keepdim=True).detach()
    weights = (logits - largest).clamp(max=_LARGEST_LOGIT).exp() * present
    weights = weights / weights.sum(-1, keepdim=True)
    out = attn.norm((attn.attn_drop(weights) @ value).transpose(1, 2).reshape(batch, count, attn.attn_dim))
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out)), weights[:, :, 0].mean(1)


class _MaskedRun:
    """The state of one masked forward, from block to block; all tokens stay, the masked ones last."""

    def __init__(self, rates: LearnableRates) -> None:
        self.rates = rates

    def block(self, index: int, block: Any) -> Callable[..., Tensor]:
        original = block.forward

        def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            _refuse_mask(attn_mask, is_causal)
            if index == 0:
                self.start(x)
                return original(x)
            attended, importance = _masked_attention(block.attn, block.norm1(x), self.mask, self.size)
            x = x + block.drop_path1(block.ls1(attended))
            x = self.compress(x, importance.detach(), index)
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        return forward

    def start(self, x: Tensor) -> None:
        compression = self.rates.compression()
        self.counts = list(zip(cast(Any, compression.keep), cast(Any, compression.merge), strict=True))
        if x.shape[1] != self.counts[0][0]:
            raise ValueError(f"These rates are for images of {self.counts[0][0]} tokens, got {x.shape[1]}.")
        self.mask, self.size = x.new_ones(x.shape[:2]), x.new_ones(x.shape[:2], dtype=torch.float32)

    def compress(self, x: Tensor, importance: Tensor, index: int) -> Tensor:
        kept, left = self.counts[index]
        importance[:, self.counts[index - 1][1] :] = -1.0
        importance[:, : self.rates.num_prefix_tokens] = torch.inf
        order = importance.argsort(dim=-1, descending=True, stable=True)
        x, size = _gather(x, order), self.size.gather(1, order)
        prune_proxy, merge_proxy = self.rates._proxies()[index - 1]
        self.mask = self.mask.gather(1, order) * prune_proxy.mask() * merge_proxy.mask()
        if left < kept:
            merged = merge_tokens(x[:, :kept], size[:, :kept], left, self.rates.num_prefix_tokens)
            x, size = torch.cat([merged.tokens, x[:, left:]], 1), torch.cat([merged.size, size[:, left:]], 1)
        self.size = size
        return x
