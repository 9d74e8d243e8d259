"""Find and read the recorded outputs of the published code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(os.environ.get("MMSDK_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")


def golden_path(system: str) -> Path:
    """Return the folder of one system, whether it exists or not."""
    return GOLDEN / system


def golden_index(system: str) -> dict[str, Any]:
    """Return `golden.json` of one system; empty where there is no golden data at all.

    A folder of golden data without this system is an error, not a reason to skip.
    """
    if not GOLDEN.is_dir():
        return {}
    return json.loads((golden_path(system) / "golden.json").read_text())


def golden_cases(system: str) -> list[Any]:
    """Return the cases of one system for `pytest.mark.parametrize("name, case", ...)`.

    Without golden data: one skipped parameter, so that the absence is seen. With it, no case is an error.
    """
    index = golden_index(system)
    if not index:
        return [pytest.param("", {}, marks=pytest.mark.skip(reason=f"no golden data at {GOLDEN}"), id="absent")]
    if not index.get("cases"):
        raise LookupError(f"{golden_path(system) / 'golden.json'} has no case.")
    return [pytest.param(name, case, id=name) for name, case in index["cases"].items()]


def select_cases(cases: list[Any], keep: Any) -> list[Any]:
    """Return the parameters for which `keep(name, case)` holds, and the skipped one of absent data; none: an error."""
    selected = [c for c in cases if c.id == "absent" or keep(*c.values)]
    if not selected:
        raise LookupError("No golden case is selected.")
    return selected


def golden_manifests(system: str, prefix: str) -> list[Any]:
    """Return a parameter `variant` for every `state_dict_<variant>.json` whose variant begins with `prefix`."""
    if not GOLDEN.is_dir():
        return [pytest.param("", marks=pytest.mark.skip(reason=f"no golden data at {GOLDEN}"), id="absent")]
    found = sorted(p.stem.removeprefix("state_dict_") for p in golden_path(system).glob(f"state_dict_{prefix}*.json"))
    if not found:
        raise LookupError(f"{golden_path(system)} has no manifest state_dict_{prefix}*.json.")
    return [pytest.param(name, id=name) for name in found]


def load_json(system: str, name: str) -> Any:
    """Read a JSON file of one system."""
    return json.loads((golden_path(system) / name).read_text())


def load_tensors(system: str, file: str) -> dict[str, Tensor]:
    """Read a safetensors file by the name that golden.json gives, which may carry a remark after the file's name."""
    return load_file(golden_path(system) / file.split(" ")[0])


def assert_manifest(model: torch.nn.Module, manifest: dict[str, Any]) -> None:
    """Check a state dict against `{key: [shape, dtype]}`: the same keys, each with its shape and dtype."""
    ours = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()}
    assert sorted(ours) == sorted(manifest)
    assert {k: v for k, v in ours.items() if v != manifest[k]} == {}
