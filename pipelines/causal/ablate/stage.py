"""In: a run, a text, features. Out: the next tokens with and without each feature, and how far the predictions moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from actstore.errors import InputError
from actstore.plan import raw_words
from pipelines.analysis.reader import open_run_analysis
from pipelines.causal.ablate.feature_edits import ERRORS, Ablations, Read, ablate, one_by_one, read_prompt, set_everywhere
from pipelines.causal.engine.candidates import top_candidates
from pipelines.causal.engine.drawn_firings import DrawnFirings, draw_firings
from pipelines.causal.engine.language_model import Spliced, open_spliced
from pipelines.codes.code_store import open_run_codes
from pipelines.shared.visible_text import BAR, visible

SET_TO = ("zero", "mean", "firing", "row")
AT = ("fired", "all", "last")
DRAWS = 1024
"""Firings of a feature that a resampled value is drawn from."""
PURPOSE = 62
"""Purpose of the random words by which values are drawn."""


@dataclass(frozen=True)
class AblateConfig:
    """What `ablate` is asked for; the names are the command's options.

    `set_to`: what a feature is set to. `zero`; `mean`, its mean over rows: those of `analysis`, or without one those of
    the text; `firing`, the value of a firing drawn from `codes`; `row`, its value (mostly 0) in a row drawn from them.
    """

    run: Path
    text: str
    feature: tuple[int, ...] = ()
    set_to: str = "zero"
    at: str = "fired"
    each: bool = False
    error: str = "keep"
    top: int = 5
    features: int = 10
    analysis: str | Path | None = None
    codes: str | Path | None = None
    seed: int = 0
    store: str | None = None
    model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("set_to", SET_TO), ("at", AT), ("error", ERRORS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        if self.top < 1 or self.features < 1:
            raise InputError(f"top {self.top}, features {self.features}: need at least 1.")
        if self.set_to in ("firing", "row") and self.codes is None:
            raise InputError(f"set-to {self.set_to}: values are drawn from a code store; name it with --codes.")


def ablate_features(config: AblateConfig) -> dict[str, Any]:
    """Ablate each feature on its own; without `feature`, every one that fires in the text, the strongest effects first.

    Raises what `open_spliced` and `read_prompt` raise, and IdentityMismatch for an analysis or codes of another run.
    """
    spliced = open_spliced(config.run, config.store, config.model, config.device)
    prompt = spliced.lm.prompt(config.text)
    read = read_prompt(spliced, prompt, list(config.feature) or None)
    features: list[int] = read.features.tolist()
    values, source = _values(config, spliced, read, features)
    edits = [set_everywhere(read, feature, value, config.at) for feature, value in zip(features, values, strict=True)]
    if config.each:
        edits = [single for edit in edits for single in one_by_one(edit)] or edits
    ablations = ablate(read, edits, config.error)
    order = ablations.normal_ablated[:, -1].argsort(descending=True, stable=True).tolist()
    shown = order if config.feature else order[: config.features]
    codec = spliced.lm.codec

    def candidates(hidden: Tensor) -> list[dict[str, Any]]:
        return [asdict(candidate) for candidate in top_candidates(read.logits(hidden), codec, config.top)]

    result = {
        "run_id": spliced.record.run_id,
        "site": spliced.record.site,
        "tokens": list(prompt.texts),
        "rows": prompt.kept.tolist(),
        "error": config.error,
        "set_to": source,
        "edits": len(edits),
        "normal": candidates(read.normal[-1]),
        "features": [{**_effect(read, ablations, i), "ablated": candidates(ablations.hidden[i])} for i in shown],
    }
    if ablations.reconstruction_hidden is not None and ablations.normal_reconstruction is not None:
        result["reconstruction"] = candidates(ablations.reconstruction_hidden)
        result["kl_normal_reconstruction"] = float(ablations.normal_reconstruction[-1])
    return result


def _effect(read: Read, ablations: Ablations, i: int) -> dict[str, Any]:
    """One edit as plain values; `kl` is at the last position, `kl_at` at each. In nats."""
    edit, by_position = ablations.edits[i], ablations.normal_ablated[i]
    effect = {
        "feature": edit.feature,
        "codes": read.code(edit.feature).tolist(),
        "positions": list(edit.positions),
        "values": list(edit.values),
        "kl": float(by_position[-1]),
        "kl_mean": float(by_position.mean()),
        "kl_at": by_position.tolist(),
    }
    if ablations.reconstruction_ablated is not None:
        effect["kl_reconstruction_ablated"] = float(ablations.reconstruction_ablated[i, -1])
    return effect


def _values(config: AblateConfig, spliced: Spliced, read: Read, features: list[int]) -> tuple[list[float], str]:
    """The value that each feature is set to, and the value's source in words."""
    if config.set_to == "zero":
        return [0.0] * len(features), "0"
    if config.set_to == "mean":
        if config.analysis is None:
            kept = read.codes[read.prompt.kept]
            return kept.mean(dim=0).tolist(), f"its mean over the {len(kept)} rows of the text"
        analysis = open_run_analysis(config.analysis, spliced.record.run_id, config.run)
        means = analysis.mean * analysis.frequency  # a feature's mean is over its firings, and is wanted over all rows
        return means[features].tolist(), f"its mean over the {analysis.n_rows:,} rows of {config.analysis}"
    return _drawn(config, spliced, features)


