"""The textbook's three experiments on a model and token ids, over the exact ones: attribute, patch, ablate.

In: a loaded GPT-2, token ids or a text. Out: plain values, and printed lines. There is no start token unless it is among
the ids, and every position is a row, the first one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.causal.ablate.feature_edits import Edit, ablate, read_prompt
from pipelines.causal.attribute.logit_parts import direct_logit_attribution as attributed
from pipelines.causal.engine.candidates import top_candidates
from pipelines.causal.engine.language_model import LanguageModel, Spliced
from pipelines.causal.engine.trace import trace
from pipelines.causal.patch.patch_grid import Pair, patch_activation, run_logits
from pipelines.models.families.registry import family_of
from pipelines.models.forward import unembedding
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord
from pipelines.sae.textbook import SparseAutoencoder
from pipelines.shared.visible_text import say, visible
from pipelines.text.tokenizer_files import codec_of

COMPONENTS = {"attn": "attn_out", "mlp": "mlp_out"}
"""The textbook's names of what can be patched, and our sites."""
SITE = "resid_post"
TOP = 5


class Ablated(NamedTuple):
    """The next tokens (text, probability), normally and with the feature at zero, and divergences in nats.

    `kl` is KL(normal ‖ ablated). Where the reconstruction is spliced in, `kl_reconstruction` is what that alone does,
    KL(normal ‖ reconstruction), and `kl_feature` what the feature does on top, KL(reconstruction ‖ ablated); else None.
    """

    normal: list[tuple[str, float]]
    ablated: list[tuple[str, float]]
    kl: float
    kl_reconstruction: float | None
    kl_feature: float | None


def direct_logit_attribution(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    target_token_id: int,
    *,
    final_norm: bool = True,
    centred: bool = False,
) -> dict[str, float]:
    """What each `attn_i` and `mlp_i` adds to the target's logit at the last position, printed and given by falling value.

    Through the final LayerNorm with this run's scale, so that together with the embeddings and the norm's bias, which are
    printed below, the parts sum to the model's logit. `centred` takes the mean logit of the vocabulary off, which moves no
    probability. Without `final_norm` it is the textbook's form, outputs projected on the unembedding as they are: their
    sum is not the logit, and order and signs may be wrong. Heads apart, logit differences, SAE features: `attribute`.
    Raises InputError for ids or a token that the model has not.
    """
    ids = _ids(model, input_ids, "input_ids")
    _require_token(model, target_token_id)
    attribution = attributed(model, ids, target_token_id, by_head=False, centred=centred, final_norm=final_norm)
    shares = dict(zip(attribution.names, attribution.shares.tolist(), strict=True))
    parts = {name.replace(".", "_"): shares.pop(name) for name in attribution.names if name.startswith(("attn.", "mlp."))}
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    say(f"logit of token {target_token_id}{' above the mean one' if centred else ''}: {attribution.logit:.3f}")
    for name, share in parts.items():
        say(f"  {name:<8} {share:>+9.3f}")
    if final_norm:
        others = "  ".join(f"{name} {share:+.3f}" for name, share in shares.items())
        say(f"  {others}  sum of all {attribution.shares.sum():.3f}")
    else:
        say(f"  without the final norm: with the embeddings these sum to {attribution.shares.sum():.3f}")
    return parts


def activation_patching(
    model: nn.Module,
    clean_input: Tensor | Mapping[str, Tensor],
    corrupt_input: Tensor | Mapping[str, Tensor],
    component_name: str,
    layer_idx: int,
) -> dict[str, Tensor]:
    """`clean_logits`, `corrupt_logits` and `patched_logits` (vocabulary,) at the last position.

    Patched is the corrupt run with the clean run's output of `attn` or `mlp` of a block, at every position (denoising).
    The inputs are token ids (position,) or (1, position), or what a tokenizer gives. Raises InputError when they differ
    in length, and for a component or layer that is not there. Grids over layers and positions, and effects: `patch`.
    """
    if component_name not in COMPONENTS:
        raise InputError(f"component_name {component_name!r}: choose one of {', '.join(COMPONENTS)}.")
    pair = Pair(
        trace(model, _ids(model, clean_input, "clean_input")), trace(model, _ids(model, corrupt_input, "corrupt_input"))
    )
    with torch.no_grad():
        return {
            "clean_logits": run_logits(model, pair.clean),
            "corrupt_logits": run_logits(model, pair.corrupt),
            "patched_logits": patch_activation(model, pair, Site(COMPONENTS[component_name], layer_idx)),
        }


