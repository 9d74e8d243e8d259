"""The mechanism behind every pruning method, on tiny real models of every family."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mmsdk.caching import CACHE, cache_of
from mmsdk.loading import PRUNERS, resolve
from pruning.base import Pruner, PruningContext
from pruning.divprune import DivPrune
from pruning.random import RandomPruner
from pruning.uniform import UniformPruner
from pruning.vision import VisionAttention
from tests.tiny_vlms import FAMILIES, IMAGE, PAD, VIDEO, tiny_inputs, tiny_vlm

BATCH = (2, 0, 1)  # images per row: several, none, one
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", PRUNERS)
# Methods whose choice needs no vision tower.
FEATURE_METHODS = [name for name in PRUNERS if not resolve(name)(keep_ratio=0.5).attention_layers(1, 0)]
every_feature_method = pytest.mark.parametrize("method", FEATURE_METHODS)


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_vlm(family)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def generate(model: PreTrainedModel, inputs: Mapping[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False, **options})


def visual_token(inputs: Mapping[str, Tensor]) -> int:
    return VIDEO if "pixel_values_videos" in inputs else IMAGE


# ---------------------------------------------------------------- exactness


@every_family
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_nothing_dropped_is_exact(family: str, positions: str) -> None:
    model, inputs = model_of(family), tiny_inputs(model_of(family), BATCH)
    pruner = DivPrune(keep_ratio=1.0, positions=positions)
    logits, tokens = model(**inputs).logits, generate(model, inputs)
    with pruner(model):
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(generate(model, inputs), tokens)
    assert torch.equal(model(**pruner.prepare(model, inputs)).logits, logits)


def spliced_by_hand(
    model: PreTrainedModel, inputs: dict[str, Tensor], ratio: float, new_tokens: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """For each row alone: logits of the tokens that remain, and the tokens that greedy decoding without cache adds.

    Embeds the text, writes the kept features between, and runs the language model on that.
    """
    base: Any = model.base_model
    token = visual_token(inputs)
    modality = "video" if token == VIDEO else "image"
    encode = getattr(base, f"get_{modality}_features")
    names = set(inspect.signature(encode).parameters)
    output = encode(**{k: v for k, v in inputs.items() if k in names}, return_dict=True)
    flat = torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output])
    deep = [torch.cat(list(layer)) for layer in getattr(output, "deepstack_features", None) or []]
    # Placeholders of an image stand together, and text stands between images.
    starts, positions = [], None
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        begins = [i for i in range(len(ids)) if ids[i] == token and ids[i - 1] != token]
        starts += [(row, i, next(j for j in range(i, len(ids)) if ids[j] != token) - i) for i in begins]
    keep = inputs["attention_mask"].bool() & (inputs["input_ids"] != token)
    kept, seen = [], 0
    for row, start, length in starts:
        chosen = DivPrune(keep_ratio=ratio).select(flat[seen : seen + length], PruningContext())
        keep[row, start + chosen] = True
        kept.append(seen + chosen)
        seen += length
    assert seen == len(flat)
    if hasattr(base, "get_rope_index"):
        grids = {k: v for k, v in inputs.items() if k.endswith("grid_thw")}
        shared = {k: inputs[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        positions = base.get_rope_index(**shared, **grids)[0]
    results = []
    for row, ids in enumerate(inputs["input_ids"]):
        columns = keep[row].nonzero()[:, 0]
        visual = ids[columns] == token
        places = torch.cat([k for k, (r, *_) in zip(kept, starts, strict=True) if r == row] or [columns[:0]])
        embeddings = model.get_input_embeddings()(ids[columns].masked_fill(visual, PAD))
        embeddings[visual] = flat[places].to(embeddings.dtype)
        extra: dict[str, Tensor] = {}
        if "token_type_ids" in inputs:
            extra["token_type_ids"] = inputs["token_type_ids"][row, columns][None]
        if positions is not None:
            extra["position_ids"] = positions[:, row : row + 1, columns]
            following = positions[:, row, inputs["attention_mask"][row].bool()].max() + 1
        added: list[Tensor] = []
        while True:
            hidden = embeddings[None]
            if deep:
                mask = torch.cat([visual, visual.new_zeros(len(added))])[None]
                features = [layer[places] for layer in deep] if len(places) else None
                last = base.language_model(
                    inputs_embeds=hidden, visual_pos_masks=mask, deepstack_visual_embeds=features, **extra
                )
                logits = model.lm_head(last.last_hidden_state)[0]
            else:
                logits = model(inputs_embeds=hidden, **extra).logits[0]
            if not added:
                first = logits
            if len(added) == new_tokens:
                break
            added.append(logits[-1].argmax())
            embeddings = torch.cat([embeddings, model.get_input_embeddings()(added[-1][None])])
            if "token_type_ids" in extra:
                # PaliGemma: generated text is causal. Gemma3: it is not an image.
                kind = torch.full((1, 1), int(model.config.model_type == "paligemma"))
                extra["token_type_ids"] = torch.cat([extra["token_type_ids"], kind], 1)
            if positions is not None:
                place = (following + len(added) - 1).expand(3, 1, 1)
                extra["position_ids"] = torch.cat([extra["position_ids"], place], 2)
        results.append((first, torch.stack(added) if added else ids[:0]))
    return results


@every_family
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_pruned_batch_equals_features_spliced_by_hand(family: str, padding_side: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(model, BATCH, padding_side)
    pruner = DivPrune(keep_ratio=0.1)
    prepared = pruner.prepare(model, inputs)
    mask = prepared["attention_mask"].bool()
    assert bool(mask[:, -1 if padding_side == "left" else 0].all())
    assert not bool(((prepared["input_ids"] == IMAGE) & ~mask).any())
    logits = model(**prepared).logits
    for row, (expected, _) in enumerate(spliced_by_hand(model, inputs, 0.1)):
        torch.testing.assert_close(logits[row, mask[row]], expected, atol=2e-4, rtol=1e-3)


@every_family
def test_generation_equals_features_spliced_by_hand(family: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(model, BATCH)
    with DivPrune(keep_ratio=0.1)(model):
        tokens = generate(model, inputs)
    assert torch.equal(tokens[:, :-4], inputs["input_ids"])
    for row, (_, expected) in enumerate(spliced_by_hand(model, inputs, 0.1, new_tokens=4)):
        assert torch.equal(tokens[row, -4:], expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_videos(family: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(model, (1, 2), video=True)
    logits = model(**inputs).logits
    with DivPrune(keep_ratio=1.0)(model):
        assert torch.equal(model(**inputs).logits, logits)
    pruner = DivPrune(keep_ratio=0.1)
    prepared = pruner.prepare(model, inputs)
    mask, logits = prepared["attention_mask"].bool(), model(**prepared).logits
    for row, (expected, _) in enumerate(spliced_by_hand(model, inputs, 0.1)):
        torch.testing.assert_close(logits[row, mask[row]], expected, atol=2e-4, rtol=1e-3)
    with pruner(model):
        assert generate(model, inputs, num_beams=2).shape[1] == inputs["input_ids"].shape[1] + 4


@every_method
@every_family
def test_a_batch_equals_its_rows(family: str, method: str) -> None:
    model, pruner = model_of(family), resolve(method)(keep_ratio=0.3)
    with pruner(model):
        together = model(**tiny_inputs(model, BATCH)).logits
        kept = pruner.report.kept
        beams = generate(model, tiny_inputs(model, BATCH), num_beams=2)
        for row in (0, 2):
            alone = tiny_inputs(model, BATCH, only=row)
            logits = model(**alone).logits[0]
            own = kept[: BATCH[0]] if row == 0 else kept[BATCH[0] :]
            assert [k.tolist() for k in pruner.report.kept] == [k.tolist() for k in own]
            torch.testing.assert_close(together[row, -len(logits) :], logits, atol=2e-4, rtol=1e-3)
            assert torch.equal(beams[row, -4:], generate(model, alone, num_beams=2)[0, -4:])


# ---------------------------------------------------------------- what users do with generate


def test_the_whole_prompt_comes_back_with_every_copy() -> None:
    model = model_of("llava_next")
    inputs = tiny_inputs(model, BATCH)
    pruner = DivPrune(keep_ratio=0.2)
    with pruner(model):
        torch.manual_seed(3)
        sampled = generate(model, inputs, do_sample=True, num_return_sequences=2)
        assert torch.equal(sampled[:, :-4], inputs["input_ids"].repeat_interleave(2, 0))
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        positional = model.generate(inputs["input_ids"], **rest, max_new_tokens=1)
        assert torch.equal(positional[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    torch.manual_seed(3)
    prepared = pruner.prepare(model, inputs)
    assert torch.equal(generate(model, prepared, do_sample=True, num_return_sequences=2)[:, -4:], sampled[:, -4:])


def test_streaming_and_static_caches() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.values.append([])

    model, streamer = model_of("qwen2_5_vl"), Collector()
    inputs = tiny_inputs(model)
    with UniformPruner(num_tokens=2)(model):
        tokens = generate(model, inputs)
        assert torch.equal(generate(model, inputs, streamer=streamer), tokens)
        assert torch.equal(generate(model, inputs, cache_implementation="static"), tokens)
        assert torch.equal(generate(model, inputs, prefill_chunk_size=5), tokens)
    assert [v for value in streamer.values[1:] for v in value] == tokens[0, -4:].tolist()


def turn_after(model: PreTrainedModel, sequences: Tensor, mask: Tensor, turn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of the whole conversation after another turn; pixels are those of the turn."""
    whole = dict(turn)
    whole["input_ids"] = torch.cat([sequences, turn["input_ids"]], 1)
    answered = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], 1)
    whole["attention_mask"] = torch.cat([answered, turn["attention_mask"]], 1)
    images = (whole["input_ids"] == IMAGE).long()
    return {k: images if k.endswith("token_type_ids") else v for k, v in whole.items()}