def _drawn(config: AblateConfig, spliced: Spliced, features: list[int]) -> tuple[list[float], str]:
    codes = open_run_codes(str(config.codes), spliced.record.run_id, str(config.run))
    firings = draw_firings(codes, np.array(features), DRAWS, config.seed)
    values = []
    for feature in features:
        own = firings.take(firings.feature == feature)
        first, second = (int(word) / 2.0**64 for word in raw_words(2, config.seed, PURPOSE, feature))
        share = 1.0 if config.set_to == "firing" else firings.total[feature] / firings.rows
        values.append(drawn_value(own, first) if len(own) and second < share else 0.0)
    return values, f"its value in a {config.set_to} drawn from {config.codes}, seed {config.seed}"


def drawn_value(firings: DrawnFirings, share: float) -> float:
    """The value of one firing of a feature, drawn in proportion to the firings' weights by `share` in [0, 1)."""
    up_to = np.cumsum(firings.weight)
    return float(firings.value[min(int(np.searchsorted(up_to, share * up_to[-1], side="right")), len(firings) - 1)])


def ablate_lines(result: dict[str, Any]) -> list[str]:
    """The effect of each edit at the last position, a bar for its effect at every position, and the next tokens."""
    tokens = "".join(visible(token) for token in result["tokens"])
    lines = [
        f"{result['site']}: {tokens}",
        f"each feature alone set to {result['set_to']}; error term {'kept' if result['error'] == 'keep' else 'dropped'}; "
        "KL(normal ‖ ablated) in nats",
    ]
    if "kl_normal_reconstruction" in result:
        lines.append(f"KL(normal ‖ reconstruction) {result['kl_normal_reconstruction']:.4f}")
    lines.append(_candidates("normal", result["normal"]))
    if "reconstruction" in result:
        lines.append(_candidates("reconstruction", result["reconstruction"]))
    peak = max((value for effect in result["features"] for value in effect["kl_at"]), default=0.0)
    for effect in result["features"]:
        bar = "".join(BAR[0 if not v else max(1, round(8 * v / peak))] if peak else BAR[0] for v in effect["kl_at"])
        own = effect.get("kl_reconstruction_ablated")
        beside = "" if own is None else f"  KL(reconstruction ‖ ablated) {own:.4f}"
        fired = [repr(visible(result["tokens"][position])) for position in effect["positions"][:6]]
        places = ", ".join(fired) or "nowhere: it does not fire"
        more = f" and {len(effect['positions']) - 6} more" if len(effect["positions"]) > 6 else ""
        lines.append(f"feature {effect['feature']:<6} KL {effect['kl']:.4f}{beside}  |{bar}|  at {places}{more}")
        lines.append(_candidates("ablated", effect["ablated"]))
    return lines


def _candidates(name: str, candidates: list[dict[str, Any]]) -> str:
    shown = "  ".join(f"{visible(c['text'])!r} {c['probability']:.3f}" for c in candidates)
    return f"  {name:<15}{shown}"
