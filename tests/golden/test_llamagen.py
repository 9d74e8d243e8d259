"""LlamaGen's transformer against recorded outputs of the published code (the `vq` case is the tokenizer's)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generators.base import Trace
from generators.llamagen import LlamaGen, rotary_table
from mmsdk.decoding.sampling import process_logits
from tests.golden.util import (
    assert_manifest,
    golden_cases,
    golden_index,
    golden_manifests,
    load_json,
    load_tensors,
    select_cases,
)


def kind(name: str, case: dict[str, Any]) -> str:
    """Return what a case checks, by what it holds; a case that nothing checks fails the collection."""
    if "max_new_tokens" in case:
        return "generate"
    config = case.get("config", {})
    if config.get("model_type") in ("c2i", "t2i"):
        return "forward"
    if "z_channels" in config:
        return "tokenizer"  # checked with the tokenizers
    raise LookupError(f"Do not know how to check the golden case {name!r}.")


CASES = golden_cases("llamagen")
FORWARD = select_cases(CASES, lambda name, case: kind(name, case) == "forward")
GENERATE = select_cases(CASES, lambda name, case: kind(name, case) == "generate")


def load_model(case: dict[str, Any]) -> LlamaGen:
    """Load the weights of a case; the configuration stands in the forward case that has the same ones."""
    cases = golden_index("llamagen")["cases"].values()
    config = next(c["config"] for c in cases if "config" in c and c["weights"] == case["weights"])
    return LlamaGen.from_original(load_tensors("llamagen", case["weights"]), config)


@pytest.mark.parametrize(("name", "case"), FORWARD)
def test_forward(name: str, case: dict[str, Any]) -> None:
    model, golden = load_model(case), load_tensors("llamagen", case["file"])
    if case["config"]["model_type"] == "c2i":
        condition = {"class_labels": golden["labels"]}
        head_dim = case["config"]["dim"] // case["config"]["n_head"]
        grid_size, condition_tokens = round(case["config"]["block_size"] ** 0.5), case["config"]["cls_token_num"]
        table = torch.view_as_real(rotary_table(grid_size, head_dim, num_condition_tokens=condition_tokens))
        torch.testing.assert_close(table, golden["freqs_cis"], atol=1e-6, rtol=0)
    else:
        condition = {"caption_features": golden["cond"], "caption_mask": golden["emb_masks"]}
        torch.testing.assert_close(model.embed_condition(**condition), golden["cap_proj"], atol=1e-4, rtol=0)
        mask = model.build_attention_mask(golden["emb_masks"], golden["attention_mask"].shape[-1])
        assert torch.equal(mask, golden["attention_mask"])
    output = model(golden["tokens"], labels=golden["tokens"], **condition)
    torch.testing.assert_close(output.logits, golden["train_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, golden["train_loss"], atol=1e-4, rtol=0)
    if "attention_mask" in golden:
        given = model(golden["tokens"], attention_mask=golden["attention_mask"], **condition)
        assert torch.equal(given.logits, output.logits)


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_generate(name: str, case: dict[str, Any]) -> None:
    model, golden, args = load_model(case), load_tensors("llamagen", case["file"]), dict(case["args"])
    condition = {"class_labels": golden["cond"]}
    if model.config.condition == "text":
        condition = {"caption_features": golden["cond"]}
        assert case["uses_emb_masks"] == ("emb_masks" in golden)
        if "emb_masks" in golden:
            condition["caption_mask"] = golden["emb_masks"]
    sampling = {key: args.pop(key) for key in ("temperature", "top_k", "top_p") if key in args}
    trace = Trace(keep_logits=True)
    output = model.generate(
        **condition,
        num_tokens=case["max_new_tokens"],
        guidance_scale=args.pop("cfg_scale"),
        cfg_interval=args.pop("cfg_interval", -1),
        do_sample=args.pop("sample_logits", True),
        uniforms=golden.get("uniforms"),
        trace=trace,
        **sampling,
    )
    assert not args, f"arguments of the case that this test does not know: {args}"
    logits = torch.stack(trace.logits, dim=1)
    torch.testing.assert_close(logits, golden["guided_logits"], atol=1e-4, rtol=0)
    assert torch.equal(output.token_ids, golden["tokens"])
    if "filtered_probs" in golden:
        probs = torch.softmax(process_logits(logits, **sampling), -1)
        torch.testing.assert_close(probs, golden["filtered_probs"], atol=1e-4, rtol=0)
        assert torch.equal(probs > 0, golden["filtered_probs"] > 0)
        # The recorded logits alone, so that the filters are checked apart from the model.
        probs = torch.softmax(process_logits(golden["guided_logits"], **sampling), -1)
        torch.testing.assert_close(probs, golden["filtered_probs"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", [*golden_manifests("llamagen", "c2i"), *golden_manifests("llamagen", "t2i")])
def test_manifest(variant: str) -> None:
    config = load_json("llamagen", f"config_{variant}.json")
    with torch.device("meta"):
        model = LlamaGen.preset(
            config["model"].removeprefix("GPT-"),
            image_size=16 * round(config["block_size"] ** 0.5),
            condition={"c2i": "class", "t2i": "text"}[config["model_type"]],
        )
    assert_manifest(model, load_json("llamagen", f"state_dict_{variant}.json"))
    assert sum(p.numel() for p in model.parameters()) == config["num_parameters"]
    assert model.layers[0].feed_forward.w1.out_features == config["ffn_hidden"]
    ours = {"max_tokens": "block_size", "num_layers": "n_layer", "num_heads": "n_head", "codebook_size": "vocab_size"}
    ours |= {"num_condition_tokens": "cls_token_num", "rope_base": "rope_base", "norm_eps": "norm_eps"}
    assert {name: model.config[name] for name in ours} == {name: config[key] for name, key in ours.items()}
