"""The benchmarks on tiny models and a tiny data set: complete, honest about both sides, and readable."""

from __future__ import annotations

import inspect
import json
import pkgutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmsdk.bench
from generators import llamagen as llamagen_model
from generators.annealing import StepAnnealing
from generators.feature_head import FeatureHead
from mmsdk.bench import llamagen as llamagen_bench
from mmsdk.bench.evaluator import Evaluator
from mmsdk.bench.llamagen import PlainLoop
from mmsdk.bench.runner import BENCHMARKS, BenchResult, format_table, resolve_benchmark, run_benchmark
from mmsdk.bench.text_to_image import text_to_image
from mmsdk.data.captions import train_caption_tokenizer
from mmsdk.data.emoji import EmojiDataset, EmojiRecord
from mmsdk.errors import DataError, MMSDKError, UnknownNameError
from mmsdk.tokens import ImageTokens
from mmsdk.training.tokenizer_recipes import psnr
from tests.test_accelerators import draft_mar
from tests.test_llamagen import make_condition, make_model
from tests.tiny import tiny_flextok, tiny_latent_pipeline, tiny_one_d_piece, tiny_pipeline, tiny_vq
from tokenizers_img.one_d_piece import OneDPiece

HELPERS = {"measure", "runner", "evaluator", "figures", "prompts", "text_prompts"}
SPLITS = {"train": 24, "pair": 8, "test": 8}
LABELS = [a + b for a in "abcdefgh" for b in "aeiou"]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def needs_network() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `bench`")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models, and of a tiny data set in the format of the real one."""
    root = tmp_path_factory.mktemp("bench")
    tiny_pipeline().save_pretrained(root / "grid")
    tiny_pipeline(tiny_one_d_piece()).save_pretrained(root / "ordered")
    tiny_pipeline(condition="class").save_pretrained(root / "class")
    tiny_latent_pipeline().save_pretrained(root / "latent")
    draft_mar().save_pretrained(root / "latent-draft")
    torch.manual_seed(0)
    FeatureHead.for_generator(tiny_pipeline().transformer).save_pretrained(root / "grid-head")
    tiny_vq().save_pretrained(root / "vq")
    tiny_one_d_piece().save_pretrained(root / "one_d_piece")
    tiny_flextok().save_pretrained(root / "flextok")
    tokenizer = train_caption_tokenizer([f"{label} noto" for label in LABELS], 200, 8)
    torch.manual_seed(0)
    judge = Evaluator(len(tokenizer), 16, 1, 2, 16, max_prompt_tokens=8)
    judge.tokenizer = tokenizer
    judge.save_pretrained(root / "evaluator")
    data = root / "emoji-64"
    data.mkdir()
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    records = [
        EmojiRecord(f"{i:x}", f"{i:x}", label, (), "letters", "noto", split)
        for i, (label, split) in enumerate(zip(LABELS, splits, strict=True))
    ]
    # One label is longer than the tiny models read.
    records.append(EmojiRecord("ffff", "ffff", " ".join(LABELS[:9]), (), "letters", "noto", "train"))
    pixels = np.random.default_rng(0).integers(0, 256, (len(records), 8, 8, 4), np.uint8)
    np.save(data / "images.npy", pixels.repeat(8, 1).repeat(8, 2))
    (data / "records.json").write_text(json.dumps([asdict(r) for r in records]))
    return {p.name: str(p) for p in root.iterdir()} | {"cache": str(root)}


# ---------------------------------------------------------------- the runner


def test_every_benchmark_is_registered() -> None:
    modules = {info.name for info in pkgutil.iter_modules(mmsdk.bench.__path__)} - HELPERS
    assert {target.split(":")[0].rpartition(".")[2] for target in BENCHMARKS.values()} == modules


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks_resolve_and_document_every_option(name: str) -> None:
    function = resolve_benchmark(name)
    parameters = inspect.signature(function).parameters
    assert "output_dir" in parameters
    assert all(p.default is not inspect.Parameter.empty for p in parameters.values())
    documented = (inspect.getdoc(function) or "").partition("Args:")[2]
    assert [key for key in parameters if f"{key}: " not in documented] == []


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'reconstruction'"):
        run_benchmark("reconstructions")
    with pytest.raises(UnknownNameError, match="option of the benchmark 't2i'.*Did you mean 'num_prompts'"):
        run_benchmark("t2i", num_prompt=3)
    with pytest.raises(UnknownNameError, match="Unknown option"):
        run_benchmark("t2i", **{"json": 1})


