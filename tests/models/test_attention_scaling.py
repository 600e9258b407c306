"""What a configuration says of attention is what the model computes."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.mark.parametrize("scaling", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2s_attention_scaling_holds_under_every_implementation(scaling: dict[str, bool]) -> None:
    """transformers 5.0 to 5.3 left the scaling out under SDPA, its default: rows of a model with it were wrong."""
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=2, initializer_range=0.5, **scaling)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        expected = model(ids).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
