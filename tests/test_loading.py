"""Names to models, and published checkpoints: what is unwrapped, what is refused, and what the messages say."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmsdk import loading
from mmsdk.errors import CheckpointError, UnknownNameError
from mmsdk.loading import TOKENIZERS, embedded_models, load_into, load_original, resolve, resolve_pretrained

STATE = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("wrapper", ["model_ema", "model", "module", "state_dict", None])
def test_unwrapping(wrapper: str | None, tmp_path: Path) -> None:
    content = {wrapper: STATE, "epoch": 3} if wrapper else STATE
    assert same(load_original(content), STATE)
    torch.save(content, tmp_path / "checkpoint.pt")
    assert same(load_original(tmp_path / "checkpoint.pt"), STATE)


def test_averaged_weights_go_first_and_wrappers_nest() -> None:
    other = {"weight": torch.zeros(1)}
    assert same(load_original({"model": other, "model_ema": STATE}), STATE)
    assert same(load_original({"model": {"module": STATE}}), STATE)


def test_mappings_that_contain_themselves_are_refused() -> None:
    endless: dict[str, object] = {}
    endless["model"] = endless
    with pytest.raises(CheckpointError, match="'model'"):
        load_original(endless)


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    assert same(load_original(tmp_path / "a.safetensors"), STATE)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt"])
def test_pickles_run_no_code(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {"model": STATE | {"weight": Malicious(trace)}}
    (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_original(tmp_path / name)
    torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_original(tmp_path / name)
    assert not trace.exists()
    # It would have worked.
    pickle.loads(pickle.dumps(content))["model"]["weight"].close()  # noqa: S301
    assert trace.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02\x8a"])
def test_damaged_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_original(tmp_path / name)


def test_truncated_files(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    save_file(STATE, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(CheckpointError, match=name):
            load_original(path)


def test_other_contents(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint file"):
        load_original(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="'epoch'"):
        load_original({"epoch": 3, "weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="named tensors, for example under 1"):
        load_original({1: torch.ones(1)})
    for content in ({}, {"model": {}}):
        with pytest.raises(CheckpointError, match="no state dict"):
            load_original(content)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no state dict, but list"):
        load_original(tmp_path / "list.pt")


def test_load_into_is_strict() -> None:
    model = nn.Linear(3, 2)
    load_into(model, STATE)
    assert torch.equal(model.weight, STATE["weight"])
    with pytest.raises(CheckpointError, match=r"missing 'bias'; unexpected 'scale'"):
        load_into(model, {"weight": STATE["weight"], "scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'bias' has shape \(5,\), expected \(2,\)"):
        load_into(model, STATE | {"bias": torch.ones(5)})
    with pytest.raises(CheckpointError, match=r"'bias' holds NaN"):
        load_into(model, STATE | {"bias": torch.tensor([0.0, float("nan")])})
    with pytest.raises(CheckpointError, match="and 1 more"):
        load_into(model, STATE | {f"extra{i}": torch.ones(1) for i in range(6)})


def test_allow_lists_hold_keys_and_prefixes() -> None:
    model = nn.Linear(3, 2)
    extra = {"buffer.a": torch.ones(1), "buffer.b": torch.ones(1)}
    load_into(model, STATE | extra, allow_unexpected=("buffer.",))
    load_into(model, {"weight": STATE["weight"]}, allow_missing=("bias",))
    with pytest.raises(CheckpointError, match=r"buffer\.a"):
        load_into(model, STATE | extra, allow_unexpected=("buffer",))


def test_models_on_meta_take_the_tensors() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    load_into(model, STATE)
    assert torch.equal(model.weight, STATE["weight"])


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "index.json").write_text(json.dumps({"emoji-64": {"vq": "emoji-64/image_tokenizer"}}))
    monkeypatch.setattr(loading, "WEIGHTS_FOLDER", weights)
    assert embedded_models() == {"emoji-64": {"vq": "emoji-64/image_tokenizer"}}
    assert resolve_pretrained("vq", "emoji-64") == str(weights / "emoji-64/image_tokenizer")
    assert resolve_pretrained("vq", weights) == str(weights)
    assert resolve_pretrained("vq", "owner/model") == "owner/model"
    with pytest.raises(UnknownNameError, match="has no 'titok'"):
        resolve_pretrained("titok", "emoji-64")
    with pytest.raises(UnknownNameError, match="Did you mean 'emoji-64'"):
        resolve_pretrained("vq", "emoji64")
    with pytest.raises(UnknownNameError, match="hub id"):
        resolve_pretrained("vq", "./absent/folder")


def test_unknown_class_names() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'one_d_piece'"):
        resolve("one_d_peice")


def test_embedded_models_are_complete() -> None:
    for parts in embedded_models().values():
        for component, folder in parts.items():
            # Vision-language models are classes of transformers.
            assert component == "vlm" or component in loading.REGISTRY
            assert (loading.WEIGHTS_FOLDER / folder).is_dir()


@pytest.mark.parametrize(
    ("name", "component"), [(n, c) for n, parts in embedded_models().items() for c in parts if c in TOKENIZERS]
)
def test_embedded_tokenizers_load(name: str, component: str) -> None:
    tokenizer = resolve(component).from_pretrained(name)
    size = tokenizer.config.image_size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert tokenizer.reconstruct(images).images.shape == images.shape
