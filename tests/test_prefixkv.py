"""PrefixKV on tiny real models: exact where nothing is forgotten, and against a full forward with masks otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    StaticCache,
)

from mmsdk.caching import CACHE, OLD_NAME, cache_of
from pruning.prefixkv import (
    PrefixKV,
    PrefixKVCache,
    layer_forget_ratios,
    received_attention,
    search_forget_counts,
)

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
IMAGE_TOKEN, NEW_TOKENS = 50, 7


def seeded(build: Callable[[], Any], **loading: Any) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    model.set_attn_implementation(loading.get("attention", "sdpa"))
    return model


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), **changes)


def tiny_llava(**changes: Any) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN)
    return seeded(lambda: LlavaForConditionalGeneration(config), **changes)


def tiny_qwen(**changes: Any) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
    )
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), **changes)


def prompt(lengths: tuple[int, ...] = (24, 17), images: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of random tokens; `images` placeholders stand at the start of every sequence."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 45, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    start = (~mask).sum(-1, keepdim=True)
    places = torch.arange(max(lengths)) - start
    ids = ids.where(mask, 0).masked_fill((places >= 0) & (places < images), IMAGE_TOKEN)
    return {"input_ids": ids, "attention_mask": mask.long()}


def llava_inputs() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    return prompt((28, 23), images=16) | {"pixel_values": pixels}


def qwen_inputs() -> dict[str, Tensor]:
    pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4))
    inputs = prompt((20, 15), images=4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return inputs | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


MODELS = {"llama": (tiny_llama, prompt), "llava": (tiny_llava, llava_inputs), "qwen2_5_vl": (tiny_qwen, qwen_inputs)}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": list(range(45, 60))} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def stored(cache: PrefixKVCache) -> list[Tensor]:
    """Return for each layer which positions it holds, `(batch, seen)`."""
    held = []
    for layer in cache.managed:
        if layer.positions is None:
            held.append(torch.ones(len(layer.keys), layer.seen, dtype=torch.bool))
            continue
        # One column more takes in the empty slots.
        there = torch.zeros(len(layer.keys), layer.seen + 1, dtype=torch.bool)
        there.scatter_(1, layer.positions.where(layer.positions >= 0, layer.seen), True)
        held.append(there[:, :-1])
    return held


def masked_reference(model: Any, inputs: dict[str, Tensor], chunks: list[int], held: list[list[Tensor]]) -> Tensor:
    """Return the logits `(batch, length, vocab)` of one full forward in which every layer sees what its cache held.

    `chunks` are the numbers of tokens of each forward, `held[i]` what each layer held after the i-th.
    """
    length = sum(chunks)
    real = inputs["attention_mask"].bool()
    base = real[:, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    model.set_attn_implementation("sdpa")  # takes boolean masks
    handles = []
    for index, layer in enumerate(model.get_decoder().layers):
        mask, start = base.clone(), chunks[0]
        for chunk, state in zip(chunks[1:], held, strict=False):
            mask[:, start : start + chunk, :start] &= state[index][:, None, :start]
            start += chunk

        def give(_: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask[:, None]}

        handles.append(layer.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    try:
        positions = {} if "mm_token_type_ids" in inputs else {"position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
        return model(**inputs, **positions, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def extended(inputs: dict[str, Tensor], ids: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """Append tokens to a batch."""
    real = torch.ones_like(ids) if real is None else real
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], ids], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], real], 1),
    }
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    return longer


# ------------------------------------------------------------ exactness


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_nothing_forgotten_is_plain_generate(name: str, attention: str) -> None:
    build, inputs = MODELS[name]
    model = build(attention=attention)
    expected = generate(model, inputs())
    for method in (PrefixKV(keep_ratio=1.0), PrefixKV(layer_forget_ratios=[0.0] * 3)):
        assert method.lossless
        with method(model):
            output = generate(model, inputs())
        assert isinstance(cache_of(output), PrefixKVCache)
        assert torch.equal(output.sequences, expected.sequences)
        for ours, plain in zip(output.logits, expected.logits, strict=True):
            assert torch.equal(ours, plain)
    assert cache_of(output).kept_lengths == [[sum(m) + NEW_TOKENS - 1 for m in inputs()["attention_mask"]]] * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generate_equals_a_masked_forward(name: str, attention: str) -> None:
    """Left padding, layers of different lengths, tokens dropped while decoding: all positions and masks must fit."""
    build, inputs = MODELS[name]
    model, method = build(attention=attention), PrefixKV(keep_ratio=0.4, distance=3)
    held: list[list[Tensor]] = []
    handle = model.register_forward_hook(
        lambda _, __, kwargs, ___: held.append(stored(cache_of(kwargs))), with_kwargs=True
    )
    with method(model):
        output = generate(model, inputs())
    handle.remove()
    length = inputs()["input_ids"].shape[1]
    full = extended(inputs(), output.sequences[:, length:-1])
    reference = masked_reference(model, full, [length] + [1] * (NEW_TOKENS - 1), held)
    torch.testing.assert_close(torch.stack(output.logits, 1), reference[:, length - 1 :], atol=1e-4, rtol=1e-4)
    plain = generate(model, inputs())
    assert not torch.allclose(torch.stack(output.logits, 1), torch.stack(plain.logits, 1), atol=1e-2)
    cache = cache_of(output)
    totals = inputs()["attention_mask"].sum(-1) + NEW_TOKENS - 1
    kept = torch.tensor(cache.kept_lengths)
    assert len(set(kept[:, 0].tolist())) > 1
    assert ((kept.sum(0) / (3 * totals)) - 0.4).abs().max() < 0.1
    for layer in cache.managed:
        assert layer.keys.shape[2] == max(row.stored for row in layer.rows)
    # Something has been dropped after the prompt.
    assert any(
        int((before & ~after[:, : before.shape[1]]).sum()) for before, after in zip(held[0], held[-1], strict=True)
    )


@torch.no_grad()
def test_next_turn_of_a_chat() -> None:
    """A second turn with padding in the middle, appended to what was kept of the first."""
    model, inputs = tiny_llama(), prompt()
    length, held = inputs["input_ids"].shape[1], []
    handle = model.register_forward_hook(
        lambda _, __, kwargs, ___: held.append(stored(cache_of(kwargs))), with_kwargs=True
    )
    turn = torch.randint(1, 45, (2, 9), generator=torch.Generator().manual_seed(5))
    real = torch.ones_like(turn)
    real[1, :4] = 0
    with PrefixKV(keep_ratio=0.5, distance=3)(model):
        first = generate(model, inputs)
        inputs = extended(inputs, first.sequences[:, length:])
        inputs = extended(inputs, turn.where(real.bool(), 0), real)
        second = generate(model, inputs, **{CACHE: cache_of(first)}, max_new_tokens=1)
    handle.remove()
    # The last token of the first answer has not been seen before.
    chunks = [length] + [1] * (NEW_TOKENS - 1) + [1 + 9]
    reference = masked_reference(model, inputs, chunks, held)
    torch.testing.assert_close(second.logits[0], reference[:, -1], atol=1e-4, rtol=1e-4)
    assert cache_of(second) is cache_of(first)
    for layer, state in zip(cache_of(second).managed, held[-1], strict=True):
        assert [row.total for row in layer.rows] == inputs["attention_mask"].sum(-1).tolist()
        assert [row.stored for row in layer.rows] == state.sum(-1).tolist()
        assert not bool((state & ~inputs["attention_mask"].bool()).any())
        for row in layer.rows:
            assert row.stored - row.total * (1 - row.ratio) < 1


@torch.no_grad()
def test_batch_equals_single() -> None:
    model, inputs = tiny_llama(), prompt((24, 17, 9))
    with PrefixKV(keep_ratio=0.5, distance=3)(model):
        together = generate(model, inputs)
        for i, length in enumerate((24, 17, 9)):
            alone = generate(model, {k: v[i : i + 1, -length:] for k, v in inputs.items()})
            logits = torch.stack(together.logits)[:, i], torch.stack(alone.logits)[:, 0]
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
            for batched, single in zip(cache_of(together).managed, cache_of(alone).managed, strict=True):
                positions = batched.positions[i][batched.positions[i] >= 0] - (24 - length)
                assert torch.equal(positions, single.positions[0])
                assert batched.rows[i] == single.rows[0]


@torch.no_grad()
def test_right_padding_of_a_prompt() -> None:
    """Padding is neither counted nor kept, wherever it is."""
    model, method = tiny_llama(), PrefixKV(keep_ratio=0.5)
    ids = prompt((15,))["input_ids"]
    with method(model):
        left, right = method.cache(model), method.cache(model)
        model(input_ids=ids, **{CACHE: left})
        padded = {"input_ids": torch.cat([ids, ids[:, :3]], 1), "attention_mask": (torch.arange(18) < 15).long()[None]}
        model(**padded, **{CACHE: right})
    assert left.kept_lengths == right.kept_lengths
    for a, b in zip(left.managed, right.managed, strict=True):
        assert torch.equal(a.positions, b.positions)
        torch.testing.assert_close(a.keys, b.keys)


@torch.no_grad()
def test_beams_and_samples() -> None:
    model, inputs = tiny_llama(), prompt()
    with PrefixKV(keep_ratio=0.5, distance=3)(model):
        beams = generate(model, inputs, num_beams=3, num_return_sequences=3, length_penalty=0.0, output_scores=True)
        assert beams.sequences.shape[0] == 6
        # Each beam's score is that of its tokens when decoded alone, so its cache rows followed it.
        for row in range(6):
            alone = {k: v[row // 3][None] for k, v in inputs.items()}
            cache, score = PrefixKV(keep_ratio=0.5, distance=3).cache(model), 0.0
            mask = alone["attention_mask"]
            step = alone | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            for token in beams.sequences[row, inputs["input_ids"].shape[1] :]:
                logits = model(**step, **{CACHE: cache}).logits[0, -1]
                score += float(logits.log_softmax(-1)[token])  # what is suppressed stays in the sum
                mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                position = mask.sum(-1, keepdim=True) - 1
                step = {"input_ids": token[None, None], "attention_mask": mask, "position_ids": position}
            assert float(beams.sequences_scores[row]) == pytest.approx(score, abs=1e-3)
        sampled = [seeded_sample(model, inputs) for _ in range(2)]
    assert torch.equal(*sampled)


def seeded_sample(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(7)
    return generate(model, inputs, do_sample=True, num_return_sequences=2).sequences


# ------------------------------------------------------------ the parts, by hand


def test_received_attention_by_hand() -> None:
    query, key = torch.tensor([[[[0.0], [2.0]]]]), torch.tensor([[[[1.0], [3.0]]]])
    first = torch.sigmoid(torch.tensor(0.5 * (2 - 6)))
    expected = torch.stack([1 + first, 1 - first])[None]
    torch.testing.assert_close(received_attention(query, key, scaling=0.5), expected)
    without_first = torch.tensor([[False, True]])
    torch.testing.assert_close(
        received_attention(query, key, scaling=0.5, real=without_first), torch.stack([first, 1 - first])[None]
    )
    additive = torch.tensor([[0.0, -1e9], [-1e9, 0.0]])[None, None]
    for mask in (additive, additive == 0):
        torch.testing.assert_close(received_attention(query, key, 0.5, mask), torch.tensor([[1.0, 1.0]]))


def test_received_attention_in_blocks() -> None:
    """Longer than a block, grouped heads, against the whole map."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 300, 8, generator=generator) for heads in (4, 2))
    logits = query @ key.repeat_interleave(2, 1).mT * 0.3
    whole = logits.masked_fill(~torch.ones(300, 300, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    torch.testing.assert_close(received_attention(query, key, 0.3), whole.mean(1).sum(1), rtol=1e-4, atol=1e-4)


def test_search_by_hand() -> None:
    """One layer needs a single token for half its mass, the other half of its tokens."""
    importance = torch.cat([torch.tensor([[99.0] + [1 / 99] * 99]), torch.ones(1, 100)])
    # At a mass of one half: 100 - 1 - 2 and 100 - 50 - 2 tokens.
    assert search_forget_counts(importance, 0.725).tolist() == [97, 48]
    # Too many for half of all: 97 + 23 at three quarters, 97 + 10 at seven eighths, then 97 + 4, which is near enough.
    assert search_forget_counts(importance, 0.5).tolist() == [97, 4]
    assert layer_forget_ratios(importance, 0.72) == [int(97 * 144 / 145) / 100, int(48 * 144 / 145) / 100]
    assert layer_forget_ratios(importance, 0.0) == [0.0, 0.0]
    # More than can be forgotten: all but one token, the first ones and the last.
    assert search_forget_counts(importance, 0.999, start_size=3).tolist() == [95, 95]


@torch.no_grad()
def test_prompt_of_few_tokens() -> None:
    model = tiny_llama()
    for length in (1, 2, 3):
        with PrefixKV(layer_forget_ratios=[0.9] * 3)(model):
            output = generate(model, prompt((length,)))
        kept = cache_of(output).managed[0].positions[0].tolist()
        assert kept[0] == 0 and kept[-1] == length + NEW_TOKENS - 2


@torch.no_grad()
def test_profile() -> None:
    model, method = tiny_llama(), PrefixKV(keep_ratio=0.5, start_size=2)
    prompts = [prompt((24, 17)), prompt((12,))]
    profiled = method.profile(model, prompts)
    assert (profiled.keep_ratio, profiled.start_size) == (None, 2)
    with method(model):
        found = []
        for inputs in prompts:
            ratios = cache_of(model(**inputs)).forget_ratios
            found += [[layer[row] for layer in ratios] for row in range(len(inputs["input_ids"]))]
    assert profiled.layer_forget_ratios == pytest.approx([sum(r) / 3 for r in zip(*found, strict=True)])
    with profiled(model):
        cache = cache_of(model(**prompts[0]))
    assert cache.kept_lengths == [[24 - round(r * 24), 17 - round(r * 17)] for r in profiled.layer_forget_ratios]
    with pytest.raises(ValueError, match="nothing to profile"):
        profiled.profile(model, prompts)
    with pytest.raises(ValueError, match="at least one prompt"):
        method.profile(model, [])


@torch.no_grad()
def test_sliding_layers_are_left_alone() -> None:
    config = Gemma3TextConfig(
        **TEXT | {"num_hidden_layers": 4, "head_dim": 8},
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model, inputs = seeded(lambda: Gemma3ForCausalLM(config)), prompt()
    expected = generate(model, inputs)
    with PrefixKV(keep_ratio=1.0)(model):
        assert torch.equal(generate(model, inputs).sequences, expected.sequences)
    with PrefixKV(keep_ratio=0.4)(model):
        cache = cache_of(generate(model, inputs))
    assert len(cache.managed) == 2 and len(cache.kept_lengths) == 2
    assert [layer.keys.shape[2] for layer in cache.layers[::2]] == [5, 5]
    assert max(layer.keys.shape[2] for layer in cache.managed) < 24


def test_half_precision_prompts_forget_by_float32() -> None:
    query, key = (torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    assert torch.equal(received_attention(query, key, 1.0), received_attention(query.float(), key.float(), 1.0))


# ------------------------------------------------------------ coming and going


@torch.no_grad()
def test_model_is_restored() -> None:
    model, inputs, method = tiny_llava(), llava_inputs(), PrefixKV(keep_ratio=0.4)
    expected = generate(model, inputs).sequences
    with method(model):
        forgetful = generate(model, inputs).sequences
        with pytest.raises(ValueError, match="active on this model already"), method(model):
            pass
        assert torch.equal(generate(model, inputs).sequences, forgetful)
    with pytest.raises(RuntimeError, match="inside"), method(model):
        raise RuntimeError("inside")
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    after = generate(model, inputs)
    assert type(cache_of(after)) is DynamicCache
    assert torch.equal(after.sequences, expected)
    with method(model):
        assert torch.equal(generate(model, inputs).sequences, forgetful)
        assert cache_of(generate(model, inputs, use_cache=False)) is None
        assert torch.equal(generate(model, inputs, use_cache=False).sequences, expected)


@torch.no_grad()
def test_a_reset_cache_is_as_new() -> None:
    model, inputs, method = tiny_llama(), prompt(), PrefixKV(keep_ratio=0.4)
    cache = method.cache(model)
    with method(model):
        first = generate(model, inputs, **{CACHE: cache}).sequences
        cache.reset()
        assert cache.kept_lengths == [[]] * 3
        assert torch.equal(generate(model, inputs, **{CACHE: cache}).sequences, first)


@torch.no_grad()
def test_refused_use() -> None:
    model, inputs, method = tiny_llama(), prompt(), PrefixKV(keep_ratio=0.5)
    with pytest.raises(RuntimeError, match=r"works only within `with PrefixKV"):
        generate(model, inputs, **{CACHE: method.cache(model)})
    with method(model):
        with pytest.raises(ValueError, match="got a StaticCache"):
            generate(model, inputs, **{CACHE: StaticCache(config=model.config, max_cache_len=64)})
        # From the version with the new name on, transformers asks caches itself whether they can.
        refusal = "cannot take tokens back" if CACHE == OLD_NAME else "requires a cache that can be cropped"
        with pytest.raises(ValueError, match=refusal):
            generate(model, prompt((24,)), prompt_lookup_num_tokens=2)
        # A model that failed is none the worse for it.
        assert generate(model, inputs).sequences.shape == (2, 24 + NEW_TOKENS)
    filled = cache_of(generate(model, inputs))
    with method(model), pytest.raises(ValueError, match="got a DynamicCache with 30 tokens"):
        model(input_ids=torch.tensor([[1], [2]]), **{CACHE: filled})
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="sdpa or eager, got 'flex_attention'"), method(model):
        pass
    windowed = seeded(lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=4)))
    with pytest.raises(ValueError, match="all layers of this model have a window"), method(windowed):
        pass
    with pytest.raises(ValueError, match="must have 3 entries for this model, got 2"):
        PrefixKV(layer_forget_ratios=[0.1, 0.2]).cache(tiny_llama())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either keep_ratio or layer_forget_ratios"),
        ({"keep_ratio": 0.5, "layer_forget_ratios": [0.5]}, "either keep_ratio or layer_forget_ratios"),
        ({"keep_ratio": 0.0}, r"keep_ratio must lie in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, r"keep_ratio must lie in \(0, 1\], got 1.5"),
        ({"layer_forget_ratios": [0.5, 1.0]}, r"must lie in \[0, 1\), got \[0.5, 1.0\]"),
        ({"keep_ratio": 0.5, "start_size": 0}, "start_size must be at least 1, got 0"),
        ({"keep_ratio": 0.5, "distance": -25}, "distance must be at least 1, got -25"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixKV(**arguments)
