"""DivPrune: keep the tokens that are most unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.base import Pruner, PruningContext

# Up to this many tokens, all their distances are computed and kept: 64 MiB at most.
_ALL_PAIRS = 4096
# From this many tokens on, computing fewer distances is worth its detours where at most a fifth is kept.
_FEW_PAIRS = 2048
# Tokens in a block of all distances. The search for the first pick begins with the distances of about as many tokens to
# all others, and goes on with those of the most promising ones.
_COLUMNS = 128
_PROMISING = 32
# Tokens brought up to date together, and candidates for the next picks among them.
_REFRESHED = 512
_CANDIDATES = 96
# From this many rows and columns on, matrix products round an entry the same way whatever their size. It makes the
# picks those that the whole matrix of distances would give even where two tokens are equally far but for rounding.
_SMALLEST = 16
# Above the rounding errors of a float32 cosine.
_SLACK = 1e-6


@dataclass(kw_only=True)
class DivPrune(Pruner):
    """Select tokens greedily, each the farthest (cosine distance) from those selected before.

    Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
    https://arxiv.org/abs/2503.02175; published with `keep_ratio=0.098`. Works on any vision encoder, since it looks at
    features alone. Deterministic; ties go to the lowest index. Selection runs in float32 whatever the model's dtype.

    The picks are those of the published O(k^2 N) algorithm (k of N tokens kept), found with a running minimum in O(k N)
    after half of the N x N matrix of distances; or, where few of many tokens are kept and always above 4096, after a
    quarter of it or less, in O(N x block) memory. The published code repeats a token once every distinct vector is
    taken; here a selected token is never selected again, so that exactly the asked number is kept, the further ones by
    lowest index.
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
        total = len(vectors)
        few = total > _ALL_PAIRS or (total >= _FEW_PAIRS and 5 * count <= total)
        return _from_few_pairs(vectors, count) if few else _from_all_pairs(vectors, count)


def _from_all_pairs(vectors: Tensor, count: int) -> Tensor:
    """Return the indices `(count,)` of the picks among unit vectors `(num_tokens, dim)`, given all their distances."""
    total = len(vectors)
    similarity = vectors.new_empty(total, total)
    for end in range(_COLUMNS, total + _COLUMNS, _COLUMNS):
        # The matrix is symmetric. Its last block overlaps the one before, so that none is small (see `_SMALLEST`).
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


def _from_few_pairs(vectors: Tensor, count: int) -> Tensor:
    """Return the same as `_from_all_pairs`, computing only the distances that can matter.

    Distances to the selected tokens only shrink. So a token is compared with the latest picks no sooner than its last
    known distance is among the greatest.
    """
    total = len(vectors)
    picks = _most_isolated(vectors)
    distance = _distances(vectors[picks], vectors)[0]
    distance[picks] = -torch.inf
    # How many picks each token was compared with.
    compared = torch.ones(total, dtype=torch.int64, device=vectors.device)
    stale_vectors = vectors.new_empty(min(_REFRESHED, total) + 1, vectors.shape[1])
    while len(picks) < count:
        while True:
            # `topk` may miss the first of equally far tokens, which is the one to pick.
            first = distance.argmax(0, keepdim=True)
            farthest = torch.cat([first, distance.topk(min(_REFRESHED, total)).indices])
            outdated = compared[farthest] < len(picks)
            if not bool(outdated[: _CANDIDATES + 1].any()):
                break
            stale = farthest[outdated]
            start = min(int(compared[stale].min()), max(0, len(picks) - _SMALLEST))
            rows = torch.index_select(vectors, 0, stale, out=stale_vectors[: len(stale)])
            nearest = _distances(vectors[picks[start:]], rows).amin(0)
            distance[stale] = torch.minimum(distance[stale], nearest)
            compared[stale] = len(picks)
        new = _next_picks(vectors, distance, first, count - len(picks))
        distance[new] = -torch.inf
        picks = torch.cat([picks, new])
    return picks


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the cosine distances `(num_rows, num_columns)` of unit vectors `(num_rows, dim)`, `(num_columns, dim)`."""
    return (_padded(rows) @ _padded(columns).T).neg_().add_(1)[: len(rows), : len(columns)]


def _padded(vectors: Tensor) -> Tensor:
    missing = max(0, _SMALLEST - len(vectors))
    return torch.cat([vectors, vectors[-1:].expand(missing, -1)]) if missing else vectors


def _most_isolated(vectors: Tensor) -> Tensor:
    """Return the index `(1,)` of the unit vector `(num_tokens, dim)` that is farthest from its nearest other one."""
    total = len(vectors)
    nearest = torch.full((total,), torch.inf, device=vectors.device)
    known = torch.zeros(total, dtype=torch.bool, device=vectors.device)
    rows = torch.arange(0, total, -(-total // _COLUMNS), device=vectors.device)
    for _ in range(2):
        distance = _distances(vectors[rows], vectors).scatter_(1, rows[:, None], torch.inf)
        nearest = torch.minimum(nearest, distance.amin(0))
        nearest[rows] = distance.amin(1)
        known[rows] = True
        rows = torch.where(known, -torch.inf, nearest).topk(min(_PROMISING, total)).indices
    # The best that is known is a lower bound of the answer. Most tokens fall below it after a few comparisons.
    bound = torch.where(known, nearest, -torch.inf).max() - _SLACK
    others = (~known).nonzero()[:, 0]
    alive = others[nearest[others] >= bound]
    left, rows = nearest[alive], vectors[alive]
    nearest[others] = -torch.inf
    begin = 0
    while begin < len(others) and len(alive):
        columns = others[begin : begin + _COLUMNS * total // len(alive)]
        begin += len(columns)
        distance = _distances(rows, vectors[columns])
        distance[alive[:, None] == columns] = torch.inf
        left = torch.minimum(left, distance.amin(1))
        keep = left >= bound
        alive, left, rows = alive[keep], left[keep], rows[keep]
    nearest[alive] = left
    return nearest.argmax(0, keepdim=True)


def _next_picks(vectors: Tensor, distance: Tensor, first: Tensor, limit: int) -> Tensor:
    """Return the next picks, one to `limit`, beginning with `first`.

    While the greatest distance `(num_tokens,)` among a few candidates exceeds what every other token has now, the next
    pick is among them, and the distances between candidates are all that is needed to find it.
    """
    farthest = distance.topk(min(_CANDIDATES, len(distance)))
    others = float(farthest.values[-1])
    candidates = torch.cat([farthest.indices[:-1], first]).unique()
    between = _distances(vectors[candidates], vectors[candidates]).cpu().unbind()
    left = distance[candidates].cpu()
    places = [int((candidates == first).nonzero())]
    while len(places) < limit:
        left = torch.minimum(left, between[places[-1]])
        left[places[-1]] = -torch.inf
        place = int(left.argmax())
        if float(left[place]) <= others:
            break
        places.append(place)
    return candidates[places]