def test_table_by_hand() -> None:
    result = BenchResult("x", ["name", "n", "rate"], [["one", 1, 0.12345], ["other", 20, None]], ["A note."])
    assert format_table(result).splitlines() == [
        "name    n   rate",
        "-----  --  -----",
        "one     1  0.123",
        "other  20      -",
        "",
        "A note.",
    ]
    assert result.value("rate", name="one", n=1) == 0.12345
    with pytest.raises(KeyError, match="No row"):
        result.value("rate", name="none")


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["class", "text", "learned"])
@pytest.mark.parametrize("batch", [1, 3])
def test_plain_loop_gives_our_tokens(kind: str, batch: int) -> None:
    model = make_model(kind)
    condition = make_condition(model, batch)
    uniforms = torch.rand(batch, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sampling = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    ours = model.generate(**condition, guidance_scale=2.0, uniforms=uniforms, **sampling).token_ids
    plain = PlainLoop(model).generate(condition, 16, 2.0, uniforms, **sampling)
    assert torch.equal(ours, plain)
    greedy = model.generate(**condition, guidance_scale=2.0, do_sample=False, num_tokens=9).token_ids
    assert torch.equal(greedy, PlainLoop(model).generate(condition, 9, 2.0))
    assert not torch.equal(plain, PlainLoop(model).generate(condition, 16, 3.0, uniforms, **sampling))


@pytest.mark.parametrize("model", ["grid", "class"])
def test_llamagen(folders: dict[str, str], tmp_path: Path, model: str) -> None:
    result = run_benchmark(
        "llamagen", json_path=tmp_path / "x.json", model=folders[model], batch_sizes=[1, 2], repeats=1
    )
    assert [row[1] for row in result.rows] == [1, 2]
    for row in result.rows:
        cells = dict(zip(result.columns, row, strict=True))
        assert cells["ratio"] == pytest.approx(cells["ours tok/s"] / cells["plain tok/s"])
        assert cells["tokens"] == 16
        assert cells["slots ours"] < cells["slots plain"]
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["columns"] == result.columns
    assert content["environment"]["versions"]["torch"] == version("torch")
    assert "--option 'batch_sizes=[1, 2]'" in content["environment"]["command"]
    assert content["environment"]["threads"] == torch.get_num_threads()


def test_llamagen_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llamagen_model.PRESETS, "tiny", (1, 2, 16))
    state = torch.get_rng_state()
    result = run_benchmark("llamagen", preset="tiny", image_size=32, batch_sizes=[2], repeats=1)
    assert result.value("tokens", batch=2) == 4
    # The whole triangle of 1 condition and 3 tokens, of which a step sees 2.5 slots on average, of 5.
    assert result.value("slots ours", batch=2) == 2.5
    assert result.value("slots plain", batch=2) == 5
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny'"):
        run_benchmark("llamagen", preset="tinny")


