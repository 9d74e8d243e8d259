"""The benchmarks by name, what they return, and how it is shown. Importing this module imports none of them."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmsdk import __version__
from mmsdk.errors import unknown_name

BENCHMARKS: dict[str, str] = {
    "reconstruction": "mmsdk.bench.reconstruction:reconstruction",
    "rate-distortion": "mmsdk.bench.rate_distortion:rate_distortion",
    "perturbation": "mmsdk.bench.perturbation:perturbation",
    "t2i": "mmsdk.bench.text_to_image:text_to_image",
    "llamagen": "mmsdk.bench.llamagen:llamagen",
    "generators": "mmsdk.bench.generators:generators",
    "prefix": "mmsdk.bench.prefix:prefix",
    "mar": "mmsdk.bench.mar:mar",
    "disa": "mmsdk.bench.disa:disa",
    "lantern": "mmsdk.bench.lantern:lantern",
    "cspd": "mmsdk.bench.cspd:cspd",
    "token-shuffle": "mmsdk.bench.token_shuffle:token_shuffle",
    "tokenbridge-ar": "mmsdk.bench.tokenbridge_ar:tokenbridge_ar",
    "flextok": "mmsdk.bench.flextok:flextok",
    "tokens": "mmsdk.bench.tokens:tokens",
    "entropy": "mmsdk.bench.entropy:entropy",
    "prune-accuracy": "mmsdk.bench.prune_accuracy:prune_accuracy",
    "prune-select": "mmsdk.bench.prune_select:prune_select",
    "prune-vlm": "mmsdk.bench.prune_vlm:prune_vlm",
    "drafters": "mmsdk.bench.drafters:drafters",
    "speculative-text": "mmsdk.bench.speculative_text:speculative_text",
    "diffrate": "mmsdk.bench.diffrate:diffrate",
}

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark measured.

    Attributes:
        name: of the benchmark.
        columns: headings of the table.
        rows: values below them: text, numbers, or None where there is nothing to say.
        notes: what must be known to read the table, and what was executed.
        figures: files that were written.
        environment: versions, threads, machine and the command; filled by `run_benchmark`.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()
    figures: Sequence[Path] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def value(self, column: str, **where: Any) -> Any:
        """Return the value of `column` in the first row whose columns have the values of `where`.

        Args:
            column: heading.
            **where: heading=value; a heading with spaces is passed as `**{"of recon.": 1}`.

        Raises:
            KeyError: there is no such column or row.
        """
        for row in self.rows:
            cells = dict(zip(self.columns, row, strict=True))
            if all(cells[k] == v for k, v in where.items()):
                return cells[column]
        raise KeyError(f"No row of {self.name!r} has {where}.")


def resolve_benchmark(name: str) -> Callable[..., BenchResult]:
    """Import and return the function of the benchmark called `name`.

    Raises:
        UnknownNameError: no benchmark has this name.
    """
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, list(BENCHMARKS))
    module, attribute = BENCHMARKS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def run_benchmark(
    name: str, json_path: str | Path | None = None, output_dir: str | Path | None = None, **options: Any
) -> BenchResult:
    """Run one benchmark and return what it measured, with the circumstances; prints nothing.

    Args:
        name: one of `BENCHMARKS`.
        json_path: write everything there as JSON.
        output_dir: write plots and sample sheets there; without it there are none.
        **options: of the benchmark, as its function documents them.

    Raises:
        UnknownNameError: no benchmark, or no option of it, has this name.
    """
    from mmsdk.tokens import write_atomically

    function = resolve_benchmark(name)
    accepted = [key for key in inspect.signature(function).parameters if key != "output_dir"]
    for key in options:
        if key not in accepted:
            raise unknown_name(f"option of the benchmark {name!r}", key, accepted)
    folder = Path(output_dir) if output_dir is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    result = function(output_dir=folder, **options)
    environment = _environment() | {
        "command": _command(name, json_path, output_dir, options),
        "seconds": round(time.perf_counter() - started, 1),
        "load_average_at_start": load,
    }
    result = replace(result, environment=environment)
    if json_path is not None:
        content = json.dumps(asdict(result), indent=2, default=str, ensure_ascii=False)
        write_atomically(json_path, (content + "\n").encode())
    return result


def _environment() -> dict[str, Any]:
    import torch

    versions = {"mmsdk": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}, torch for {torch.backends.cpu.get_cpu_capability()}",
    }


def _command(name: str, json_path: Any, output_dir: Any, options: Mapping[str, Any]) -> str:
    parts = ["mmsdk", "bench", name]
    for key, value in options.items():
        parts += ["--option", f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"]
    for flag, path in (("--json", json_path), ("--output-dir", output_dir)):
        if path is not None:
            parts += [flag, str(path)]
    return shlex.join(parts)


# ---------------------------------------------------------------- what people read


def format_table(result: BenchResult) -> str:
    """Return the result as aligned text, with its notes, its figures and the circumstances."""
    cells = [[str(c) for c in result.columns], *([_cell(v) for v in row] for row in result.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(result.columns))]
    numeric = [all(not isinstance(row[i], str) for row in result.rows) for i in range(len(result.columns))]
    lines = [
        "  ".join(f"{c:>{w}}" if n else f"{c:<{w}}" for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines += ["", *result.notes] if result.notes else []
    if result.environment:
        e = result.environment
        versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items())
        lines += ["", f"{e['command']}", f"{e['threads']} threads of {e['processors']} processors, {versions}"]
    lines += [f"wrote {path}" for path in result.figures]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