CHATTING = [f for f in FAMILIES if f != "paligemma"]  # PaliGemma answers once


@pytest.mark.parametrize("new_image", [False, True])
@pytest.mark.parametrize(
    ("family", "positions"), [*((f, "contiguous") for f in CHATTING), ("llava", "original"), ("gemma3", "original")]
)
def test_chats_go_on_from_the_cache(family: str, positions: str, new_image: bool) -> None:
    model = model_of(family)
    first, second = tiny_inputs(model, (1, 1)), tiny_inputs(model, (1, 1), seed=1)
    pruner = UniformPruner(keep_ratio=0.3, positions=positions)
    pixels = {k: v for k, v in second.items() if k not in ("input_ids", "attention_mask") and "type_ids" not in k}
    if not new_image:
        keep = [(row != IMAGE) for row in second["input_ids"]]
        length = int(min(k.sum() for k in keep))
        texts = torch.stack([row[k][-length:] for row, k in zip(second["input_ids"], keep, strict=True)])
        second = {**second, "input_ids": texts, "attention_mask": torch.ones_like(texts)}
        second = {k: v for k, v in second.items() if k not in pixels}
    with pruner(model):
        answer = generate(model, first, return_dict_in_generate=True)
        whole = turn_after(model, answer.sequences, first["attention_mask"], second)
        cached = generate(model, {**whole, CACHE: cache_of(answer)}, return_dict_in_generate=True)
        assert torch.equal(cached.sequences[:, :-4], whole["input_ids"])
        # Without the cache, all images are encoded and pruned again.
        everything = dict(whole)
        for name in pixels:
            parts = [first[name], second[name]] if new_image else [first[name]]
            everything[name] = _by_row(family, name, parts, first, second) if new_image else first[name]
        fresh = generate(model, everything)
        assert torch.equal(cached.sequences, fresh)
        # A third turn, of which only the columns that the cache lacks are passed.
        third = torch.tensor([[5, 6, 7]] * 2)
        turn = {"input_ids": third, "attention_mask": torch.ones_like(third)}
        turn |= {k: v for k, v in whole.items() if "type_ids" in k}
        last = turn_after(model, cached.sequences, whole["attention_mask"], turn)
        again = generate(model, {**everything, **last})
        brief = {**last, "input_ids": last["input_ids"][:, -4:], CACHE: cache_of(cached)}
        assert torch.equal(generate(model, brief)[:, 4:], again[:, -4:])


