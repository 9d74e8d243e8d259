"""Drafters, one file each: where the candidates that a target model verifies come from."""

from __future__ import annotations

DRAFTERS: dict[str, str] = {
    "prompt_lookup": "mmsdk.decoding.drafters.prompt_lookup:PromptLookup",
    "token_recycling": "mmsdk.decoding.drafters.token_recycling:TokenRecycling",
    "aded": "mmsdk.decoding.drafters.aded:ADED",
    "dyspec": "mmsdk.decoding.drafters.dyspec:DySpec",
    "draft_model": "mmsdk.decoding.drafters.draft_model:DraftModel",
}
