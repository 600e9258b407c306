"""In: one run of a text, a position. Out: its logits there as a sum over everything that wrote to the residual stream.

The final LayerNorm is LN(x) = γ ⊙ (x − mean x) / σ(x) + β. With σ frozen to the value it has in this run, LN is linear in
x up to β, so that a part p of x = Σ p adds exactly W_U · (γ ⊙ (p − mean p)) / σ to the logits, and β adds W_U · β
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020 for the logit lens).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.causal.engine.trace import Trace, trace
from pipelines.models.families.registry import family_of
from pipelines.models.forward import logits, unembedding
from pipelines.models.sites.registry import kind_of
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae

EMBEDDING, ATTENTION, MLP = "embedding", "attention", "mlp"
"""What writes to the residual stream."""
BIAS = "final_norm_bias"
HEAD_BIAS = "head_bias"


@dataclass(frozen=True)
class Parts:
    """The parts that sum to the residual stream before the final norm, at one position.

    `names` (n,); `writers` (n,): what wrote a part, `embedding`, `attention` or `mlp`, or what an SAE reads of them;
    `layers` (n,): the block that wrote a part, -1 for the embeddings; `vectors` (n, d_model) float64. A head's part is
    z_h W_O,h; an attention's bias b_O is a part of its own; an MLP's part holds its output bias.
    """

    names: tuple[str, ...]
    writers: tuple[str, ...]
    layers: tuple[int, ...]
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Attribution:
    """A logit, or a difference of two, as a sum: `shares` (n,) float64 of the parts in `names`; `logit` as the model has
    it. `deviation` is |Σ shares − logit| over Σ |shares|, None where the shares are not meant to sum to the logit."""

    names: tuple[str, ...]
    shares: Tensor
    logit: float
    deviation: float | None


def direct_logit_attribution(
    model: nn.Module,
    ids: Tensor,
    target: int,
    against: int | None = None,
    position: int = -1,
    *,
    by_head: bool = True,
    centred: bool = True,
    final_norm: bool = True,
) -> Attribution:
    """`attribute_logit` of token ids (position,), start token included: runs the model once."""
    run = trace(model, ids)
    parts = stream_parts(model, run, require_position(run, position), by_head=by_head)
    return attribute_logit(model, run, parts, target, against, position, centred=centred, final_norm=final_norm)


@torch.no_grad()
def stream_parts(model: nn.Module, run: Trace, position: int = -1, *, by_head: bool = True) -> Parts:
    """Token and position embedding, every head and attention bias (or every attention whole), every MLP."""
    family = family_of(model)
    tokens, places = family.token_and_position(model, run.ids[None])
    parts = [("embed", EMBEDDING, -1, tokens[0, position])]
    if places is not None:
        parts.append(("position", EMBEDDING, -1, places[0, position]))
    for layer in range(len(family.blocks(model))):
        if by_head:
            weights, bias = family.head_weights(model, layer)
            z = run.at(Site("head_out", layer))[position].reshape(len(weights), -1).double()
            written = torch.einsum("hi,hid->hd", z, weights.double())
            parts += [(f"L{layer}H{head}", ATTENTION, layer, vector) for head, vector in enumerate(written)]
            if bias is not None:
                parts.append((f"attn_bias.{layer}", ATTENTION, layer, bias))
        else:
            parts.append((f"attn.{layer}", ATTENTION, layer, run.at(Site("attn_out", layer))[position]))
        parts.append((f"mlp.{layer}", MLP, layer, run.at(Site("mlp_out", layer))[position]))
    return _parts(parts)


@torch.no_grad()
def feature_parts(model: nn.Module, run: Trace, site: Site, sae: Sae, position: int = -1, *, by_head: bool = True) -> Parts:
    """The same parts, but what the SAE reads is split into its features instead.

    x = Σ code_f · W_dec,f + b_dec + error, a part for each active feature, one for b_dec and one for the error. At a
    residual site x is everything written before the site; at `attn_out` or `mlp_out`, that layer's attention or MLP. Raises
    InputError for a site whose values are no directions of the stream.
    """
    kind = kind_of(site.name)
    if not kind.in_stream_basis:
        raise InputError(
            f"site {site.label}: {kind.values_are} are not what was written to the stream, of which a logit is the sum; "
            "take a run on a site of the stream, of attention's or of the MLP's output."
        )
    x = run.at(site)[position]
    values, indices = sae.encode(x[None].float())
    active = [(f, v) for f, v in zip(indices[0].tolist(), values[0].double(), strict=True) if v > 0]
    pieces = [(f"feature {f}", site.name, site.layer, v * sae.W_dec[f].double()) for f, v in active]
    pieces.append(("sae_bias", site.name, site.layer, sae.b_dec.double()))
    error = x.double() - torch.stack([vector for *_, vector in pieces]).sum(dim=0)
    pieces.append(("sae_error", site.name, site.layer, error))
    parts = stream_parts(model, run, position, by_head=by_head)
    kept = [
        (name, writer, layer, vector)
        for name, writer, layer, vector in zip(parts.names, parts.writers, parts.layers, parts.vectors, strict=True)
        if not kind.holds(writer, layer, site.layer)
    ]
    return _parts([*pieces, *kept])


def logit_direction(model: nn.Module, target: int, against: int | None = None, *, centred: bool = True) -> Tensor:
    """(d_model,) float64 that the final norm's output is multiplied by: W_U[target], less the vocabulary's mean row
    (`centred`: the logit then says how far it is above the mean one), or less W_U[against]."""
    weight = unembedding(model)
    direction = weight[target].double()
    if against is not None:
        return direction - weight[against].double()
    return direction - weight.double().mean(dim=0) if centred else direction


@torch.no_grad()
def normed(model: nn.Module, run: Trace, parts: Parts, position: int = -1) -> Parts:
    """The parts as the final norm passes them on, γ ⊙ (p − mean p) / σ with this run's σ, and its bias β as the last one."""
    family = family_of(model)
    vectors = family.final_linear(model, parts.vectors) / family.final_scale(model, run.streams[-1, position])
    bias = family.final_bias(model)
    if bias is None:
        return replace(parts, vectors=vectors)
    return Parts(
        (*parts.names, BIAS),
        (*parts.writers, BIAS),
        (*parts.layers, len(family.blocks(model))),
        torch.cat([vectors, bias.double()[None]]),
    )


