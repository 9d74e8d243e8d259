"""FastV on tiny real models: exact where nothing is dropped, and against a loop over layers written by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from mmsdk.caching import CACHE, cache_of
from pruning.divprune import DivPrune
from pruning.fastv import FastV, last_attention
from tests import tiny_vlms
from tests.tiny_vlms import IMAGE, tiny_inputs, tiny_vlm

BATCH = (2, 0, 1)  # images per row: several, none, one
LAYERS, NEW_TOKENS = 4, 4
# Placeholders and the like are not generated.
TEXT = 58
SPECIAL = list(range(TEXT, tiny_vlms.VOCABULARY))
FAMILIES = [name for name in tiny_vlms.FAMILIES if name != "gemma3"]  # whose layers have windows
every_family = pytest.mark.parametrize("family", FAMILIES)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@functools.cache
def model_of(family: str, attention: str = "sdpa") -> PreTrainedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_vlms._TEXT, "num_hidden_layers", LAYERS)
        model = tiny_vlm(family)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": SPECIAL} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def extended(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Append tokens `(batch, new)` to a batch."""
    added = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    added |= {k: torch.full_like(ids, int(k == "token_type_ids")) for k in inputs if k.endswith("type_ids")}
    return {k: torch.cat([v, added[k].to(v.dtype)], 1) if k in added else v for k, v in inputs.items()}


