"""What holds for every test: no network, and one thread, so that results do not depend on the machine's cores."""

from __future__ import annotations

import os

# Before any library reads it.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models are slower with several threads.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run a slow test without `-m slow` where it alone is asked for by its id."""
    named = [argument for argument in config.args if "::" in argument]
    if named and len(named) == len(config.args):
        config.option.markexpr = ""
