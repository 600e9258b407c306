"""GPT-2: sequential blocks, learnt positions, LayerNorms, Conv1D weights (in, out), no bias in the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipelines.models.families.family import Family


class Gpt2(Family):
    """`gpt2` of transformers."""

    model_type = "gpt2"

    def adjusted(self, config: Any) -> Any:
        """PyTorch's own tanh-GELU replaces the composed one: relative difference 4e-7, 1.3x the speed."""
        if config.activation_function == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        return config

    def n_neurons(self, model: nn.Module) -> int:
        config: Any = model.config
        return int(config.n_inner or 4 * config.n_embd)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        blocks: nn.ModuleList = model.transformer.h  # type: ignore[union-attr, assignment]
        return blocks

    def token_and_position(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        body: Any = model.transformer
        return body.wte(ids), body.wpe(torch.arange(ids.shape[1], device=ids.device)[None])

    def attention(self, block: nn.Module) -> nn.Module:
        return _part(block, "attn")

    def heads_together(self, block: nn.Module) -> nn.Module:
        return _part(block, "attn.c_proj")

    def head_weights(self, model: nn.Module, layer: int) -> tuple[Tensor, Tensor | None]:
        joined: Any = self.heads_together(self.blocks(model)[layer])
        return joined.weight.reshape(self.n_heads(model), -1, joined.weight.shape[1]), joined.bias

    def mlp(self, block: nn.Module) -> nn.Module:
        return _part(block, "mlp")

    def mlp_norm(self, block: nn.Module) -> nn.Module:
        return _part(block, "ln_2")

    def neurons_together(self, block: nn.Module) -> nn.Module:
        return _part(block, "mlp.c_proj")

    def final_norm(self, model: nn.Module) -> nn.Module:
        return _part(model, "transformer.ln_f")

    def unembedding(self, model: nn.Module) -> Tensor:
        weight: Tensor = _part(model, "lm_head").weight  # type: ignore[assignment]
        return weight


def _part(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)