def by_hand(family: str, inputs: dict[str, Tensor], ratio: float, layer: int, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the logits `(1 + new_tokens, vocabulary)` of greedy decoding of one row, and which columns it keeps.

    Runs everything without a cache: the first layers as the model does, the others one after the other on what remains.
    """
    model = model_of(family, "eager")
    decoder: Any = model.get_decoder()
    seen: dict[str, Any] = {}

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.update(hidden=args[0], **kwargs)

    handle = decoder.layers[layer].register_forward_pre_hook(look, with_kwargs=True)
    logits, kept = [], torch.empty(0)
    try:
        for step in range(new_tokens + 1):
            output = model(**inputs, use_cache=False, output_attentions=True)
            if step == 0:
                visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
                received = output.attentions[layer - 1][0, :, -1].mean(0)[visual]
                keep = inputs["input_ids"][0] != IMAGE
                keep[visual[received.topk(max(1, round(ratio * len(visual)))).indices]] = True
                kept = keep.nonzero()[:, 0]
            places = torch.cat([kept, torch.arange(len(keep), inputs["input_ids"].shape[1])])
            hidden = seen["hidden"][:, places]
            angles = tuple(x[:, places] for x in seen["position_embeddings"])
            mask = seen["attention_mask"][:, :, places][..., places]
            for each in decoder.layers[layer:]:
                hidden = each(hidden, attention_mask=mask, position_embeddings=angles)
            logits.append(model.lm_head(decoder.norm(hidden))[0, -1])
            inputs = extended(inputs, logits[-1][:TEXT].argmax().view(1, 1))
    finally:
        handle.remove()
    return torch.stack(logits), kept


# ---------------------------------------------------------------- exactness


def test_attention_by_hand() -> None:
    query, key = torch.zeros(1, 2, 3, 2), torch.zeros(1, 1, 4, 2)
    query[0, :, 1] = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    key[0, 0, :, 0] = torch.tensor([0.0, 3.0, 1.0, 9.0]).log1p()
    # The first head has the odds 1 : 4 : 2 of the keys that are there, the second pays the same to all.
    expected = (torch.tensor([1, 4, 2, 0]) / 7 + torch.tensor([1, 1, 1, 0]) / 3) / 2
    real = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(last_attention(query, key, 0.5, torch.tensor([1]), real)[0], expected)


@every_attention
@every_family
def test_nothing_dropped_is_exact(family: str, attention: str) -> None:
    model, inputs = model_of(family, attention), tiny_inputs(model_of(family), BATCH)
    logits, expected = model(**inputs).logits, generate(model, inputs)
    with FastV(keep_ratio=1.0)(model) as method:
        assert torch.equal(model(**inputs).logits, logits)
        output = generate(model, inputs)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))
    assert method.report.flops_after == method.report.flops_before


@every_attention
@every_family
@pytest.mark.parametrize("layer", [2, 3])
def test_equals_layers_run_by_hand(family: str, attention: str, layer: int) -> None:
    model, inputs = model_of(family, attention), tiny_inputs(model_of(family), (2,))
    expected, kept = by_hand(family, inputs, 0.1, layer, NEW_TOKENS - 1)
    with FastV(keep_ratio=0.1, layer=layer)(model) as method:
        prefill = model(**inputs, logits_to_keep=1).logits[0]
        output = generate(model, inputs)
    torch.testing.assert_close(prefill, expected[:1], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(torch.cat(output.logits), expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(output.sequences[0, -NEW_TOKENS:], expected[:, :TEXT].argmax(-1))
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    assert torch.equal(visual[method.report.kept[0]], kept[inputs["input_ids"][0, kept] == IMAGE])
    lengths = [cached.keys.shape[2] for cached in cache_of(output).layers]
    whole = inputs["input_ids"].shape[1] + NEW_TOKENS - 1
    assert lengths == [whole] * layer + [len(kept) + NEW_TOKENS - 1] * (LAYERS - layer)


# ---------------------------------------------------------------- batches


@every_attention
@every_family
def test_a_batch_equals_its_rows(family: str, attention: str) -> None:
    """Rows are padded on the left, keep different numbers of tokens, and one has no image."""
    model = model_of(family, attention)
    inputs = tiny_inputs(model, BATCH)
    with FastV(keep_ratio=0.3)(model) as method:
        together = generate(model, inputs)
        report = method.report
        assert len({len(kept) for kept in report.kept}) == 3
        for row, count in enumerate(BATCH):
            alone = generate(model, tiny_inputs(model, BATCH, only=row) if count else text_row(inputs, row))
            assert not count or torch.equal(method.report.kept[0], report.kept[row])
            logits = torch.stack([step[row] for step in together.logits])
            torch.testing.assert_close(logits, torch.cat(alone.logits), atol=2e-4, rtol=1e-3)
            assert torch.equal(alone.sequences[0, -NEW_TOKENS:], together.sequences[row, -NEW_TOKENS:])


def text_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
    pixels = ("pixel_values", "image_sizes", "image_grid_thw")
    rest = {k: v[row : row + 1, -ids.shape[1] :] for k, v in inputs.items() if k not in pixels}
    return rest | {"input_ids": ids}


@every_family
def test_right_padding(family: str) -> None:
    model = model_of(family)
    with FastV(keep_ratio=0.3)(model) as method:
        left = model(**tiny_inputs(model, BATCH)).logits[:, -1]
        right = model(**tiny_inputs(model, BATCH, padding_side="right")).logits
    assert right.shape[1] == max(method.report.prompt_after)
    last = torch.tensor(method.report.prompt_after) - 1
    torch.testing.assert_close(right[torch.arange(len(left)), last], left, atol=2e-4, rtol=1e-3)


@every_attention
@pytest.mark.parametrize("mask", [True, False])
def test_rows_without_padding_that_keep_different_numbers(attention: str, mask: bool) -> None:
    model = model_of("llava", attention)
    inputs = tiny_inputs(model, (2, 1))
    short = inputs["attention_mask"][1].logical_not()
    inputs["input_ids"][1, short] = torch.arange(int(short.sum())) % 50 + 3
    inputs["attention_mask"][1] = 1
    if not mask:
        del inputs["attention_mask"]
    with FastV(keep_ratio=0.25)(model):
        together = generate(model, inputs)
        pixels = inputs["pixel_values"].split([2, 1])
        for row in range(2):
            one = {k: v[row : row + 1] for k, v in inputs.items()} | {"pixel_values": pixels[row]}
            logits = torch.stack([step[row] for step in together.logits])
            torch.testing.assert_close(logits, torch.cat(generate(model, one).logits), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_beams(family: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(model, BATCH)
    with FastV(keep_ratio=0.2)(model):
        together = generate(model, inputs, num_beams=3, num_return_sequences=2)
        for row in (0, 2):
            alone = generate(model, tiny_inputs(model, BATCH, only=row), num_beams=3, num_return_sequences=2)
            expected = together.sequences[2 * row : 2 * row + 2, -NEW_TOKENS:]
            assert torch.equal(alone.sequences[:, -NEW_TOKENS:], expected)


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("images", [(2,), (1, 2)])
def test_forward_goes_on_from_the_cache(family: str, images: tuple[int, ...]) -> None:
    """Step by step or several tokens at once, from a cache of the caller's own."""
    model = model_of(family)
    inputs = tiny_inputs(model, images)
    with FastV(keep_ratio=0.2)(model):
        expected = generate(model, inputs)
        new = expected.sequences[:, -NEW_TOKENS:]
        for step in (1, 3):
            cache = DynamicCache()
            logits = [model(**inputs, **{CACHE: cache}).logits[:, -1:]]
            mask = inputs["attention_mask"]
            for start in range(0, NEW_TOKENS - 1, step):
                ids = new[:, start : start + step]
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                logits.append(model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits)
            steps = torch.cat(logits, 1)
            torch.testing.assert_close(steps, torch.stack(expected.logits, 1), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("order", [(1, 1), (0, 1), (1, 0)])
def test_chats(order: tuple[int, int]) -> None:
    """A turn chooses among its own images, and sees what earlier ones left."""
    model = model_of("llava")
    turns = [tiny_inputs(model, (count,), seed=seed) for seed, count in enumerate(order)]
    with FastV(num_tokens=3)(model):
        first = generate(model, turns[0])
        ids = torch.cat([first.sequences, turns[1]["input_ids"]], 1)
        whole = turns[1] | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generate(model, whole, **{CACHE: cache_of(first)})

    whole = {"input_ids": second.sequences[:, :-1]}
    whole["pixel_values"] = torch.cat([turn["pixel_values"] for turn in turns if "pixel_values" in turn])
    attentions = model_of("llava", "eager")(**whole, output_attentions=True).attentions[1][0].mean(0)
    ends = [turns[0]["input_ids"].shape[1], ids.shape[1]]
    keep = whole["input_ids"][0] != IMAGE
    for start, end in ((0, ends[0]), (ends[0], ends[1])):
        visual = start + (whole["input_ids"][0, start:end] == IMAGE).nonzero()[:, 0]
        keep[visual[attentions[end - 1, visual].topk(min(3, len(visual))).indices]] = True
    assert cache_of(second).layers[2].columns[0].tolist() == keep.nonzero()[:, 0].tolist()
    assert [c.keys.shape[2] for c in cache_of(second).layers] == [len(keep)] * 2 + [int(keep.sum())] * 2

    # The same by a mask over the whole conversation: later layers must not see what their cache lacks.
    mask = torch.ones(len(keep), len(keep), dtype=torch.bool).tril() & keep

    def hide(_: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": mask[None, None]}

    handles = [each.register_forward_pre_hook(hide, with_kwargs=True) for each in model.get_decoder().layers[2:]]
    try:
        logits = model(**whole, logits_to_keep=NEW_TOKENS).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(torch.cat(second.logits), logits, atol=2e-4, rtol=1e-3)


def test_chats_in_a_batch_equal_those_alone() -> None:
    model = model_of("llava")

    def chat(**options: Any) -> tuple[Tensor, Tensor]:
        first, second = (tiny_inputs(model, (1, 2), seed=seed, **options) for seed in range(2))
        answer = generate(model, first)
        mask = torch.cat([first["attention_mask"], torch.ones(len(answer.sequences), NEW_TOKENS)], 1)
        second["input_ids"] = torch.cat([answer.sequences, second["input_ids"]], 1)
        second["attention_mask"] = torch.cat([mask, second["attention_mask"]], 1).long()
        output = generate(model, second, **{CACHE: cache_of(answer)})
        return output.sequences[:, -NEW_TOKENS:], torch.stack(output.logits, 1)

    with FastV(keep_ratio=0.25)(model):
        together = chat()
        for row in range(2):
            alone = chat(only=row)
            assert torch.equal(alone[0][0], together[0][row])
            torch.testing.assert_close(alone[1][0], together[1][row], atol=2e-4, rtol=1e-3)


def test_what_generation_does_with_caches() -> None:
    """Tokens are taken back, rows repeated and selected, and the cache emptied, in all layers alike."""
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"), (1,))
    with FastV(keep_ratio=0.2)(model):
        expected = generate(model, inputs, max_new_tokens=12)
        cache = cache_of(expected)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.crop(-11)
        prompt = inputs["input_ids"].shape[1]
        ids = expected.sequences[:, prompt : prompt + 3].expand(2, -1)
        mask = torch.ones(2, prompt + 3, dtype=torch.long)
        again = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits
        torch.testing.assert_close(again[1], torch.cat(expected.logits[1:4]), atol=2e-4, rtol=1e-3)
        assert torch.equal(again[0], again[1])
        cache.reset()
        afresh = model(**inputs, **{CACHE: cache}).logits[:, -1]
        torch.testing.assert_close(afresh, expected.logits[0], atol=2e-4, rtol=1e-3)


def test_without_a_cache_every_step_chooses_anew() -> None:
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"), (2,))
    with FastV(keep_ratio=0.2)(model):
        output = generate(model, inputs, use_cache=False)
        longer = extended(inputs, output.sequences[:, inputs["input_ids"].shape[1] : -1])
        logits = model(**longer, logits_to_keep=1).logits[:, 0]
    torch.testing.assert_close(output.logits[-1], logits, atol=2e-4, rtol=1e-3)


# ---------------------------------------------------------------- the block


def traces(model: PreTrainedModel) -> list[Any]:
    """Return what hooks and recorders would change on a model."""
    return [(dict(vars(m)), dict(m._forward_pre_hooks), id(getattr(m, "config", None))) for m in model.modules()]


def test_the_model_is_restored() -> None:
    model, inputs = model_of("llava_next"), tiny_inputs(model_of("llava_next"), (1,))
    logits, before = model(**inputs).logits[:, -1:], traces(model)
    method = FastV(keep_ratio=0.1)
    for _ in range(2):
        with method(model) as entered:
            assert entered is method
            assert not torch.allclose(model(**inputs).logits[:, -1:], logits, atol=1e-3)
        assert traces(model) == before
        with pytest.raises(RuntimeError, match="inside"), method(model):
            raise RuntimeError("inside")
        assert traces(model) == before
        with pytest.raises(ValueError, match="cannot be kept"), FastV(num_tokens=999)(model):
            generate(model, inputs)
        assert traces(model) == before
        assert torch.equal(model(**inputs).logits[:, -1:], logits)


def test_a_failed_forward_leaves_nothing_for_the_next() -> None:
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"), (1,))
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = model(input_ids=ids).logits
    with FastV(keep_ratio=0.1)(model):
        expected = model(**inputs).logits
        broken = model.get_decoder().layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        broken.remove()
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert torch.equal(model(**inputs).logits, expected)


def test_calls_without_images_are_left_alone() -> None:
    model = model_of("llava")
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    expected = generate(model, inputs)
    labelled = model(**inputs, labels=inputs["input_ids"])
    with FastV(keep_ratio=0.1)(model) as method:
        assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs).logits, expected.logits, strict=True))
        assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, labelled.loss)
    assert method.report is None