def _by_row(family: str, name: str, parts: list[Tensor], first: Any, second: Any) -> Tensor:
    """Put the images of two turns in the order of the batch: row 0's, then row 1's."""
    kind = FAMILIES[family].kind
    if kind == "crops":
        return torch.cat(parts, 1)
    if kind == "grid" and name == "pixel_values":
        sizes = [x["image_grid_thw"].prod(1).tolist() for x in (first, second)]
        (a, b), (c, d) = (part.split(size) for part, size in zip(parts, sizes, strict=True))
    elif kind == "tiles":
        counts = [[(row == IMAGE).sum().item() // 4 for row in x["input_ids"]] for x in (first, second)]
        (a, b), (c, d) = (part.split(count) for part, count in zip(parts, counts, strict=True))
    else:
        (a, b), (c, d) = (part.split(1) for part in parts)
    return torch.cat([a, c, b, d])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_forward_goes_on_from_the_cache(family: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(model, (1, 2))
    with DivPrune(keep_ratio=0.3)(model) as pruner:
        expected = generate(model, inputs)[:, -4:]
        mask = inputs["attention_mask"]
        output = model(**inputs, use_cache=True)
        tokens = [output.logits[:, -1].argmax(-1)]
        while len(tokens) < 4:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            cache = cache_of(output)
            output = model(input_ids=tokens[-1][:, None], attention_mask=mask, **{CACHE: cache}, use_cache=True)
            tokens.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), expected)
    assert len(pruner.report.kept) == 3  # of the call with images, not of the last one


# ---------------------------------------------------------------- positions


def test_original_positions_are_those_of_the_unpruned_prompt() -> None:
    model = model_of("llava")
    inputs = tiny_inputs(model, (1, 2))
    pruner = UniformPruner(num_tokens=4, positions="original")
    prepared = pruner.prepare(model, inputs)
    mask = prepared["attention_mask"].bool()
    # Row 1 has two images of 16 tokens, with 1 + 3 + 1 tokens before the first: bos, text, start.
    start = inputs["input_ids"][1].tolist().index(IMAGE)
    kept = [start + i for i in (2, 6, 10, 14)]
    assert prepared["position_ids"][1, mask[1]][:9].tolist() == [*range(start), *kept]
    assert prepared["position_ids"][1, -1] == inputs["attention_mask"][1].sum() - 1
    logits = model(**prepared).logits
    assert not torch.allclose(logits, model(**UniformPruner(num_tokens=4).prepare(model, inputs)).logits, atol=1e-3)


def test_original_positions_and_packing() -> None:
    """Without mask and cache, transformers would take gaps for boundaries of packed sequences."""
    model, pruner = model_of("llava"), UniformPruner(num_tokens=4, positions="original")
    inputs = tiny_inputs(model)
    with pruner(model):
        masked = model(**inputs, use_cache=False).logits
        del inputs["attention_mask"]
        assert torch.equal(model(**inputs, use_cache=False).logits, masked)
        with pytest.raises(ValueError, match="needs the cache"):
            generate(model, inputs, use_cache=False)
    flash = tiny_vlm("llava")
    flash.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention takes for boundaries"):
        pruner.prepare(flash, inputs)


def test_places_of_qwen_tokens_are_kept() -> None:
    model = model_of("qwen2_5_vl")
    inputs = tiny_inputs(model)
    prepared = UniformPruner(num_tokens=2).prepare(model, inputs)
    positions, deltas = model.model.get_rope_index(
        **{k: inputs[k] for k in ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw")}
    )
    start = inputs["input_ids"][0].tolist().index(IMAGE)
    # 12 tokens, 4 x 3: the middles of two halves.
    columns = [*range(start), start + 3, start + 9, *range(start + 12, inputs["input_ids"].shape[1])]
    assert torch.equal(prepared["position_ids"][1:], positions[:, :, columns])
    assert prepared["position_ids"][0, 0].tolist() == list(range(len(columns)))
    assert model.model.rope_deltas.item() == deltas.item() + 10


# ---------------------------------------------------------------- the block


def test_the_model_is_restored() -> None:
    model, inputs = tiny_vlm("llava"), tiny_inputs(model_of("llava"))
    logits, attributes = model(**inputs).logits, dict(vars(model))
    pruner = DivPrune(keep_ratio=0.1)
    for _ in range(2):
        with pruner(model) as entered:
            assert entered is pruner
            assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
            assert not torch.equal(model(**inputs).logits[:, -1], logits[:, -1])
        assert vars(model) == attributes
        with pytest.raises(RuntimeError, match="inside"), pruner(model):
            raise RuntimeError("inside")
        assert vars(model) == attributes
        with pytest.raises(ValueError, match="cannot be kept"), UniformPruner(num_tokens=999)(model):
            model(**inputs)
        assert vars(model) == attributes
    assert torch.equal(model(**inputs).logits, logits)


def test_what_was_installed_before_stays() -> None:
    model, inputs = tiny_vlm("llava"), tiny_inputs(model_of("llava"))
    original, calls = model.forward, []

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    model.forward = forward
    with DivPrune(num_tokens=3)(model):
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 13
    assert model.forward is forward
    assert [int((c["input_ids"] == IMAGE).sum()) for c in calls] == [3]


@pytest.mark.parametrize("same", [True, False])
def test_the_innermost_block_prunes(same: bool) -> None:
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"))
    outer = DivPrune(num_tokens=3)
    inner = outer if same else UniformPruner(num_tokens=2)
    with outer(model):
        once = generate(model, inputs)
        with inner(model):
            answer = generate(model, inputs, return_dict_in_generate=True)
            assert inner.report.tokens_after == (inner.num_tokens,)
            whole = turn_after(model, answer.sequences, inputs["attention_mask"], tiny_inputs(model, (0,)))
            generate(model, {**whole, CACHE: cache_of(answer)})
        assert torch.equal(generate(model, inputs), once)
        assert outer.report.tokens_after == (3,)


def test_calls_without_images_are_left_alone() -> None:
    model = model_of("llava")
    ids = torch.tensor([[1, 5, 6, 7]])
    logits = model(input_ids=ids).logits
    with DivPrune(keep_ratio=0.1)(model) as pruner:
        assert torch.equal(model(input_ids=ids).logits, logits)
        generate(model, {"input_ids": ids})
    assert pruner.report is None


def test_training_through_the_kept_tokens() -> None:
    model, inputs = tiny_vlm("llava"), tiny_inputs(model_of("llava"), (1, 1))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with torch.enable_grad(), DivPrune(keep_ratio=0.2)(model):
        model(**inputs, labels=labels).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters())
    prepared = DivPrune(keep_ratio=0.2).prepare(model, {**inputs, "labels": labels})
    kept = prepared["attention_mask"].bool() & (prepared["input_ids"] != IMAGE)
    assert torch.equal(prepared["labels"][kept], prepared["input_ids"][kept])
    assert bool((prepared["labels"][~kept] == -100).all())


# ---------------------------------------------------------------- the report


def test_report() -> None:
    model = model_of("llava")
    inputs = tiny_inputs(model, BATCH)
    pruner = UniformPruner(num_tokens=4)
    pruner.prepare(model, inputs)
    report = pruner.report
    assert [k.tolist() for k in report.kept] == [[2, 6, 10, 14]] * 3
    assert (report.tokens_before, report.tokens_after) == ((16,) * 3, (4,) * 3)
    assert report.prompt_before == tuple(inputs["attention_mask"].sum(1).tolist())
    assert report.prompt_after == (report.prompt_before[0] - 24, report.prompt_before[1], report.prompt_before[2] - 12)
    # Two layers of width 16: q and o 16 x 16, k and v 16 x 8, three matrices of the MLP 16 x 32.
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    for tokens, flops in ((report.prompt_before, report.flops_before), (report.prompt_after, report.flops_after)):
        assert flops == 2 * weights * sum(tokens) + 2 * 2 * 16 * sum(n * n for n in tokens)


@pytest.mark.parametrize(
    ("family", "images"),
    [("llava_next", (72, 52, 88)), ("internvl", (8, 4, 8)), ("smolvlm", (4, 4, 4)), ("qwen2_vl", (12, 8, 16))],
)
def test_the_unit_is_an_image(family: str, images: tuple[int, ...]) -> None:
    model, pruner = model_of(family), UniformPruner(num_tokens=1)
    pruner.prepare(model, tiny_inputs(model, BATCH))
    assert pruner.report.tokens_before == images
    assert pruner.report.tokens_after == (1, 1, 1)


# ---------------------------------------------------------------- methods


@every_feature_method
@pytest.mark.parametrize("total", [1, 2, 7, 40])
def test_methods_keep_what_was_asked_for(method: str, total: int) -> None:
    features = torch.randn(total, 8, generator=torch.Generator().manual_seed(total))
    before = features.clone()
    for arguments in ({"keep_ratio": 0.3}, {"keep_ratio": 1.0}, {"keep_ratio": 1e-9}, {"num_tokens": 1}):
        pruner = resolve(method)(**arguments)
        indices = pruner.select(features, PruningContext())
        assert indices.dtype == torch.long
        assert len(indices) == pruner.budget(total) == max(1, round(arguments.get("keep_ratio", 0) * total))
        assert bool((indices.diff() > 0).all()) and int(indices[0]) >= 0 and int(indices[-1]) < total
    assert torch.equal(features, before)


@every_feature_method
def test_methods_see_what_they_need_in_any_dtype(method: str) -> None:
    """Selection runs in float32: a bfloat16 model keeps what its features, converted, would keep."""
    model, pruner = tiny_vlm("llava").bfloat16(), resolve(method)(keep_ratio=0.3)
    inputs = {k: v.bfloat16() if k == "pixel_values" else v for k, v in tiny_inputs(model_of("llava")).items()}
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruner.prepare(model, inputs)
    assert torch.equal(pruner.report.kept[0], pruner.select(features.float(), PruningContext()))


def test_uniform() -> None:
    kept = [UniformPruner(num_tokens=n).select(torch.zeros(7, 1), PruningContext()).tolist() for n in range(1, 8)]
    assert kept[:3] == [[3], [1, 5], [1, 3, 5]]
    assert kept[6] == list(range(7))


def test_random() -> None:
    features, state = torch.zeros(50, 1), torch.random.get_rng_state()

    def draw(pruner: RandomPruner) -> list[int]:
        return pruner.select(features, PruningContext()).tolist()

    seeded = RandomPruner(num_tokens=5, seed=1)
    assert draw(seeded) == draw(seeded) != draw(RandomPruner(num_tokens=5, seed=2))
    flowing = RandomPruner(num_tokens=5, generator=torch.Generator().manual_seed(1))
    assert draw(flowing) == draw(seeded) != draw(flowing)
    assert torch.equal(state, torch.random.get_rng_state())
    counts = torch.zeros(50)
    for _ in range(2000):
        counts[draw(flowing)] += 1
    assert 140 < counts.min() and counts.max() < 260  # 200 on average, standard deviation 13


# ---------------------------------------------------------------- what methods may ask for


@dataclass(kw_only=True)
class Spy(Pruner):
    """Keeps the first tokens, and what it was told."""

    needs_layout: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers: tuple[int, ...] = ()
        self.seen: list[PruningContext] = []
        self.features: list[Tensor] = []

    def attention_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        self.counts = (num_layers, feature_layer)
        return self.layers

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        self.seen.append(context)
        self.features.append(features)
        return torch.arange(self.budget(len(features)))


def spy_on(family: str, images: tuple[int, ...] = BATCH, layers: tuple[int, ...] = (), **options: Any) -> Spy:
    spy = Spy(keep_ratio=1.0)
    spy.layers = layers
    spy.prepare(model_of(family), tiny_inputs(model_of(family), images, **options))
    return spy


def test_text_and_row() -> None:
    spy, model, inputs = spy_on("gemma3"), model_of("gemma3"), tiny_inputs(model_of("gemma3"), BATCH)
    assert [context.row for context in spy.seen] == [0, 0, 2]
    words = inputs["input_ids"][2][inputs["attention_mask"][2].bool() & (inputs["input_ids"][2] != IMAGE)]
    assert torch.equal(spy.seen[2].text, model.get_input_embeddings()(words))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_anyres_layout_is_where_features_come_from(family: str) -> None:
    model = tiny_vlm(family)
    model.config.vision_aspect_ratio = "anyres_max_9"
    inputs = tiny_inputs(model, BATCH)
    spy = Spy(keep_ratio=1.0)
    spy.prepare(model, inputs)
    for number, context in enumerate(spy.seen):
        layout = context.layout
        pixels = inputs["pixel_values"][number, : layout.num_crops]
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        chosen = hidden[model.config.vision_feature_layer]
        chosen = chosen[:, 1:] if model.config.vision_feature_select_strategy == "default" else chosen
        crops = model.model.multi_modal_projector(chosen)
        image, newline = layout.crop >= 0, layout.crop < 0
        expected = crops[layout.crop[image], layout.index[image]]
        torch.testing.assert_close(spy.features[number][image], expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(spy.features[number][newline], model.model.image_newline.expand(int(newline.sum()), -1))
        assert layout.index[newline].tolist() == list(range(int(newline.sum())))
        assert layout.num_crops == 1 + layout.grid[0] * layout.grid[1]
    assert [context.layout.grid for context in spy.seen] == [(2, 2), (1, 2), (2, 2)]
    # 30 x 20 pixels become 8 x 6 patches of 8 x 8: the first and last column of the high resolution are padding.
    layout = spy.seen[0].layout
    assert layout[torch.tensor([16, 17, 22])].crop.tolist() == [1, 1, -1]
    assert layout.index[16:22].tolist() == [1, 2, 3, 0, 1, 2]


def test_layout_of_shrunk_images() -> None:
    """Eight rows of eight patches become four of four: each is the nearest of the places that it averages."""
    layout = spy_on("llava_onevision", (3,)).seen[2].layout
    assert len(layout.crop) == 16 + 4 * 5
    assert layout.crop[16:].tolist() == [1, 1, 2, 2, -1] * 2 + [3, 3, 4, 4, -1] * 2
    row, column = layout.index[16:].view(4, 5)[:, :4] // 4, layout.index[16:].view(4, 5)[:, :4] % 4
    assert bool(((row - torch.tensor([0.5, 2.5, 0.5, 2.5])[:, None]).abs() <= 0.5).all())
    assert bool(((column - torch.tensor([0.5, 2.5, 0.5, 2.5])).abs() <= 0.5).all())


def test_layouts_of_other_families() -> None:
    square = spy_on("llava").seen[0].layout
    assert (square.num_crops, square.crop_size, square.grid) == (1, (4, 4), None)
    assert square.index.tolist() == list(range(16))
    tiles = spy_on("internvl").seen[0].layout
    assert (tiles.num_crops, tiles.crop_size) == (2, (2, 2))
    assert tiles.crop.tolist() == [0] * 4 + [1] * 4
    grid = spy_on("qwen2_5_vl").seen[0].layout
    assert (grid.num_crops, grid.crop_size) == (1, (4, 3))


def eager_maps(family: str, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    """Return the attention `(crops, heads, patches, patches)` of a layer as the model itself reports it."""
    model = tiny_vlm(family)
    model.set_attn_implementation("eager")
    tower: Any = model.get_encoder(modality="image")
    return tower(inputs["pixel_values"].flatten(0, -4), output_attentions=True).attentions[layer]


def test_class_attention_is_that_of_the_tower() -> None:
    inputs = tiny_inputs(model_of("llava_next"), (2,))
    # Sizes 30 x 20 and 16 x 32 take five and three crops.
    maps = eager_maps("llava_next", 1, inputs).unflatten(0, (2, 5))
    spy = spy_on("llava_next", (2,), layers=(0, 1))
    assert spy.counts == (3, 1)  # three layers, of which the second (hidden state -2) becomes the features
    for image, crops in enumerate((5, 3)):
        attention = spy.seen[image].attention[1]
        assert set(spy.seen[image].attention) == {0, 1}
        torch.testing.assert_close(attention.cls_row(), maps[image, :crops, :, 0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(attention.received(), maps[image, :crops].mean(-2), atol=1e-6, rtol=1e-4)
        logits = attention.cls_logits()
        torch.testing.assert_close(logits.softmax(-1), attention.cls_row())
        assert torch.equal(attention.per_token(logits), logits[..., 1:])


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "smolvlm", "internvl"])
def test_received_attention_merges_as_patches_do(family: str) -> None:
    attention = spy_on(family, (1,), layers=(1,)).seen[0].attention[1]
    maps = eager_maps(family, 1, tiny_inputs(model_of(family)))
    received = maps.mean(-2)
    torch.testing.assert_close(attention.received(), received, atol=1e-6, rtol=1e-4)
    patches = received[..., 1:] if attention.has_cls else received
    expected = patches if family == "paligemma" else patches.view(-1, 2, 2, 2, 2, 2).mean((3, 5)).flatten(2)
    torch.testing.assert_close(attention.per_token(attention.received()), expected, atol=1e-6, rtol=1e-4)
    assert attention.has_cls == (family == "internvl")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_received_attention_finds_the_place_of_a_patch(family: str) -> None:
    """The towers of Qwen group patches, and Qwen2.5-VL's reorders them; one odd token tells whether all is undone."""
    model = model_of(family)
    inputs = tiny_inputs(model, (3,))
    flat = inputs["pixel_values"].mean(0).expand_as(inputs["pixel_values"]).clone()
    place = 48 + 32 + 4 * 6  # the seventh token of the third image
    flat[place : place + 4] = inputs["pixel_values"][place : place + 4] * 20
    keys = []
    for pixels in (flat.mean(0).expand_as(flat), flat):
        spy = Spy(keep_ratio=1.0)
        spy.layers = (2,)
        spy.prepare(model, {**inputs, "pixel_values": pixels})
        keys.append(spy.seen[2].attention[2].key)
    attention = spy.seen[2].attention[2]
    assert attention.per_token(attention.received()).shape == (1, 2, 16)
    features = spy.features[2]
    assert (features - features.median(0).values).norm(dim=-1).argmax() == 6
    assert attention.per_token((keys[1] - keys[0]).norm(dim=-1))[0].sum(0).argmax() == 6


def test_recording_leaves_no_trace() -> None:
    model = tiny_vlm("llava")
    inputs, spy = tiny_inputs(model, (2,)), Spy(keep_ratio=1.0)
    spy.layers = (0, 1, 2)
    logits = model(**inputs).logits
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits = model(**inputs).logits
        with spy(model):
            assert torch.equal(model(**inputs).logits, logits)
        assert all(
            a is b for a, b in zip(configs, [m.config for m in model.modules() if hasattr(m, "config")], strict=True)
        )


def test_attention_that_is_not_there() -> None:
    attention = spy_on("paligemma", (1,), layers=(1,)).seen[0].attention[1]
    with pytest.raises(ValueError, match="no class token.*received"):
        attention.cls_row()
    with pytest.raises(ValueError, match="layer 0 .* cannot be assigned to images"):
        spy_on("qwen2_5_vl", layers=(0,)).seen[0].attention[0]
    model = tiny_vlm("llava")
    model.model.vision_tower = torch.nn.Identity()
    spy = Spy(keep_ratio=1.0)
    spy.layers = (0,)
    with pytest.raises(ValueError, match="Spy needs attention maps, which Identity does not offer"):
        spy.prepare(model, tiny_inputs(model_of("llava")))


def test_blocks_of_queries_sum_to_the_whole_map() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 1100, 4, generator=generator) for _ in range(2))
    attention = VisionAttention(query, key, 0.5, has_cls=False, num_tokens=1100)
    expected = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).mean(-2)
    torch.testing.assert_close(attention.received(), expected)