@torch.no_grad()
def attribute_logit(
    model: nn.Module,
    run: Trace,
    parts: Parts,
    target: int,
    against: int | None = None,
    position: int = -1,
    *,
    centred: bool = True,
    final_norm: bool = True,
) -> Attribution:
    """Each part's share of a token's logit, or of its difference to another token's.

    `centred`: from the logit the mean over the vocabulary is subtracted. Without `final_norm` the parts are multiplied with
    W_U as they are, as teaching code does: their sum is not the logit, and neither order nor signs need be right. Where the
    head has a bias, its share is the last one.
    """
    direction = logit_direction(model, target, against, centred=centred)
    choice = _choice(model, target, against, centred=centred)
    own = normed(model, run, parts, position) if final_norm else parts
    names, shares = own.names, own.vectors @ direction
    head_bias = family_of(model).head_bias(model)
    if head_bias is not None and final_norm:
        names, shares = (*names, HEAD_BIAS), torch.cat([shares, (head_bias.double() @ choice)[None]])
    logit = float(_logits(model, run, position) @ choice)
    deviation = float((shares.sum() - logit).abs() / shares.abs().sum().clamp_min(1e-300)) if final_norm else None
    return Attribution(names, shares, logit, deviation)


@torch.no_grad()
def top_movers(
    model: nn.Module, run: Trace, parts: Parts, k: int, position: int = -1
) -> list[tuple[str, list[tuple[int, float]], list[tuple[int, float]]]]:
    """For each part, and for the final norm's bias: the k tokens whose vocabulary-centred logit the part raises most, and
    lowers most, each with the change."""
    own = normed(model, run, parts, position)
    weight = unembedding(model).double()
    movers = []
    for name, vector in zip(own.names, own.vectors, strict=True):
        moved = weight @ vector
        moved = moved - moved.mean()
        up, down = moved.topk(k), (-moved).topk(k)
        movers.append(
            (
                name,
                list(zip(up.indices.tolist(), up.values.tolist(), strict=True)),
                list(zip(down.indices.tolist(), (-down.values).tolist(), strict=True)),
            )
        )
    return movers


def require_position(run: Trace, position: int) -> int:
    """A position from 0; negative ones count from the end. Raises InputError for one the text has not."""
    if not -len(run) <= position < len(run):
        raise InputError(
            f"position {position}: the text has {len(run)} tokens; choose 0 to {len(run) - 1}, or -1 for the last."
        )
    return position % len(run)


def only_layers(parts: Parts) -> Parts:
    """The parts of attentions and MLPs alone, without embeddings: what the textbook's form shows."""
    chosen = [i for i, layer in enumerate(parts.layers) if layer >= 0]
    return replace(
        parts,
        names=tuple(parts.names[i] for i in chosen),
        writers=tuple(parts.writers[i] for i in chosen),
        layers=tuple(parts.layers[i] for i in chosen),
        vectors=parts.vectors[chosen],
    )


def _logits(model: nn.Module, run: Trace, position: int) -> Tensor:
    stream = run.streams[-1, position]
    return logits(model, stream).double()


def _choice(model: nn.Module, target: int, against: int | None, *, centred: bool) -> Tensor:
    """(vocabulary,) what logits are multiplied by to give what is attributed."""
    chosen = torch.zeros(len(unembedding(model)), dtype=torch.float64, device=unembedding(model).device)
    if against is not None:
        chosen[against] -= 1
    elif centred:
        chosen -= 1 / len(chosen)
    chosen[target] += 1
    return chosen


def _parts(written: list[tuple[str, str, int, Tensor]]) -> Parts:
    names, writers, layers, vectors = zip(*written, strict=True)
    return Parts(names, writers, layers, torch.stack([vector.double() for vector in vectors]))