def test_after_another_method_has_pruned() -> None:
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"), (2,))
    outer, inner = DivPrune(num_tokens=6), FastV(num_tokens=4)
    with outer(model), inner(model):
        output = generate(model, inputs)
    assert inner.report.tokens_before == (12,)
    assert [c.keys.shape[2] - NEW_TOKENS + 1 for c in cache_of(output).layers] == [
        outer.report.prompt_after[0] - dropped for dropped in (0, 0, 8, 8)
    ]


def test_report() -> None:
    model = model_of("llava")
    inputs = tiny_inputs(model, BATCH)
    with FastV(num_tokens=5, layer=3)(model) as method:
        model(**inputs)
    report = method.report
    assert (report.tokens_before, report.tokens_after) == ((32, 0, 16), (5, 0, 5))
    assert all(bool((kept.diff() > 0).all()) for kept in report.kept)
    assert report.prompt_before == tuple(inputs["attention_mask"].sum(1).tolist())
    assert report.prompt_after == (report.prompt_before[0] - 27, report.prompt_before[1], report.prompt_before[2] - 11)
    # Per layer of width 16: q and o 16 x 16, k and v 16 x 8, three matrices of the MLP 16 x 32.
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
    before, after = (
        2 * weights * sum(tokens) + 2 * 16 * sum(n * n for n in tokens)
        for tokens in (report.prompt_before, report.prompt_after)
    )
    assert (report.flops_before, report.flops_after) == (4 * before, 3 * before + after)


