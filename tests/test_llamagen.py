"""LlamaGen on tiny models: training, the cached state, generation, guidance, loading and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.base import Trace
from generators.guidance import (
    ConstantGuidance,
    Guidance,
    HalfLinearGuidance,
    IntervalGuidance,
    LinearGuidance,
    combine,
    make_guidance,
)
from generators.llamagen import LlamaGen
from mmsdk.decoding.sampling import process_logits, sample_inverse_cdf
from mmsdk.errors import CheckpointError, UnknownNameError

VOCABULARY, TOKENS, CONDITION, CAPTION_DIM = 40, 16, 5, 12
KINDS = ("class", "text", "learned")


def make_model(kind: str = "class", **overrides: Any) -> LlamaGen:
    """Build a tiny model; the output layer, which starts at 0, gets random weights."""
    config: dict[str, Any] = {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "multiple_of": 16, "codebook_size": VOCABULARY,
        "max_tokens": TOKENS, "num_classes": 6, "initializer_range": 0.15,
    }  # fmt: skip
    if kind != "class":
        config |= {"condition": "text", "num_classes": None, "caption_dim": CAPTION_DIM}
        config |= {"num_condition_tokens": CONDITION}
    if kind == "learned":
        config |= {"positions": "learned"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaGen(**(config | overrides))
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "output.weight")):
                torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaGen]:
    """One model of every kind, which no test changes."""
    return {kind: make_model(kind) for kind in KINDS}


def make_condition(model: LlamaGen, batch: int = 3) -> dict[str, Any]:
    """Labels, or features with left padding of 1, 2, 3, ... tokens: the first column is padding in every row."""
    if model.config.condition == "class":
        return {"class_labels": torch.arange(batch) % 6}
    features = torch.randn(batch, CONDITION, CAPTION_DIM, generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(CONDITION)[None] > torch.arange(batch)[:, None] % (CONDITION - 1)).float()
    return {"caption_features": features, "caption_mask": mask}


def make_tokens(batch: int = 3, length: int = TOKENS) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(6))


def rows_of(condition: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The condition of some rows."""
    return {key: value[rows] for key, value in condition.items()}


