"""Acceptance rules: how much of a draft the target would have said."""

from mmsdk.decoding.base import AcceptanceRule
from mmsdk.decoding.rules.continuous import Continuous
from mmsdk.decoding.rules.greedy import Greedy
from mmsdk.decoding.rules.kseq import KSeq
from mmsdk.decoding.rules.lantern import Lantern
from mmsdk.decoding.rules.matching import Matching
from mmsdk.decoding.rules.rejection import Rejection

RULES: dict[str, type[AcceptanceRule]] = {
    "greedy": Greedy,
    "matching": Matching,
    "rejection": Rejection,
    "kseq": KSeq,
    "lantern": Lantern,
}

__all__ = ["RULES", "Continuous", "Greedy", "KSeq", "Lantern", "Matching", "Rejection"]