def ablate_feature(
    model: nn.Module,
    sae: SparseAutoencoder | Sae,
    tokenizer: Any,
    text: str,
    feature_idx: int,
    layer: int = 6,
    *,
    keep_error: bool = False,
) -> Ablated:
    """The five most probable next tokens before and after a feature's code is set to zero at every token of a text.

    As in the textbook, the stream after block `layer` is replaced by the SAE's reconstruction without the feature, so
    that KL(normal ‖ ablated) holds the SAE's own error as well; the two other divergences tell them apart. With
    `keep_error` the stream keeps what the SAE does not explain, and only the feature changes: the default of `ablate`.
    Raises InputError for a feature or layer that is not there, and a text without a token or too long for the model.
    """
    require_family(model)
    sparse = sae.to_sae() if isinstance(sae, SparseAutoencoder) else sae
    width = unembedding(model).shape[1]
    if sparse.d_model != width:
        raise InputError(f"sae: has d_model {sparse.d_model}, the model {width}; pass one trained on this model's rows.")
    device = str(next(model.parameters()).device)
    lm = LanguageModel("given", model, codec_of(tokenizer), bos=False, keep_special=True, device=device)
    record = record_of(sparse, layer)
    spliced = Spliced(lm, sparse.to(device), Site(SITE, layer), record)
    read = read_prompt(spliced, lm.prompt(text), [feature_idx])
    edit = Edit.of(feature_idx, read.fires_at(feature_idx))
    ablations = ablate(read, [edit], "keep" if keep_error else "drop")
    normal, ablated = (
        [(candidate.text, candidate.probability) for candidate in top_candidates(read.logits(hidden), lm.codec, TOP)]
        for hidden in (read.normal[-1], ablations.hidden[0])
    )
    own, rest = ablations.normal_reconstruction, ablations.reconstruction_ablated
    result = Ablated(
        normal,
        ablated,
        float(ablations.normal_ablated[0, -1]),
        None if own is None else float(own[-1]),
        None if rest is None else float(rest[0, -1]),
    )
    _print_ablated(text, feature_idx, len(edit.positions), len(read.prompt), result)
    return result


def require_family(model: nn.Module) -> nn.Module:
    """Raises InputError for a model whose parts are not known, or in training mode."""
    family_of(model)
    if model.training:
        raise InputError("model: is in training mode, in which dropout changes every run; call model.eval() first.")
    return model


def record_of(sae: Sae, layer: int, **known: Any) -> RunRecord:
    """The record of an SAE of rows without start token after block `layer`; what is not `known` is left empty."""
    return RunRecord(
        **{
            "architecture": sae.architecture,
            "d_model": sae.d_model,
            "n_features": sae.n_features,
            "k": sae.k,
            "code_width": sae.code_width or sae.n_features,
            "site": Site(SITE, layer).label,
            "store_id": "",
            "snapshot": "",
            "weights_sha256": "",
            "model": "",
            "bos": False,
            "input_scale": 1.0,
            "rows_seen": 0,
            "history": [[0, 1]],
            "config": {},
            "metrics": {},
            **known,
        }
    )


def _print_ablated(text: str, feature: int, n_fires: int, n_tokens: int, ablated: Ablated) -> None:
    say(f"feature {feature} set to 0 in {visible(text)!r}; it fires at {n_fires} of {n_tokens} tokens")
    for name, tokens in (("normal", ablated.normal), ("ablated", ablated.ablated)):
        say(f"  {name:<8}" + "  ".join(f"{visible(token)!r} {probability:.3f}" for token, probability in tokens))
    beside = ""
    if ablated.kl_reconstruction is not None:
        beside = f"   (reconstruction alone {ablated.kl_reconstruction:.4f}, feature on top {ablated.kl_feature:.4f})"
    say(f"  KL(normal ‖ ablated) {ablated.kl:.4f} nat{beside}")


def _ids(model: nn.Module, given: Tensor | Mapping[str, Tensor], name: str) -> Tensor:
    """(position,) token ids on the model's device. Raises InputError for several texts, none, or ids not the model's."""
    require_family(model)
    ids = given["input_ids"] if isinstance(given, Mapping) else given
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not len(ids):
        raise InputError(f"{name}: have shape {tuple(ids.shape)}; pass the token ids of one text, at least one.")
    limit = family_of(model).n_positions(model)
    if len(ids) > limit:
        raise InputError(f"{name}: {len(ids)} tokens, the model has {limit} positions; shorten the text.")
    for token in (int(ids.min()), int(ids.max())):
        _require_token(model, token)
    return ids.to(next(model.parameters()).device)


def _require_token(model: nn.Module, token: int) -> None:
    n_vocabulary = len(unembedding(model))
    if not 0 <= token < n_vocabulary:
        raise InputError(f"token {token}: the model's vocabulary has {n_vocabulary:,}; choose 0 to {n_vocabulary - 1:,}.")
