"""Names of the cache of transformers' models."""

import inspect

import pytest
from transformers import DynamicCache, LlamaForCausalLM

from mmsdk.caching import CACHE, OLD_NAME, cache_of, with_cache


def test_the_name_is_that_of_the_installed_models() -> None:
    assert CACHE in inspect.signature(LlamaForCausalLM.forward).parameters


@pytest.mark.parametrize("name", [CACHE, OLD_NAME])
def test_found_and_replaced_under_either_name(name: str) -> None:
    old, new = DynamicCache(), DynamicCache()
    inputs = {"input_ids": 1, name: old}
    assert cache_of(inputs) is old
    assert with_cache(inputs, new) == {"input_ids": 1, CACHE: new}
    assert inputs == {"input_ids": 1, name: old}


def test_none_where_there_is_none() -> None:
    assert cache_of({"input_ids": 1}) is None
    assert cache_of({CACHE: None}) is None
