"""What the project must know about a decoder family: where its parts are, and how they make the forward pass.

A family is one file of this folder: a concrete subclass of `Family`. Its methods take a model of transformers, or one of
its blocks. The defaults hold for a sequential decoder with a LayerNorm at the end. A family that differs (parallel
attention and MLP, rotary positions, another norm, norms behind attention and MLP) overrides the methods concerned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipelines.compute.cpu_products import product
from pipelines.models.key_values import KeyValues


class Family(ABC):
    """A decoder family, by the `model_type` of its configuration."""

    model_type: ClassVar[str]

    # The model as a whole

    def adjusted(self, config: Any) -> Any:
        """The configuration to load a model with, given the one beside its weights; by default the same."""
        return config

    def n_positions(self, model: nn.Module) -> int:
        """The longest text that the model takes, in tokens."""
        config: Any = model.config
        return int(config.max_position_embeddings)

    def d_model(self, model: nn.Module) -> int:
        """How many numbers the residual stream has at a position."""
        config: Any = model.config
        return int(config.hidden_size)

    def n_heads(self, model: nn.Module) -> int:
        """How many heads a block's attention has."""
        config: Any = model.config
        return int(config.num_attention_heads)

    @abstractmethod
    def n_neurons(self, model: nn.Module) -> int:
        """How many neurons a block's MLP has."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks, in order."""

    # Before the first block

    @abstractmethod
    def token_and_position(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The vectors that token ids (batch, position) put into the stream: (batch, position, d_model) for the tokens and
        (1, position, d_model) for the positions, None where positions are not added to the stream."""

    def embed(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(batch, position) token ids -> (batch, position, d_model), the input of the first block."""
        tokens, positions = self.token_and_position(model, ids)
        return tokens if positions is None else tokens + positions

    # A block

    @abstractmethod
    def attention(self, block: nn.Module) -> nn.Module:
        """The module whose output is attention's contribution to the stream."""

    @abstractmethod
    def heads_together(self, block: nn.Module) -> nn.Module:
        """The module whose input is the heads' outputs side by side (…, n_heads · d_head)."""

    @abstractmethod
    def head_weights(self, model: nn.Module, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_O (n_heads, d_head, d_model) and b_O (d_model,) or None: attention writes Σ z_h W_O,h + b_O."""

    @abstractmethod
    def mlp(self, block: nn.Module) -> nn.Module:
        """The module whose output is the MLP's contribution to the stream."""

    @abstractmethod
    def mlp_norm(self, block: nn.Module) -> nn.Module:
        """The norm through which the MLP reads the stream."""

    @abstractmethod
    def neurons_together(self, block: nn.Module) -> nn.Module:
        """The module whose input is the MLP's neurons after their non-linearity (…, n_neurons)."""

    def attn_from_heads(self, block: nn.Module, heads: Tensor) -> Tensor:
        """The vectors (…, d_model) that attention adds to the stream, given its heads' outputs (…, n_heads · d_head)."""
        written: Tensor = self.heads_together(block)(heads)
        return written

    def mlp_from_neurons(self, block: nn.Module, neurons: Tensor) -> Tensor:
        """The vectors (…, d_model) that the MLP adds to the stream, given its neurons (…, n_neurons)."""
        written: Tensor = self.neurons_together(block)(neurons)
        return written

    def after_block(self, block: nn.Module, before: Tensor, attn_out: Tensor, mlp_out: Tensor | None = None) -> Tensor:
        """The stream (…, d_model) that leaves a block, given the stream that entered and the outputs of attention and MLP.

        Without `mlp_out`, the MLP is run. Sequential: the MLP reads the stream with attention's output already added.
        """
        middle = attn_out + before
        return middle + (self.mlp(block)(self.mlp_norm(block)(middle)) if mlp_out is None else mlp_out)

    def run_block(
        self,
        model: nn.Module,
        layer: int,
        hidden: Tensor,
        mask: Tensor | None,
        place: Tensor,
        keys: KeyValues | None = None,
    ) -> Tensor:
        """The stream (batch, position, d_model) that leaves a block, given the one that enters.

        `mask` is added to attention's scores; None means the kernel's own causal mask. `place` (batch or 1, position) holds
        each position's number in its text. `keys` notes attention's keys and values, or gives those of earlier positions.
        """
        out: Any = self.blocks(model)[layer](
            hidden, attention_mask=mask, use_cache=False, position_ids=place, past_key_values=keys
        )
        return out[0] if isinstance(out, tuple) else out

    def causal_mask(self, model: nn.Module, hidden: Tensor) -> Tensor | None:
        """The mask for `run_block` where the text begins at its first position."""
        from transformers.masking_utils import create_causal_mask

        place = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask: Tensor | None = create_causal_mask(
            config=model.config,  # type: ignore[arg-type]
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=place,
        )
        return mask

    # After the last block

    @abstractmethod
    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm before the unembedding."""

    def final_scale(self, model: nn.Module, stream: Tensor) -> Tensor:
        """(…) float64 divisor of the final norm for a stream (…, d_model): √(variance + ε) for a LayerNorm."""
        norm: Any = self.final_norm(model)
        return (stream.double().var(dim=-1, correction=0) + norm.eps).sqrt()

    def final_linear(self, model: nn.Module, vectors: Tensor) -> Tensor:
        """(…, d_model) float64 output of the final norm at a scale of 1, without its bias: γ ⊙ (v − mean v)."""
        norm: Any = self.final_norm(model)
        vectors = vectors.double()
        scaled: Tensor = norm.weight.double() * (vectors - vectors.mean(dim=-1, keepdim=True))
        return scaled

    def final_bias(self, model: nn.Module) -> Tensor | None:
        """(d_model,) bias of the final norm; None where it has none."""
        bias: Tensor | None = self.final_norm(model).bias  # type: ignore[assignment]
        return bias

    @abstractmethod
    def unembedding(self, model: nn.Module) -> Tensor:
        """(vocabulary, d_model) W_U: logits are the final norm's output times its transpose, plus the head's bias."""

    def head_bias(self, model: nn.Module) -> Tensor | None:
        """(vocabulary,) bias of the head; None where it has none."""
        return None

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """(…, d_model) after the last block -> (…, vocabulary)."""
        without_bias = product(self.final_norm(model)(hidden), self.unembedding(model))
        bias = self.head_bias(model)
        return without_bias if bias is None else without_bias + bias
