"""In: a text, a model, perhaps a run. Out: which parts of the model make the logit of a token, and how far they add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from pipelines.causal.attribute.logit_parts import (
    Parts,
    attribute_logit,
    feature_parts,
    require_position,
    stream_parts,
    top_movers,
)
from pipelines.causal.engine.language_model import LanguageModel, Prompt, Spliced, open_either
from pipelines.causal.engine.trace import Trace, trace
from pipelines.causal.patch.patch_grid import run_logits
from pipelines.metrics.divergence import probabilities
from pipelines.models.capture import require_patched
from pipelines.shared.visible_text import visible


@dataclass(frozen=True)
class AttributeConfig:
    """What `attribute` is asked for; the names are the command's options."""

    text: str
    run: Path | None = None
    store: str | None = None
    model: str | None = None
    target: str | None = None
    against: str | None = None
    position: int = -1
    by: str = "head"
    top: int = 12
    movers: int = 0
    raw: bool = False
    final_norm: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.top < 1 or self.movers < 0:
            raise InputError(f"top {self.top}, movers {self.movers}: need at least 1 and 0.")
        if self.by not in ("head", "layer"):
            raise InputError(f"by {self.by!r}: known are head and layer.")
        if self.movers and not self.final_norm:
            raise InputError("movers: are computed through the final LayerNorm; leave --no-final-norm out.")


def attribute(config: AttributeConfig) -> dict[str, Any]:
    """Run the text once, split the residual stream at a position, and give each part's share of the target's logit.

    With a run, what its SAE reads is split into its active features, its bias and its error. The default target is the
    model's most likely token. Raises InputError for a text, token, position, run or model that cannot be used."""
    lm, spliced = open_either(config.run, config.store, config.model, config.device)
    if spliced is not None:
        require_patched(lm.model, spliced.site)
    prompt = lm.prompt(config.text)
    run = trace(lm.model, prompt.ids)
    return _attributed(config, lm, spliced, prompt, run, require_position(run, config.position))


def _attributed(
    config: AttributeConfig, lm: LanguageModel, spliced: Spliced | None, prompt: Prompt, run: Trace, position: int
) -> dict[str, Any]:
    scores = run_logits(lm.model, run, position)
    target = int(scores.argmax()) if config.target is None else lm.token(config.target)
    against = None if config.against is None else lm.token(config.against)
    parts = _parts(config, lm, spliced, prompt, run, position)
    attribution = attribute_logit(
        lm.model, run, parts, target, against, position, centred=not config.raw, final_norm=config.final_norm
    )
    order = attribution.shares.abs().argsort(descending=True).tolist()
    text = lm.codec.token_text
    movers = {}
    if config.movers:
        movers = {
            name: {"raises": [[text(i), v] for i, v in up], "lowers": [[text(i), v] for i, v in down]}
            for name, up, down in top_movers(lm.model, run, parts, config.movers, position)
        }
    return {
        "model": lm.name,
        "run_id": spliced.record.run_id if spliced else None,
        "site": spliced.site.label if spliced else None,
        "tokens": list(prompt.texts),
        "position": position,
        "target": text(target),
        "against": None if against is None else text(against),
        "centred": against is None and not config.raw,
        "final_norm": config.final_norm,
        "probability": float(probabilities(scores)[target]),
        "rank": int((scores > scores[target]).sum()) + 1,
        "logit": attribution.logit,
        "sum": float(attribution.shares.sum()),
        "deviation": attribution.deviation,
        "top": config.top,
        "parts": [
            {"name": attribution.names[i], "share": float(attribution.shares[i]), **movers.get(attribution.names[i], {})}
            for i in order
        ],
    }


def _parts(
    config: AttributeConfig, lm: LanguageModel, spliced: Spliced | None, prompt: Prompt, run: Trace, position: int
) -> Parts:
    by_head = config.by == "head"
    if spliced is None:
        return stream_parts(lm.model, run, position, by_head=by_head)
    if not prompt.kept[position]:
        raise InputError(
            f"position {position} ({prompt.texts[position]!r}): is no row in the run's store, so its SAE does not read it; "
            "choose another position, or leave --run out."
        )
    return feature_parts(lm.model, run, spliced.site, spliced.sae, position, by_head=by_head)


def attribute_lines(result: dict[str, Any]) -> list[str]:
    """What is attributed, the largest parts with bars, the rest in one line, and whether the parts add up."""
    token, target = (visible(text) for text in (result["tokens"][result["position"]], result["target"]))
    what = f"logit of {target!r}"
    if result["against"] is not None:
        what += f" less that of {visible(result['against'])!r}"
    elif result["centred"]:
        what += " above the vocabulary's mean"
    lines = [
        f"{result['model']}, after token {result['position']} {token!r}: {what} {result['logit']:+.3f} "
        f"(probability {result['probability']:.3f}, prediction number {result['rank']})"
    ]
    shown, rest = result["parts"][: result["top"]], result["parts"][result["top"] :]
    largest = max(abs(part["share"]) for part in shown) or 1.0
    width = max(len(part["name"]) for part in shown)
    for part in shown:
        lines.append(f"  {part['name']:<{width}} {part['share']:>+9.3f}  {'▇' * round(24 * abs(part['share']) / largest)}")
        lines += [f"  {'':<{width}}   {way} {_movers(part[way])}" for way in ("raises", "lowers") if way in part]
    if rest:
        lines.append(f"  {f'{len(rest)} others':<{width}} {sum(part['share'] for part in rest):>+9.3f}")
    if result["deviation"] is None:
        return [
            *lines,
            f"sum {result['sum']:+.3f}: without the final LayerNorm the shares are not meant to sum to the logit",
        ]
    return [*lines, f"sum {result['sum']:+.3f}, off the model's logit by {result['deviation']:.1e} of all shares' sizes"]


def _movers(pairs: list[list[Any]]) -> str:
    return "  ".join(f"{visible(text)!r} {value:+.2f}" for text, value in pairs)