def test_inputs_are_not_changed() -> None:
    model, inputs = model_of("qwen2_5_vl"), tiny_inputs(model_of("qwen2_5_vl"), BATCH)
    before = {k: v.clone() for k, v in inputs.items()}
    with FastV(keep_ratio=0.2)(model):
        generate(model, inputs)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either keep_ratio .* or num_tokens"),
        ({"keep_ratio": 0.5, "num_tokens": 3}, "either keep_ratio .* or num_tokens"),
        ({"keep_ratio": 0.0}, r"in \(0, 1\], received 0.0"),
        ({"keep_ratio": 1.5}, r"in \(0, 1\], received 1.5"),
        ({"keep_ratio": float("nan")}, r"in \(0, 1\], received nan"),
        ({"num_tokens": 0}, "num_tokens is a count of at least 1, received 0"),
        ({"num_tokens": 2.5}, "num_tokens is a count of at least 1, received 2.5"),
        ({"keep_ratio": 0.5, "layer": 0}, "layer is a count of at least 1, received 0"),
        ({"keep_ratio": 0.5, "layer": 1.0}, "layer is a count of at least 1, received 1.0"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastV(**arguments)


def visual_end(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    end = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    return inputs | {k: inputs[k][:, :end] for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"labels": x["input_ids"]}, "`labels` and a tensor of `logits_to_keep` have nothing to refer"),
        (lambda x: x | {"logits_to_keep": torch.tensor([3])}, "drop them, and take the logits of the last tokens"),
        (lambda x: x | {"attention_mask": torch.ones(1, 1, 2, 2)}, r"\(batch, length\), received .*1, 1, 2, 2"),
        (lambda x: x | {"attention_mask": {"full_attention": None}}, r"\(batch, length\), received <class 'dict'>"),
        (
            lambda x: {"inputs_embeds": torch.zeros(1, 4, 16), "pixel_values": x["pixel_values"]},
            "in `input_ids`: pass them, and drop 'inputs_embeds'",
        ),
        (visual_end, "End the prompt with text"),
        (
            lambda x: x | {CACHE: StaticCache(model_of("llava").config, max_cache_len=64)},
            "needs a DynamicCache, received a StaticCache",
        ),
    ],
)
def test_bad_inputs(change: Any, message: str) -> None:
    model, inputs = model_of("llava"), tiny_inputs(model_of("llava"), (1,))
    with FastV(keep_ratio=0.5)(model), pytest.raises(ValueError, match=message):
        model(**change(inputs))