def make_generators(*seeds: int) -> list[torch.Generator]:
    """Generators with these seeds."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def plain_generate(
    model: LlamaGen, condition: dict[str, Any], scales: list[float], uniforms: Tensor, **sampling: Any
) -> tuple[Tensor, Tensor]:
    """The generation without any saving: no cache, and both halves of the batch at every step."""
    batch = len(uniforms)
    tokens = torch.zeros(batch, 0, dtype=torch.int64)
    steps = []
    drop = torch.ones(batch, dtype=torch.bool)
    with torch.no_grad():
        for step, scale in enumerate(scales):
            # The last token is never an input, so any will do.
            known = torch.cat([tokens, tokens.new_zeros(batch, 1)], 1)
            cond = model(known, **condition).logits[:, -1]
            uncond = model(known, drop_condition=drop, **condition).logits[:, -1]
            logits = combine(cond, uncond, scale)
            probs = torch.softmax(process_logits(logits, **sampling), -1)
            drawn = sample_inverse_cdf(probs, uniforms[:, step])
            tokens = torch.cat([tokens, drawn[:, None]], 1)
            steps.append(logits)
    return tokens, torch.stack(steps, 1)


UNIFORMS = torch.rand(3, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------------------------------------------- training


def test_overfits_and_generates_what_it_learned() -> None:
    model = make_model(token_dropout=0.0, residual_dropout=0.0, feed_forward_dropout=0.0, initializer_range=0.02)
    torch.nn.init.zeros_(model.output.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
    model.train()
    tokens, labels = make_tokens(4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = model(tokens, labels, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=1e-5)  # output layer of 0
    assert losses[-1] < 0.05
    assert torch.equal(model.generate(labels, do_sample=False).token_ids, tokens)


def test_initial_weights() -> None:
    model = LlamaGen(hidden_size=64, num_layers=1, num_heads=4, codebook_size=500, max_tokens=16)
    assert model.output.weight.count_nonzero() == 0
    assert model.layers[0].attention.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0].feed_forward.w1.out_features == 256  # 8 / 3 * 64 = 170, up to a multiple of 256


def test_causality(models: dict[str, LlamaGen]) -> None:
    for model in models.values():
        tokens = make_tokens()
        other = tokens.clone()
        other[:, 9] = (other[:, 9] + 1) % VOCABULARY
        a, b = (model(t, **make_condition(model)).logits for t in (tokens, other))
        assert torch.equal(a[:, :10], b[:, :10])
        assert not torch.isclose(a[:, 10], b[:, 10]).all()


def test_padding_features_do_not_matter(models: dict[str, LlamaGen]) -> None:
    for kind in ("text", "learned"):
        condition = make_condition(models[kind])
        filled = condition["caption_features"].masked_fill(condition["caption_mask"][..., None] == 0, float("nan"))
        a = models[kind](make_tokens(), **condition).logits
        b = models[kind](make_tokens(), caption_features=filled, caption_mask=condition["caption_mask"])
        assert torch.equal(a, b.logits)


def test_dropped_condition(models: dict[str, LlamaGen]) -> None:
    for kind, model in models.items():
        condition, tokens = make_condition(model), make_tokens()
        drop = torch.tensor([False, True, False])
        mixed = model(tokens, drop_condition=drop, **condition).logits
        kept = model(tokens, **condition).logits
        torch.testing.assert_close(mixed[::2], kept[::2])
        assert not torch.isclose(mixed[1], kept[1], atol=1e-3).all()
        if kind == "class":  # no class is the row after the last one
            table = model.cls_embedding.embedding_table.weight
            assert torch.equal(model.embed_condition(condition["class_labels"], drop_condition=drop)[1, 0], table[6])


def test_gradient_reaches_the_text_features() -> None:
    model = make_model("text").train()
    condition = make_condition(model)
    features = condition["caption_features"].requires_grad_()
    drop = torch.tensor([True, False, False])
    model(make_tokens(), drop_condition=drop, labels=make_tokens(), **condition).loss.backward()
    reached = features.grad.abs().sum(-1) > 0
    expected = condition["caption_mask"].bool()
    expected[0] = False
    assert torch.equal(reached, expected)
    assert model.cls_embedding.cap_proj.fc1.weight.grad.abs().sum() > 0


def test_dropout_in_training_only(models: dict[str, LlamaGen]) -> None:
    model, tokens = make_model("text"), make_tokens()
    condition = make_condition(model)
    evaluated = model(tokens, **condition).logits
    model.train()
    assert not torch.isclose(model(tokens, **condition).logits, model(tokens, **condition).logits).all()
    greedy = model.generate(**condition, do_sample=False).token_ids  # generation never drops
    assert torch.equal(greedy, models["text"].generate(**condition, do_sample=False).token_ids)
    assert torch.equal(model.eval()(tokens, **condition).logits, evaluated)


def test_trains_after_a_generation_in_inference_mode() -> None:
    model, tokens = make_model(), make_tokens()
    with torch.inference_mode():
        model.generate(torch.arange(3), do_sample=False, num_tokens=2)
    model(tokens, torch.arange(3), labels=tokens).loss.backward()
    assert model.layers[0].attention.wqkv.weight.grad.abs().sum() > 0


def test_loss_leaves_out_ignored_labels(models: dict[str, LlamaGen]) -> None:
    tokens, condition = make_tokens(), make_condition(models["class"])
    labels = tokens.clone()
    labels[:, 4:] = -100
    short = models["class"](tokens[:, :4], labels=tokens[:, :4], **condition)
    torch.testing.assert_close(models["class"](tokens, labels=labels, **condition).loss, short.loss)
    as_tuple = models["class"](tokens[:, :4], labels=tokens[:, :4], return_dict=False, **condition)
    assert torch.equal(as_tuple[0], short.logits) and torch.equal(as_tuple[1], short.loss)


# ---------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_equals_uncached(models: dict[str, LlamaGen], kind: str) -> None:
    model, tokens = models[kind], make_tokens()
    condition = make_condition(model)
    expected = model(tokens, **condition).logits
    state = model.prefill(**condition)
    logits = [model.predict(state.condition_hidden)]
    logits += [model.step(tokens[:, i], state) for i in range(TOKENS - 1)]
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-5, rtol=1e-5)
    assert state.num_tokens == TOKENS - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_block_equals_single_steps(models: dict[str, LlamaGen], kind: str) -> None:
    model, tokens = models[kind], make_tokens()
    expected = model(tokens, **make_condition(model)).logits[:, 1:]
    state = model.prefill(**make_condition(model))
    parts = [model.forward_block(block, state) for block in tokens[:, :-1].split([4, 1, 7, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rollback_continues_as_if_nothing_had_happened(models: dict[str, LlamaGen], kind: str) -> None:
    model, tokens = models[kind], make_tokens()
    expected = model(tokens, **make_condition(model)).logits
    state = model.prefill(**make_condition(model))
    model.forward_block(tokens[:, :5], state)
    model.forward_block((tokens[:, 5:11] + 1) % VOCABULARY, state)
    state.rollback(state.condition_length + 2)
    model.forward_block(tokens[:, 2:5], state)
    torch.testing.assert_close(model.step(tokens[:, 5], state), expected[:, 6], atol=1e-5, rtol=1e-5)
    state.rollback(state.condition_length)
    state.commit([])  # the last block is gone: nothing to keep, and nothing to bring back
    assert state.num_tokens == 0
    torch.testing.assert_close(model.step(tokens[:, 0], state), expected[:, 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tree_block_and_commit(models: dict[str, LlamaGen], kind: str) -> None:
    model, tokens = models[kind], make_tokens()
    condition, wrong = make_condition(model), (make_tokens() + 1) % VOCABULARY
    # Token 3, then two candidates for token 4 (the second is right), then one for token 5 below each.
    nodes = torch.stack([tokens[:, 3], wrong[:, 4], tokens[:, 4], wrong[:, 5], tokens[:, 5]], 1)
    ancestors = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool
    )
    depths = torch.tensor([0, 1, 1, 2, 2])
    state = model.prefill(**condition)
    model.forward_block(tokens[:, :3], state)
    logits = model.forward_block(nodes, state, block_mask=ancestors, depths=depths)

    expected = model(tokens, **condition).logits
    torch.testing.assert_close(logits[:, [0, 2, 4]], expected[:, 4:7], atol=1e-5, rtol=1e-5)
    branch = torch.cat([tokens[:, :4], wrong[:, 4:6], tokens[:, :1]], 1)
    torch.testing.assert_close(logits[:, [1, 3]], model(branch, **condition).logits[:, 5:7], atol=1e-5, rtol=1e-5)

    state.commit([0, 2, 4])
    assert state.num_tokens == 6
    torch.testing.assert_close(model.step(tokens[:, 6], state), expected[:, 7], atol=1e-5, rtol=1e-5)
    model.forward_block(wrong[:, 7:9], state)
    state.commit([])
    torch.testing.assert_close(model.step(tokens[:, 7], state), expected[:, 8], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tree_block_with_masks_per_row(models: dict[str, LlamaGen]) -> None:
    model, tokens = models["text"], make_tokens()
    state = model.prefill(**make_condition(model))
    masks = torch.ones(3, 4, 4, dtype=torch.bool).tril()
    depths = torch.arange(4).expand(3, 4)
    logits = model.forward_block(tokens[:, :4], state, block_mask=masks, depths=depths)
    expected = model(tokens, **make_condition(model)).logits[:, 1:5]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0], torch.tensor([1])])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_select_rows(models: dict[str, LlamaGen], kind: str, rows: Any) -> None:
    model, tokens = models[kind], make_tokens()
    state = model.prefill(**make_condition(model))
    model.forward_block(tokens[:, :5], state)
    state.select_rows(rows)
    expected = model(tokens, **make_condition(model)).logits
    torch.testing.assert_close(model.predict(state.condition_hidden), expected[rows, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.step(tokens[rows, 5], state), expected[rows, 6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["text", "learned"])
@torch.no_grad()
def test_shared_padding_is_left_out(models: dict[str, LlamaGen], kind: str) -> None:
    model, condition = models[kind], make_condition(models[kind])
    state = model.prefill(**condition, max_new_tokens=4)
    assert (state.condition_length, state.position_offset, state.capacity) == (CONDITION - 1, 1, CONDITION - 1 + 4)
    lone = model.prefill(**rows_of(condition, slice(2, 3)))
    assert lone.condition_length == CONDITION - 3 and lone.key_bias is None
    torch.testing.assert_close(lone.condition_hidden, state.condition_hidden[2:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["text", "learned"])
def test_caption_without_any_token(models: dict[str, LlamaGen], kind: str) -> None:
    model, condition = models[kind], make_condition(models[kind])
    condition["caption_mask"][:] = 0
    output = model.generate(**condition, guidance_scale=2.0, uniforms=UNIFORMS)
    tokens, _ = plain_generate(model, condition, [2.0] * TOKENS, UNIFORMS)
    assert torch.equal(output.token_ids, tokens)


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "guidance",
    [1.0, 3.0, 0.5, LinearGuidance(4.0), HalfLinearGuidance(3.0), IntervalGuidance(2.5, 4)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_plain_loop(models: dict[str, LlamaGen], kind: str, guidance: float | Guidance) -> None:
    model, trace = models[kind], Trace(keep_logits=True)
    sampling = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    scales = make_guidance(guidance).scales(TOKENS)
    output = model.generate(
        **make_condition(model), guidance_scale=guidance, uniforms=UNIFORMS, trace=trace, **sampling
    )
    tokens, logits = plain_generate(model, make_condition(model), scales, UNIFORMS, **sampling)
    assert torch.equal(output.token_ids, tokens)
    torch.testing.assert_close(torch.stack(trace.logits, 1), logits, atol=1e-4, rtol=1e-4)
    assert trace.guidance == scales and output.trace is trace


def test_unconditional_rows_are_computed_only_where_needed(models: dict[str, LlamaGen]) -> None:
    model, labels = models["class"], torch.arange(3)
    assert model.generate(labels, do_sample=False).trace.rows == [3] * TOKENS
    assert model.generate(labels, do_sample=False, guidance_scale=2.0).trace.rows == [6] * TOKENS
    # Tokens 0 to 5 are guided (k - 1 <= 4): the condition and the tokens 0 to 4 have unconditional rows.
    interval = model.generate(labels, do_sample=False, guidance_scale=2.0, cfg_interval=4).trace
    assert interval.rows == [6] * 6 + [3] * (TOKENS - 6)
    assert (interval.forwards, interval.tokens) == (TOKENS, 6 * 6 + 3 * (TOKENS - 6))
    assert interval.guidance == [2.0] * 6 + [1.0] * (TOKENS - 6)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single(models: dict[str, LlamaGen], kind: str) -> None:
    model, condition, seeds = models[kind], make_condition(models[kind]), (11, 12, 13)
    settings = {"guidance_scale": 2.0, "cfg_interval": 7, "top_k": 30}
    together = model.generate(**condition, generator=make_generators(*seeds), **settings).token_ids
    for i, seed in enumerate(seeds):
        lone = rows_of(condition, slice(i, i + 1))
        for generator in (make_generators(seed), make_generators(seed)[0]):
            assert torch.equal(model.generate(**lone, generator=generator, **settings).token_ids, together[i : i + 1])
    backwards = {key: value.flip(0) for key, value in condition.items()}
    other = model.generate(**backwards, generator=make_generators(*seeds[::-1]), **settings).token_ids
    assert torch.equal(other.flip(0), together)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tokens_are_the_beginning(models: dict[str, LlamaGen], kind: str) -> None:
    model, condition = models[kind], make_condition(models[kind])
    for generators in (lambda: make_generators(1, 2, 3), lambda: make_generators(4)[0]):
        full = model.generate(**condition, guidance_scale=2.0, generator=generators()).token_ids
        assert full.shape == (3, TOKENS)
        for k in (1, 5):
            short = model.generate(**condition, guidance_scale=2.0, generator=generators(), num_tokens=k)
            assert torch.equal(short.token_ids, full[:, :k])
            assert short.trace.forwards == k


def test_streaming_and_callback(models: dict[str, LlamaGen]) -> None:
    model, labels = models["class"], torch.arange(3)
    full = model.generate(labels, uniforms=UNIFORMS).token_ids
    streamed = list(model.iter_generate(labels, uniforms=UNIFORMS))
    assert [step for step, _ in streamed] == list(range(TOKENS))
    assert all(torch.equal(tokens, full[:, : step + 1]) for step, tokens in streamed)
    seen: list[tuple[int, Tensor]] = []
    ids, trace = model.generate(
        labels, uniforms=UNIFORMS, callback=lambda step, tokens: seen.append((step, tokens)), return_dict=False
    )
    assert torch.equal(ids, full) and trace.forwards == TOKENS
    assert [step for step, _ in seen] == list(range(TOKENS)) and torch.equal(seen[3][1], full[:, :4])


def test_random_numbers(models: dict[str, LlamaGen]) -> None:
    model, labels = models["class"], torch.arange(3)
    before = torch.get_rng_state()
    a, b = (model.generate(labels).token_ids for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a, b)
    seeded = [model.generate(labels, generator=make_generators(1)[0]).token_ids for _ in range(2)]
    assert torch.equal(*seeded)


def test_half_precision_keeps_exact_rotations(models: dict[str, LlamaGen]) -> None:
    model = make_model("text")
    condition = make_condition(model)
    model.generate(**condition, num_tokens=1, do_sample=False)
    model.to(torch.bfloat16)
    output = model.generate(**condition, guidance_scale=2.0, uniforms=UNIFORMS)
    assert output.token_ids.shape == (3, TOKENS)
    assert model._rotary_table.dtype == torch.complex64
    logits = model(make_tokens(), **condition).logits
    assert logits.dtype == torch.bfloat16
    expected = models["text"](make_tokens(), **condition).logits
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


# ---------------------------------------------------------------------------------------------------- guidance


def test_guidance_by_hand() -> None:
    assert ConstantGuidance(3.0).scales(3) == [3.0, 3.0, 3.0]
    assert LinearGuidance(3.0).scales(5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert HalfLinearGuidance(3.0).scales(5) == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert IntervalGuidance(3.0, 1).scales(5) == [3.0, 3.0, 3.0, 1.0, 1.0]
    assert LinearGuidance(3.0).scales(1) == HalfLinearGuidance(3.0).scales(1) == [3.0]
    assert LinearGuidance(3.0).scale(0, 10, progress=0.25) == 1.5
    guided = combine(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]), 3.0)
    assert guided.tolist() == [4.0, -3.0]
    assert make_guidance(2) == ConstantGuidance(2)
    linear = LinearGuidance(2.0)
    assert make_guidance(linear) is linear


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_guidance_refuses_scales(scale: float) -> None:
    for make in (make_guidance, LinearGuidance, HalfLinearGuidance, lambda s: IntervalGuidance(s, 3)):
        with pytest.raises(ValueError, match="finite and at least 0"):
            make(scale)


def test_guidance_refuses_other_things() -> None:
    for value in ("3", True, None):
        with pytest.raises(TypeError, match="must be a number"):
            make_guidance(value)  # type: ignore[arg-type]
    for last in (-1, 1.5):
        with pytest.raises(ValueError, match="last must be an integer of at least 0"):
            IntervalGuidance(2.0, last)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_loads(tmp_path: Path, models: dict[str, LlamaGen], kind: str) -> None:
    model = models[kind]
    model.save_pretrained(tmp_path)
    loaded = LlamaGen.from_pretrained(tmp_path)
    condition = make_condition(model)
    assert torch.equal(model(make_tokens(), **condition).logits, loaded(make_tokens(), **condition).logits)
    assert dict(loaded.config)["positions"] == model.config.positions


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"module": s}])
def test_original_checkpoint(models: dict[str, LlamaGen], wrap: Any) -> None:
    for model in models.values():
        state_dict = model.state_dict() | {"freqs_cis": torch.zeros(3, 1, 2)}
        config = {"n_head": 4, "block_size": TOKENS}
        loaded = LlamaGen.from_original(wrap(state_dict), config)
        condition = make_condition(model)
        assert torch.equal(model(make_tokens(), **condition).logits, loaded(make_tokens(), **condition).logits)
        assert not loaded.training


def test_original_checkpoint_from_a_file_without_configuration(tmp_path: Path) -> None:
    model = make_model("learned", hidden_size=768, num_layers=12, num_heads=12, multiple_of=8, intermediate_size=16)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    loaded = LlamaGen.from_original(tmp_path / "model.pt")
    ours, theirs = dict(loaded.config), dict(model.config)
    for name in ("num_heads", "num_layers", "intermediate_size", "max_tokens", "positions", "caption_dim"):
        assert ours[name] == theirs[name]


def test_original_checkpoint_with_its_rotary_table() -> None:
    model = make_model("text")
    table = torch.zeros(CONDITION + TOKENS, 4, 2)
    loaded = LlamaGen.from_original(model.state_dict() | {"freqs_cis": table})
    assert (loaded.config.num_heads, loaded.config.max_tokens) == (4, TOKENS)


def test_original_checkpoint_refuses() -> None:
    state_dict = make_model().state_dict()
    with pytest.raises(CheckpointError, match="does not tell num_heads; pass it"):
        LlamaGen.from_original(state_dict)
    with pytest.raises(CheckpointError, match="does not tell max_tokens; pass it"):
        LlamaGen.from_original(state_dict, {"num_heads": 4})
    with pytest.raises(UnknownNameError, match="num_head.*Did you mean"):
        LlamaGen.from_original(state_dict, {"num_head": 4})
    with pytest.raises(CheckpointError, match="no LlamaGen checkpoint: 'tok_embeddings.weight'"):
        LlamaGen.from_original({"encoder.weight": torch.zeros(2, 2)})
    config = {"num_heads": 4, "max_tokens": TOKENS}
    with pytest.raises(CheckpointError, match="stranger"):
        LlamaGen.from_original(state_dict | {"stranger": torch.zeros(1)}, config)
    broken = {key: value for key, value in state_dict.items() if key != "layers.1.ffn_norm.weight"}
    with pytest.raises(CheckpointError, match="layers.1.ffn_norm.weight"):
        LlamaGen.from_original(broken, config)
    with pytest.raises(CheckpointError, match="output.weight"):
        LlamaGen.from_original(state_dict | {"output.weight": torch.zeros(3, 32)}, config)


def test_presets_refuse() -> None:
    with pytest.raises(UnknownNameError, match="Unknown LlamaGen preset 'XXXXL'. Did you mean"):
        LlamaGen.preset("XXXXL")
    with pytest.raises(ValueError, match="multiple of 16"):
        LlamaGen.preset("B", image_size=250)
    with pytest.raises(ValueError, match="condition must be 'class' or 'text', got 'audio'"), torch.device("meta"):
        LlamaGen.preset("B", condition="audio")


@pytest.mark.parametrize("name", ["XXXL", "1B", "7B"])
def test_presets_without_manifest(name: str) -> None:
    with torch.device("meta"):
        model = LlamaGen.preset(name, num_layers=1)
    expected = {"XXXL": (2560, 40, 6912), "1B": (2048, 32, 5632), "7B": (4096, 32, 11008)}[name]
    feed_forward = model.layers[0].feed_forward.w1.out_features
    assert (model.config.hidden_size, model.config.num_heads, feed_forward) == expected


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 33}, "hidden_size must divide by num_heads, got 33 and 4"),
        ({"hidden_size": 24}, "head dimension that divides by 4, got 6"),
        ({"max_tokens": 15}, "square number of tokens, got max_tokens=15"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"positions": "none"}, "positions must be 'rope2d' or 'learned', got 'none'"),
        ({"num_condition_tokens": 2}, "num_condition_tokens=1"),
        ({"condition": "text"}, "needs caption_dim"),
    ],
)
def test_bad_configuration(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "number of tokens must be 1 to 16, got 0"),
        ({"num_tokens": 17}, "number of tokens must be 1 to 16, got 17"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"guidance_scale": -1.0}, "finite and at least 0, got -1.0"),
        ({"guidance_scale": 2.0, "cfg_interval": -2}, "last must be an integer"),
        ({"guidance_scale": LinearGuidance(2.0), "cfg_interval": 3}, "cfg_interval=3 needs a number"),
        ({"generator": make_generators(1, 2)}, "each of 3 rows, got 2"),
        ({"generator": make_generators(1)[0], "uniforms": UNIFORMS}, "not both"),
        ({"uniforms": UNIFORMS[:, :4]}, r"uniforms must be \(3, 16\), got \(3, 4\)"),
        ({"uniforms": UNIFORMS + 1}, r"uniforms must be in \[0, 1\)"),
        ({"class_labels": [0, 1, 6]}, r"Class labels must be 0 to 5, got 6 at position \(2,\)"),
        ({"class_labels": torch.zeros(0, dtype=torch.int64)}, r"class_labels must be \(batch,\), got \(0,\)"),
        ({"class_labels": None}, "class-conditional: pass class_labels"),
        ({"caption_features": torch.zeros(3, 5, 12)}, "class-conditional: pass class_labels and no caption"),
    ],
)
def test_bad_generation(models: dict[str, LlamaGen], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # at once, not at the first step
        models["class"].iter_generate(**({"class_labels": torch.arange(3)} | arguments))


def test_bad_guidance_object(models: dict[str, LlamaGen]) -> None:
    class Falling(Guidance):
        def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
            return self.target - step

    with pytest.raises(ValueError, match="at least 0, got -1.0 at step 3"):
        models["class"].generate([0], guidance_scale=Falling(2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0]}, "text-conditional: pass caption_features and no class_labels"),
        ({"caption_features": None}, "text-conditional"),
        ({"caption_features": torch.zeros(3, 4, 12)}, r"must be \(batch, 5, 12\), got \(3, 4, 12\)"),
        ({"caption_mask": torch.ones(2, 5)}, r"caption_mask must be \(3, 5\), as the features, got \(2, 5\)"),
    ],
)
def test_bad_caption(models: dict[str, LlamaGen], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models["text"].generate(**(make_condition(models["text"]) | arguments))


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (make_tokens(3, 17), {}, r"token_ids must be \(batch, 1 to 16\), got \(3, 17\)"),
        (torch.full((3, 4), VOCABULARY), {}, r"Token ids must be 0 to 39, got 40 at position \(0, 0\)"),
        (make_tokens(2), {}, "Got 3 conditions for 2 rows"),
        (make_tokens(), {"labels": make_tokens(3, 4)}, r"labels must be \(3, 16\)"),
        (make_tokens(), {"drop_condition": torch.ones(2)}, r"drop_condition must be \(3,\), one per row, got \(2,\)"),
    ],
)
def test_bad_training_input(
    models: dict[str, LlamaGen], tokens: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        models["class"](tokens, torch.arange(3), **arguments)


def test_bad_types(models: dict[str, LlamaGen]) -> None:
    with pytest.raises(TypeError, match="Token ids must be integers, got torch.float32"):
        models["class"](make_tokens().float(), torch.arange(3))
    with pytest.raises(TypeError, match="Class labels must be integers, got torch.float32"):
        models["class"].generate(torch.zeros(2))


def test_bad_use_of_the_state(models: dict[str, LlamaGen]) -> None:
    model, tokens = models["class"], make_tokens()
    state = model.prefill(torch.arange(3), max_new_tokens=4)
    model.forward_block(tokens[:, :3], state)
    with pytest.raises(ValueError, match="room for 1 more tokens, got a block of 2"):
        model.forward_block(tokens[:, :2], state)
    with pytest.raises(ValueError, match=r"token_ids must be \(3, block\), got \(2, 1\)"):
        model.step(tokens[:2, 0], state)
    with pytest.raises(ValueError, match=r"got 99 at position \(1, 0\)"):
        model.step(torch.tensor([0, 99, 0]), state)
    with pytest.raises(ValueError, match="depths must be 0 to 12"):
        model.forward_block(tokens[:, :1], state, depths=torch.tensor([13]))
    with pytest.raises(ValueError, match="lengths from 1 .* to 4, got 5"):
        state.rollback(5)
    with pytest.raises(ValueError, match="lengths from 1 .* to 4, got 0"):
        state.rollback(0)
    with pytest.raises(ValueError, match="last block of 3 positions"):
        state.commit([0, 3])
    assert state.length == 4  # nothing of this changed it


@pytest.mark.parametrize("do_sample", [True, False])
def test_nan_in_logits_raises(do_sample: bool) -> None:
    model = make_model()
    with torch.no_grad():
        model.output.weight[3] = float("nan")
    with pytest.raises(ValueError, match="Token 0: The logits contain NaN or infinity"):
        model.generate([0, 1], do_sample=do_sample)
