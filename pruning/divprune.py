"""DivPrune: keep the tokens that are most unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.base import Pruner, PruningContext

# Up to this many tokens, all their distances are computed and kept: 64 MiB at most.
_ALL_PAIRS = 4096
# Tokens looked at together: as columns in the search for the first pick, as candidates in the search for the next ones.
# Matrix products of this size are efficient, and little of what they compute remains unused.
_COLUMNS = 128
_CANDIDATES = 64
# From this many rows on, matrix products round an entry the same way whatever their size. It makes the picks those that
# the whole matrix of distances would give even where two tokens are equally far but for rounding.
_ROWS = 16
# Above the rounding errors of a float32 cosine.
_SLACK = 1e-6


@dataclass(kw_only=True)
class DivPrune(Pruner):
    """Select tokens greedily, each the farthest (cosine distance) from those selected before.

    Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
    https://arxiv.org/abs/2503.02175; published with `keep_ratio=0.098`. Works on any vision encoder, since it looks at
    features alone. Deterministic; ties go to the lowest index. Selection runs in float32 whatever the model's dtype.

    The picks are those of the published O(k^2 N) algorithm (k of N tokens kept), found with a running minimum in O(k N)
    after half of the N x N matrix of distances; above 4096 tokens, in O(N x block) memory without that matrix. The
    published code repeats a token once every distinct vector is taken; here a selected token is never selected
    again, so that exactly the asked number is kept, the further ones by lowest index.
    """

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)`, ascending, of the kept among `features` `(num_tokens, dim)`.

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        return self.select_in_order(features).sort().values

    def select_in_order(self, features: Tensor) -> Tensor:
        """Return the indices `(num_kept,)` of the kept among `features` `(num_tokens, dim)`, first pick first."""
        count = self.budget(len(features))
        if count == len(features):
            return torch.arange(count, device=features.device)
        vectors = features.float()
        norms = vectors.norm(dim=-1, keepdim=True)
        if not bool(norms.isfinite().all()):
            raise ValueError("DivPrune cannot compare visual features that are NaN or infinite, as these are.")
        # The bound keeps a zero vector, at distance 1 from everything, from turning all distances into NaN.
        vectors = vectors / norms.clamp_min(torch.finfo(torch.float32).tiny)
        return _from_all_pairs(vectors, count) if len(vectors) <= _ALL_PAIRS else _from_few_rows(vectors, count)


def _from_all_pairs(vectors: Tensor, count: int) -> Tensor:
    """Return the indices `(count,)` of the picks among unit vectors `(num_tokens, dim)`, given all their distances."""
    total = len(vectors)
    similarity = vectors.new_empty(total, total)
    for end in range(_COLUMNS, total + _COLUMNS, _COLUMNS):
        # The matrix is symmetric. Its last block overlaps the one before, so that none is small (see `_ROWS`).
        block = slice(max(0, min(end, total) - _COLUMNS), end)
        product = vectors[block.start :] @ vectors[block].T
        similarity[block.start :, block] = product
        similarity[block, block.start :] = product.T
    similarity.fill_diagonal_(-torch.inf)
    picks = [(1 - similarity.amax(1)).argmax()]
    distance = torch.full((total,), torch.inf, device=vectors.device)
    while len(picks) < count:
        distance = torch.minimum(distance, 1 - similarity[picks[-1]])
        distance[picks[-1]] = -torch.inf
        picks.append(distance.argmax())
    return torch.stack(picks)


def _from_few_rows(vectors: Tensor, count: int) -> Tensor:
    """Return the same as `_from_all_pairs`, computing the distances of few tokens to all others."""
    picks = new = _most_isolated(vectors)
    distance = torch.full((len(vectors),), torch.inf, device=vectors.device)
    while len(picks) < count:
        distance = torch.minimum(distance, _distances(vectors, new).amin(0))
        distance[picks] = -torch.inf
        new = _next_picks(vectors, distance, count - len(picks))
        picks = torch.cat([picks, new])
    return picks


def _distances(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the cosine distances `(num_rows, num_tokens)` of some of the unit vectors `(num_tokens, dim)` to all."""
    padded = torch.cat([rows, rows[-1:].expand(max(0, _ROWS - len(rows)))])
    return 1 - (vectors[padded] @ vectors.T)[: len(rows)]


def _isolation(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the distances `(num_rows,)` of some of the unit vectors `(num_tokens, dim)` to their nearest other one."""
    return _distances(vectors, rows).scatter_(1, rows[:, None], torch.inf).amin(1)


def _most_isolated(vectors: Tensor) -> Tensor:
    """Return the index `(1,)` of the unit vector `(num_tokens, dim)` that is farthest from its nearest other one."""
    alive = torch.arange(len(vectors), device=vectors.device)
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    rows, bound = vectors, -torch.inf
    for end in range(_COLUMNS, len(vectors) + _COLUMNS, _COLUMNS):
        start = max(0, min(end, len(vectors)) - _COLUMNS)
        distance = 1 - rows @ vectors[start:end].T
        own = (alive >= start) & (alive < end)
        distance[own, alive[own] - start] = torch.inf
        nearest = torch.minimum(nearest, distance.amin(1))
        # What any token has in the end is a lower bound of the answer. That of the best so far is a sharp one: most
        # tokens fall below it after a few columns.
        best = alive[nearest.topk(min(_ROWS, len(nearest))).indices]
        bound = max(bound, float(_isolation(vectors, best).max()) - _SLACK)
        keep = nearest >= bound
        alive, nearest, rows = alive[keep], nearest[keep], rows[keep]
        if len(alive) <= _ROWS:
            nearest = _isolation(vectors, alive)
            break
    return alive[nearest.argmax(0, keepdim=True)]


def _next_picks(vectors: Tensor, distance: Tensor, limit: int) -> Tensor:
    """Return the next picks, one to `limit`, given each token's distance `(num_tokens,)` to those selected before.

    Distances only shrink. So while the greatest among a few candidates exceeds what every other token has now, the next
    pick is among them, and the distances between candidates are all that is needed to find it.
    """
    pick = distance.argmax(0, keepdim=True)
    farthest = distance.topk(min(_CANDIDATES, len(distance)))
    others = float(farthest.values[-1])
    # Ties may have kept the first pick, the one of lowest index, out of the candidates.
    candidates = torch.cat([farthest.indices[:-1], pick]).unique()
    between = _distances(vectors[candidates], torch.arange(len(candidates), device=vectors.device)).cpu()
    left = distance[candidates].cpu()
    places = [int((candidates == pick).nonzero())]
    while len(places) < limit:
        left = torch.minimum(left, between[places[-1]])
        left[places[-1]] = -torch.inf
        place = int(left.argmax())
        if float(left[place]) <= others:
            break
        places.append(place)
    return candidates[places]