def test_different_tokens_are_not_compared(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(PlainLoop):
        def generate(self, *arguments: object, **keywords: object) -> torch.Tensor:
            token_ids = super().generate(*arguments, **keywords)  # type: ignore[arg-type]
            token_ids[0, 5] = (token_ids[0, 5] + 1) % 32
            return token_ids

    monkeypatch.setattr(llamagen_bench, "PlainLoop", Wrong)
    with pytest.raises(MMSDKError, match="at batch 1 image 0 differs from token 5 on"):
        run_benchmark("llamagen", model=folders["grid"], repeats=1)


def test_llamagen_refuses_what_would_not_be_fair(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="guidance_scale must differ from 1"):
        run_benchmark("llamagen", model=folders["grid"], guidance_scale=1.0)
    with pytest.raises(ValueError, match="repeats"):
        run_benchmark("llamagen", model=folders["grid"], repeats=0)


# ---------------------------------------------------------------- tokens


def test_tokens(folders: dict[str, str]) -> None:
    result = run_benchmark(
        "tokens", one_d_piece=folders["one_d_piece"], vq=folders["vq"], counts=[1, 3, 8, 64], num_images=4, repeats=1,
        cache_dir=folders["cache"],
    )  # fmt: skip
    assert [row[:2] for row in result.rows] == [["one_d_piece", 1], ["one_d_piece", 3], ["one_d_piece", 8], ["vq", 16]]
    tokenizer = OneDPiece.from_pretrained(folders["one_d_piece"]).eval()
    image = EmojiDataset("test", cache_dir=folders["cache"]).images[0]
    stream = tokenizer.encode(image, 3).to_bytes()
    assert result.value("bytes", tokenizer="one_d_piece", tokens=3) == len(stream)
    assert result.value("payload", tokenizer="one_d_piece", tokens=3) == 2  # 3 tokens of 5 bits
    assert ImageTokens.from_bytes(stream).num_tokens == 3
    for row in result.rows:
        cells = dict(zip(result.columns, row, strict=True))
        assert cells["header"] + cells["payload"] == cells["bytes"]
        assert cells["in a batch"] < cells["bytes"]
        assert min(cells["encode/s"], cells["decode/s"], cells["to_bytes us"], cells["from_bytes us"]) > 0


# ---------------------------------------------------------------- reconstruction


def test_reconstruction_without_an_evaluator(folders: dict[str, str], tmp_path: Path) -> None:
    result = run_benchmark(
        "reconstruction", one_d_piece=folders["one_d_piece"], flextok=None, vq=folders["vq"], evaluator=None,
        counts=[1, 2, 8, 64], batch_size=3, sheet_images=2, cache_dir=folders["cache"], output_dir=tmp_path / "plots",
    )  # fmt: skip
    names = [row[:2] for row in result.rows]
    assert names == [["real images", None], ["one_d_piece", 1], ["one_d_piece", 2], ["one_d_piece", 8], ["vq", 16]]
    tokenizer = OneDPiece.from_pretrained(folders["one_d_piece"]).eval()
    images = tokenizer.preprocess(list(EmojiDataset("test", cache_dir=folders["cache"]).images))
    expected = float(psnr(tokenizer.reconstruct(images, 2).images, images).mean())
    assert result.value("PSNR", images="one_d_piece", tokens=2) == pytest.approx(expected, rel=1e-3)
    assert result.value("bits", images="vq") == 80  # 16 tokens of 5 bits
    assert [p.name for p in result.figures] == ["reconstruction.png", "reconstruction-samples.png"]
    assert size_of(result.figures[0]) == (720, 480)
    assert size_of(result.figures[1])[1] == 5 * (96 + 6)


def test_reconstruction_is_judged_beside_real_images(
    needs_network: None, folders: dict[str, str], tmp_path: Path
) -> None:
    result = run_benchmark(
        "reconstruction", one_d_piece=None, flextok=folders["flextok"], vq=folders["vq"],
        evaluator=folders["evaluator"], cache_dir=folders["cache"], counts=[1, 4], num_images=6, output_dir=tmp_path,
    )  # fmt: skip
    assert [row[:2] for row in result.rows] == [["real images", None], ["flextok", 1], ["flextok", 4], ["vq", 16]]
    assert result.value("FD", images="real images") == pytest.approx(0.0, abs=1e-6)
    assert result.value("FD", images="vq") > 0.1
    assert 0 <= result.value("top-1", images="vq") <= result.value("top-5", images="vq") <= 1
    assert "among 6 prompts" in result.notes[1]
    assert [p.name for p in result.figures][2:] == ["reconstruction-fd.png"]


# ---------------------------------------------------------------- text to image


def test_t2i_shows_both_ceilings(needs_network: None, folders: dict[str, str], tmp_path: Path) -> None:
    models = [folders["grid"], folders["ordered"]]
    result = run_benchmark(
        "t2i", model=models, num_prompts=8, styles=["noto"], evaluator=folders["evaluator"], batch_size=3,
        cache_dir=folders["cache"], output_dir=tmp_path,
    )  # fmt: skip
    per_split = ["real images", *(f"{m}: {kind}" for m in models for kind in ("reconstructions", "drawn"))]
    assert [row[:2] for row in result.rows] == [[s, label] for s in ("seen", "unseen pairs") for label in per_split]
    for row in result.rows:
        cells = dict(zip(result.columns, row, strict=True))
        assert (cells["s/image"] is not None) == cells["images"].endswith("drawn")
        assert cells["FD"] > 0
    # The same prompts, generators and batch sizes give the same pictures; the listing says which.
    lines = (tmp_path / "t2i-grid-train-prompts.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(8)]
    assert all(line.endswith(", noto") for line in lines)
    assert {p.name for p in result.figures} == {
        f"t2i-{m}-{s}{end}" for m in ("grid", "ordered") for s in ("train", "pair") for end in (".png", "-prompts.txt")
    }
    assert size_of(tmp_path / "t2i-grid-train.png")[0] == 8 * (128 + 6) + 6


def test_t2i_passes_over_prompts_that_are_too_long(needs_network: None, folders: dict[str, str]) -> None:
    settings = {"styles": ["noto"], "evaluator": folders["evaluator"], "cache_dir": folders["cache"]}
    result = text_to_image(folders["grid"], num_prompts=8, splits=["train"], reference_images=4, **settings)
    assert result.value("images") == "real images"
    with pytest.raises(DataError, match="2 to 24, what this split has"):
        text_to_image(folders["grid"], num_prompts=25, splits=["train"], **settings)


def test_ratio_is_to_reconstructions(needs_network: None, folders: dict[str, str]) -> None:
    result = run_benchmark(
        "t2i", model=folders["grid"], num_prompts=6, splits=["pair"], styles=["noto"], candidates=2,
        evaluator=folders["evaluator"], cache_dir=folders["cache"],
    )  # fmt: skip
    by_label = {row[1].rpartition(": ")[2]: dict(zip(result.columns, row, strict=True)) for row in result.rows}
    ceiling, drawn = by_label["reconstructions"], by_label["drawn"]
    expected = drawn["top-1"] / ceiling["top-1"] if ceiling["top-1"] else None
    assert drawn["of recon."] == expected
    assert by_label["real images"]["of recon."] is None


# ---------------------------------------------------------------- generators


def test_generators_are_compared_on_the_same_prompts(
    needs_network: None, folders: dict[str, str], tmp_path: Path
) -> None:
    models = [folders["grid"], folders["ordered"], folders["latent"]]
    result = run_benchmark(
        "generators", models=models, num_prompts=6, styles=["noto"], evaluator=folders["evaluator"], batch_size=3,
        cache_dir=folders["cache"], sheet_images=2, output_dir=tmp_path,
    )  # fmt: skip
    assert [row[0] for row in result.rows] == ["real images", *models]
    assert result.value("tokens", model=folders["latent"]) == 16
    assert result.value("forwards", model=folders["grid"]) == 16
    assert result.value("forwards", model=folders["ordered"]) == 8
    assert all(result.value("GFLOP", model=model) > 0 for model in models)
    assert [p.name for p in result.figures] == ["generators.png"]


def test_prefixes_are_measured_one_by_one(needs_network: None, folders: dict[str, str], tmp_path: Path) -> None:
    arguments = {"num_prompts": 4, "styles": ["noto"], "evaluator": folders["evaluator"]}
    arguments |= {"cache_dir": folders["cache"], "sheet_images": 2}
    result = run_benchmark(
        "prefix", models=[folders["ordered"]], counts=[1, 4, 8, 16], **arguments, output_dir=tmp_path
    )
    assert [row[1] for row in result.rows] == [None, 1, 4, 8]
    assert [p.name for p in result.figures] == ["prefix-ordered.png", "prefix-top-5.png", "prefix-fd.png"]
    with pytest.raises(ValueError, match="tokens of VQ, which are not ordered"):
        run_benchmark("prefix", models=[folders["grid"]], **arguments)


def test_disa_counts_the_published_steps(needs_network: None, folders: dict[str, str], tmp_path: Path) -> None:
    result = run_benchmark(
        "disa", model=folders["latent"], num_iter=4, num_prompts=4, styles=["noto"], evaluator=folders["evaluator"],
        cache_dir=folders["cache"], sheet_images=2, output_dir=tmp_path,
    )  # fmt: skip
    # 100 steps become 96 and 50 become 48 below timestep 950.
    assert result.value("head steps", schedule="constant 100") == 4 * 96
    executed = [len(StepAnnealing(50, 5).timesteps(i, 4)) for i in range(4)]
    assert result.value("head steps", schedule="DiSA linear 50 to 5") == sum(executed)
    assert executed[0] == 48
    assert result.value("head ratio", schedule="DiSA linear 50 to 5") > 1
    assert [p.name for p in result.figures] == ["disa.png"]


def test_mar_equals_the_published_loop() -> None:
    result = run_benchmark("mar", num_iter=2, num_steps=3, batch_sizes=[1, 2], repeats=1)
    assert [row[0] for row in result.rows] == [1, 2]
    assert all(0 < result.value("difference", batch=batch) < 1e-4 for batch in (1, 2))
    assert result.value("by count", batch=1) > 1.05
    assert result.value("ours GFLOP", batch=2) == pytest.approx(2 * result.value("ours GFLOP", batch=1), rel=1e-3)
    # 256 tokens and as many unconditional rows, in each of 3 steps.
    assert result.value("head rows", batch=1) == 2 * 256 * 3


def test_the_channel_cache_changes_no_token() -> None:
    result = run_benchmark("tokenbridge-ar", num_channels=4, rows=[1, 3], repeats=1)
    assert [row[0] for row in result.rows] == [1, 3]
    assert "4 channels go through the layers with the cache, 10 without" in result.notes[1]


def test_windows_shorten_the_sequence(needs_network: None, folders: dict[str, str]) -> None:
    result = run_benchmark(
        "token-shuffle", grid=4, repeats=1, models=[folders["grid"]], num_prompts=4, styles=["noto"],
        evaluator=folders["evaluator"], cache_dir=folders["cache"],
    )  # fmt: skip
    assert [row[2] for row in result.rows] == [16, 4, 1, 16]
    assert result.value("FD", windows=folders["grid"]) > 0


# ---------------------------------------------------------------- speculation


def test_lantern_beside_exact_speculation(needs_network: None, folders: dict[str, str], tmp_path: Path) -> None:
    result = run_benchmark(
        "lantern", model=folders["grid"], head=folders["grid-head"], deltas=[0.5, 0.9], num_candidates=4, split="train",
        num_prompts=4, styles=["noto"], evaluator=folders["evaluator"], cache_dir=folders["cache"], sheet_images=2,
        output_dir=tmp_path,
    )  # fmt: skip
    names = [row[0] for row in result.rows]
    assert names[:5] == ["plain", "exact", "exact, size by cost", "LANTERN 0.5", "LANTERN 0.9"]
    assert {row[0]: row[1] for row in result.rows} == {n: "no" if "LANTERN" in n else "yes" for n in names}
    # What is lossless draws the same pictures, and with fewer forwards.
    for column in ("top-1", "top-5", "FD"):
        assert result.value(column, method="exact") == pytest.approx(result.value(column, method="plain"), rel=1e-3)
    assert result.value("forwards", method="plain") == 16
    assert result.value("forwards", method="LANTERN 0.9") < result.value("forwards", method="exact") < 16
    assert {p.name for p in result.figures} == {"lantern.png", "lantern-samples.png"}


def test_cspd_beside_fewer_iterations(needs_network: None, folders: dict[str, str], tmp_path: Path) -> None:
    result = run_benchmark(
        "cspd", model=folders["latent"], draft=folders["latent-draft"], num_drafts=[4], num_iter=8, num_steps=5,
        num_prompts=4, paper_prompts=1, batch_size=2, styles=["noto"], evaluator=folders["evaluator"],
        cache_dir=folders["cache"], sheet_images=2, output_dir=tmp_path,
    )  # fmt: skip
    forwards = {row[0]: row[2] for row in result.rows}
    assert forwards["target"] == 8 and forwards["target, 4 iterations"] == 4
    # The first two steps are the target's own; then it verifies after step 4 and after the last.
    assert forwards["CSpD, every 4"] == 4
    assert [row[0] for row in result.rows if row[1] == "yes"] == ["target", "exact, every 4"]
    assert result.value("GFLOP", method="target, 4 iterations") < result.value("GFLOP", method="target")
    assert [p.name for p in result.figures] == ["cspd.png"]


def test_drafters_cost_something() -> None:
    result = run_benchmark("drafters", vocab_size=64, prompt_tokens=20, rounds=3, num_words=10)
    for name, candidates, propose, observe, together, forwards in result.rows:
        assert candidates > 0 and min(propose, observe) > 0 and together >= max(propose, observe), name
        assert (forwards is not None) == name.startswith(("draft model", "early exit", "DySpec"))