def test_methods_may_merge_what_they_drop() -> None:
    @dataclass(kw_only=True)
    class Mean(UniformPruner):
        def gather(self, features: Tensor, indices: Tensor, context: PruningContext) -> Tensor:
            return features.unflatten(0, (len(indices), -1)).mean(1)

    model = model_of("qwen3_vl")
    inputs = tiny_inputs(model, (3,))
    output = Mean(num_tokens=4).prepare(model, inputs)["mm_encoder_outputs"]["image"]
    full = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    layers = [full.pooler_output, *full.deepstack_features]
    for layer, whole in zip([output.pooler_output, *output.deepstack_features], layers, strict=True):
        for merged, features in zip(layer, whole, strict=True):
            torch.testing.assert_close(merged, features.unflatten(0, (4, -1)).mean(1))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.1, float("nan")])
@every_method
def test_bad_ratios(method: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"in \(0, 1\], received {ratio}"):
        resolve(method)(keep_ratio=ratio)


@every_method
def test_bad_positions(method: str) -> None:
    with pytest.raises(ValueError, match="'contiguous', 'original'.*'gapped'"):
        resolve(method)(keep_ratio=0.5, positions="gapped")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "at least 1, received 0"),
        ({"num_tokens": 2.5}, "at least 1, received 2.5"),
        ({"keep_ratio": 0.5, "num_tokens": 3}, "either keep_ratio .* or num_tokens"),
        ({}, "either keep_ratio .* or num_tokens"),
    ],
)
@pytest.mark.parametrize("method", [m for m in PRUNERS if m != "globalcom2"])  # which has a ratio and takes no count
def test_bad_counts(method: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method)(**arguments)


