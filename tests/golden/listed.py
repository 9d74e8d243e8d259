"""Golden cases that `golden.json` keeps in a list."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden.util import GOLDEN, golden_index


def listed_cases(system: str, key: str = "cases") -> list[Any]:
    """Return the entries of one list for `pytest.mark.parametrize("case", ...)`.

    Without golden data: one skipped parameter, so that the absence is seen. With it, no case is an error.
    """
    index = golden_index(system)
    if not index:
        return [pytest.param({}, marks=pytest.mark.skip(reason=f"no golden data at {GOLDEN}"), id="absent")]
    if not index.get(key):
        raise LookupError(f"The golden.json of {system} has no {key}.")
    return [pytest.param(case, id=case.get("name", f"{key}{i}")) for i, case in enumerate(index[key])]
