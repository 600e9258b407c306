"""A tiny GPT-2 in which one head, reading one direction, carries the answer: what patching has to find.

Token `CLEAN` writes 4 into channel 0 and token `CORRUPT` does not. Head 2 of block 1 attends to all positions alike, reads
channel 0 and writes it at the last position, where it raises the logit of `CLEAN` (embedding and unembedding are tied).
Embeddings are 25 times GPT-2's random ones, the other weights as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines.sae.architectures.topk import TopKSae

CLEAN, CORRUPT, PLACE, N_POSITIONS = 5, 6, 2, 7
LAYER, HEAD, CHANNEL, FEATURE = 1, 2, 0, 3


def planted_model() -> GPT2LMHeadModel:
    """The model, in float64."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().double().requires_grad_(False)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        embedding.weight *= 25
        embedding.weight[:, CHANNEL] = 0
    model.transformer.wte.weight[CLEAN, CHANNEL] = 4
    attention, first = model.transformer.h[LAYER].attn, HEAD * 8
    attention.c_attn.weight[CHANNEL, 64 + first] = 2
    attention.c_proj.weight[first, CHANNEL] = 2
    return model


def clean_and_corrupt() -> tuple[Tensor, Tensor]:
    """Two texts that differ at `PLACE` alone."""
    clean = torch.tensor([0, 9, CLEAN, 11, 12, 13, 14])
    corrupt = clean.clone()
    corrupt[PLACE] = CORRUPT
    return clean, corrupt


def planted_sae() -> TopKSae:
    """An SAE of `resid_post.0` with 8 features, 2 active: feature `FEATURE` is channel 0, the others random directions."""
    sae = TopKSae(32, 8, 2, seed=1)
    with torch.no_grad():
        sae.W_dec[FEATURE] = torch.nn.functional.one_hot(torch.tensor(CHANNEL), 32)
        sae.W_enc.copy_(sae.W_dec)
    return sae