@pytest.mark.parametrize("block", [True, False])
def test_bad_inputs(block: bool) -> None:
    model, pruner = model_of("llava"), DivPrune(keep_ratio=0.5)
    inputs = tiny_inputs(model, (2,))

    def use(pruner: Pruner, inputs: dict[str, Any]) -> None:
        if block:
            with pruner(model):
                generate(model, inputs)
        else:
            pruner.prepare(model, inputs)

    with pytest.raises(ValueError, match="num_tokens=17 tokens cannot be kept: an image has 16"):
        use(DivPrune(num_tokens=17), inputs)
    with pytest.raises(ValueError, match="32 image placeholders, but the pixels give 16 features"):
        use(pruner, {**inputs, "pixel_values": inputs["pixel_values"][:1]})
    truncated = {k: v[:, :30] for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="image placeholders, but the pixels give 32 features"):
        use(pruner, {**truncated, "pixel_values": inputs["pixel_values"]})
    with pytest.raises(ValueError, match="no images to prune: 'pixel_values' is empty"):
        use(pruner, {**tiny_inputs(model, (0, 0)), "pixel_values": inputs["pixel_values"][:0]})
    ids = torch.where(inputs["input_ids"] == IMAGE, 0, 5).expand(2, -1).clone()
    ids[0, :20], ids[1, :12] = IMAGE, IMAGE
    with pytest.raises(ValueError, match=r"Rows hold \[20, 12\] image placeholders, which images of \[16, 16\]"):
        use(pruner, {"input_ids": torch.where(ids == IMAGE, IMAGE, 5), "pixel_values": inputs["pixel_values"]})
    for name in ("inputs_embeds", "position_ids"):
        with pytest.raises(ValueError, match=f"drop '{name}'"):
            use(pruner, {**inputs, name: inputs["input_ids"]})
    with pytest.raises(ValueError, match=r"`attention_mask` is \(batch, length\), received \(1, 1, 2, 2\)"):
        use(pruner, {**inputs, "attention_mask": torch.ones(1, 1, 2, 2)})
    with pytest.raises(ValueError, match="no `input_ids`"):
        use(pruner, {"pixel_values": inputs["pixel_values"]})
    # Nothing is left behind by a refusal.
    assert "forward" not in vars(model)


