"""Observed outputs are those of the feed-forward, also where the block adds to them in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cfsp_framework.engine.measure import observed_feed_forwards
from cfsp_framework.engine.replay import embed, run_block
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.decoder import open_decoder
from cfsp_framework.testing.models import random_model

SETTINGS: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("parallel", [True, False])
def test_a_parallel_block_does_not_change_what_was_observed(parallel: bool) -> None:
    config = AutoConfig.for_model("falcon", **SETTINGS, parallel_attn=parallel, ffn_hidden_size=48)
    decoder = open_decoder(random_model(config, 0.15), load_plugins())
    (batch,) = embed(decoder, torch.arange(24).view(2, 12))
    with torch.no_grad(), observed_feed_forwards(decoder, 0) as observed:
        run_block(decoder, 0, batch)
    [(_, io)] = observed
    (feed_forward,) = decoder.feed_forwards(0)
    torch.testing.assert_close(io.outputs, io.activations @ feed_forward.down.mT, rtol=1e-4, atol=1e-5)
