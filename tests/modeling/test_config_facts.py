"""Facts that families store under different keys, and the counts that depend on them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from cfsp_framework.benchmark.roofline import count_costs
from cfsp_framework.estimate.model_shape import measure_shape
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.config_facts import attention_heads, context_length, experts_per_token, head_size
from cfsp_framework.modeling.decoder import open_decoder
from cfsp_framework.modeling.meta_init import without_weights
from cfsp_framework.modeling.size import count_products, measure_size
from helpers import families
from helpers.families import FAMILIES, MIXTURES, PRUNED

KNOWN = [name for name in PRUNED if FAMILIES[name].known]


def on_meta(name: str) -> PreTrainedModel:
    with without_weights():
        return families.build(name)


@pytest.mark.parametrize("name", KNOWN)
def test_facts_of_every_family_are_read(name: str) -> None:
    config = families.config_of(name)
    assert experts_per_token(config) == max(FAMILIES[name].routed, 1)
    assert (attention_heads(config), head_size(config)) == (4, 8)
    assert context_length(config) == 128


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("hunyuan_v1_moe", {"moe_topk": 3}, 3),
        ("hunyuan_v1_moe", {"moe_topk": [1, 4, 2]}, 4),
        ("longcat_flash", {"moe_topk": 5}, 5),
        ("ernie4_5_moe", {"moe_k": 6}, 6),
        ("llama", {"top_k": 50}, 1),  # how many tokens to sample from, in old configurations
    ],
)
def test_experts_per_token_have_many_names(model_type: str, settings: dict[str, Any], expected: int) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {model_type}")
    assert experts_per_token(AutoConfig.for_model(model_type, **settings)) == expected


@pytest.mark.parametrize("name", [name for name in MIXTURES if FAMILIES[name].known])
def test_size_roofline_and_estimate_count_the_same_experts(name: str) -> None:
    model = on_meta(name)
    routed = FAMILIES[name].routed
    count = next(
        len(module.paths)
        for index in range(model.config.num_hidden_layers)
        for module in open_decoder(model, load_plugins()).feed_forward_modules(index)
        if module.experts
    )
    products, costs, shape = count_products(model), count_costs(model), measure_shape(model)
    assert products.expert_share == costs.expert_share == routed / count
    assert (shape.experts, shape.experts_per_token) == (count, routed)
    assert measure_size(model).flops_per_token == 2 * (costs.products + costs.head)