def test_prepared_inputs_serve_once() -> None:
    model, pruner = model_of("qwen2_5_vl"), DivPrune(keep_ratio=0.5)
    inputs = tiny_inputs(model, (1, 1))
    prepared = pruner.prepare(model, inputs)
    with pytest.raises(ValueError, match="prepared before"):
        pruner.prepare(model, prepared)
    with pruner(model):
        tokens = generate(model, inputs)
        assert torch.equal(generate(model, prepared)[:, -4:], tokens[:, -4:])
    with pytest.raises(ValueError, match="were used before"):
        generate(model, prepared)


def test_no_images() -> None:
    model = model_of("llava")
    with pytest.raises(ValueError, match=r"no images to prune: the inputs hold only \['attention_mask', 'input_ids'\]"):
        DivPrune(keep_ratio=0.5).prepare(model, {k: v for k, v in tiny_inputs(model, (0,)).items()})


def test_models_without_image_features() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    with pytest.raises(TypeError, match="LlamaForCausalLM takes no image features"):
        DivPrune(keep_ratio=0.5).prepare(model, {"input_ids": torch.tensor([[1]])})
    with pytest.raises(TypeError, match="LlamaForCausalLM takes no image features"), DivPrune(keep_ratio=0.5)(model):
        pass


def test_qwen_needs_token_types() -> None:
    model = model_of("qwen2_vl")
    inputs = tiny_inputs(model)
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="`mm_token_type_ids`, which the inputs lack"):
        DivPrune(keep_ratio=0.5).prepare(model, inputs)


def test_caches_that_do_not_fit() -> None:
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"))
    with DivPrune(keep_ratio=0.5)(model):
        answer = generate(model, inputs, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="columns and the mask .* stands for"):
            generate(model, {**inputs, CACHE: cache_of(answer)})


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [-1, 3], [3, 99], [], [[0]], [0.5]])
def test_selections_are_checked(indices: list[Any]) -> None:
    @dataclass(kw_only=True)
    class Wrong(Pruner):
        def select(self, features: Tensor, context: PruningContext) -> Tensor:
            return torch.tensor(indices)

    with pytest.raises(ValueError, match="Wrong.select returned no ascending"):
        Wrong(keep_ratio=0.5).prepare(model_of("llava"), tiny_inputs(model_of("llava")))