def test_too_many_tokens() -> None:
    model = model_of("llava")
    with FastV(num_tokens=17)(model):
        with pytest.raises(ValueError, match="num_tokens=17 tokens cannot be kept: a prompt has 16 visual ones"):
            model(**tiny_inputs(model, (2, 1)))
        model(**tiny_inputs(model, (2, 2)))


def test_unsupported_models() -> None:
    method = FastV(keep_ratio=0.5)
    with pytest.raises(TypeError, match="LlamaForCausalLM: it needs a vision-language model .* LLaVA, LLaVA-NeXT"):
        enter(method, LlamaForCausalLM(LlamaConfig(**tiny_vlms._TEXT)))
    fused = tiny_vlm("llava")
    for layer in fused.get_decoder().layers:
        layer.self_attn.qkv_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(TypeError, match="one self-attention .* each, as in LLaVA"):
        enter(method, fused)
    with pytest.raises(ValueError, match="layer=2 leaves no layer to prune: LlamaModel has 2"):
        enter(method, tiny_vlm("llava"))
    with pytest.raises(ValueError, match="full attention in every layer, and some of Gemma3TextModel's have a window"):
        enter(FastV(keep_ratio=0.5, layer=1), tiny_vlm("gemma3"))
    with pytest.raises(ValueError, match="layer must be at least 2 for Qwen3VL.*received 1"):
        enter(FastV(keep_ratio=0.5, layer=1), model_of("qwen3_vl"))
    model = model_of("llava")
    with method(model), pytest.raises(ValueError, match="sdpa or eager, and not within another block"):
        enter(FastV(keep_ratio=0.5, layer=1), model)
    flash = tiny_vlm("llava")
    flash.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"received \['flash_attention_2'\]. Use `model.set_attn_implementation`"):
        enter(FastV(keep_ratio=0.5, layer=1), flash)


def enter(method: FastV, model: PreTrainedModel) -> None:
    before = traces(model)
    try:
        with method(model):
            pass
    finally:
        assert traces(model) == before
