"""In: a run, the model, a prompt, a feature, strengths. Out: the text that the model writes at each strength.

A row x of the SAE's site becomes x + change · W_dec[feature], at chosen positions, while text is generated:

- `add`: change = strength · unit;
- `clamp`: the feature's code becomes strength · unit, so change = strength · unit − code;
- `scale`: the code is multiplied, so change = (strength − 1) · code.

The unit is `norm`, the mean Euclidean norm of the site's rows in the store; `peak`, the feature's largest activation in an
analysis; or `raw`, 1. Positions that are no rows (the start token, separators) pass through.

All strengths are one batch. Sampled tokens are drawn with the same noise at every strength (Gumbel noise added to
logits / temperature), so that texts differ by the steering alone: where steering changes nothing, neither does the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.errors import InputError
from pipelines.analysis.reader import open_run_analysis
from pipelines.causal.engine.feature_values import feature_values
from pipelines.causal.engine.language_model import Prompt, Spliced, open_spliced, open_store
from pipelines.models.capture import hooked
from pipelines.shared.visible_text import visible

MODES = ("add", "clamp", "scale")
UNITS = ("norm", "peak", "raw")
PLACES = ("all", "prompt", "last", "generated")


@dataclass(frozen=True)
class SteerConfig:
    """What `steer` is asked for; the names are the command's options.

    `at`: `all` rows of prompt and generated text; those of the `prompt`; only the `last` of the prompt; only `generated`
    ones. `temperature` 0 takes the most probable token.
    """

    run: Path
    feature: int
    text: str
    strength: tuple[float, ...] = (0.0, 0.5, 1.0)
    mode: str = "add"
    unit: str = "norm"
    at: str = "all"
    tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    cache: bool = True
    analysis: str | Path | None = None
    store: str | None = None
    model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("unit", UNITS), ("at", PLACES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        if self.tokens < 1 or self.temperature < 0 or not self.strength:
            raise InputError(
                f"tokens {self.tokens}, temperature {self.temperature}, strengths {self.strength}: need at least one token "
                "and one strength, and no negative temperature."
            )
        if self.unit == "peak" and self.mode != "scale" and self.analysis is None:
            raise InputError("unit peak: a feature's peak is in an analysis of the run; name it with --analysis.")


@dataclass(frozen=True)
class Steering:
    """How rows are changed: at `strength` (n,) times `unit`, one strength a text of the batch."""

    feature: int
    strength: Tensor
    mode: str
    unit: float
    at: str


def steer(config: SteerConfig) -> dict[str, Any]:
    """Generate at every strength. Raises InputError for a prompt that leaves no room for the tokens asked for."""
    spliced = open_spliced(config.run, config.store, config.model, config.device)
    spliced.require_feature(config.feature)
    prompt = spliced.lm.prompt(config.text)
    if len(prompt) + config.tokens > spliced.lm.n_positions:
        raise InputError(
            f"tokens {config.tokens}: with the {len(prompt)} of the prompt, more than the model's "
            f"{spliced.lm.n_positions:,} positions; ask for fewer."
        )
    unit, unit_said = _unit(config, spliced)
    strength = torch.tensor(config.strength, device=spliced.lm.device)
    steering = Steering(config.feature, strength, config.mode, unit, config.at)
    generated = generate(spliced, prompt, steering, config.tokens, config.temperature, config.seed, cache=config.cache)
    codec = spliced.lm.codec
    return {
        "run_id": spliced.record.run_id,
        "site": spliced.record.site,
        "feature": config.feature,
        "prompt": config.text,
        "mode": config.mode,
        "unit": unit,
        "unit_is": unit_said,
        "at": config.at,
        "temperature": config.temperature,
        "seed": config.seed,
        "texts": [
            {"strength": value, "text": codec.text(ids), "tokens": [codec.token_text(i) for i in ids]}
            for value, ids in zip(config.strength, generated, strict=True)
        ],
    }


@torch.no_grad()
def generate(
    spliced: Spliced,
    prompt: Prompt,
    steering: Steering,
    n_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    cache: bool = True,
) -> list[list[int]]:
    """For each strength, the ids of the tokens that follow the prompt, up to the first end-of-text token.

    With `cache`, keys and values of earlier positions are kept from step to step; without, every step runs the whole text.
    """
    model, n = spliced.lm.model, len(steering.strength)
    generator = torch.Generator().manual_seed(seed)
    ids = prompt.ids.repeat(n, 1)
    past, fed = None, ids
    with hooked(model, spliced.site, steered(spliced, steering, prompt, lambda: ids, lambda: fed.shape[1])):
        for _ in range(n_tokens):
            fed = ids if past is None else ids[:, -1:]
            output = model(input_ids=fed, past_key_values=past, use_cache=cache)
            past = output.past_key_values if cache else None
            ids = torch.cat([ids, _chosen(output.logits[:, -1], temperature, generator)[:, None]], dim=1)
            if bool((ids[:, len(prompt) :] == spliced.lm.codec.separator_token_id).any(dim=1).all()):
                break
    return [_until(own, spliced.lm.codec.separator_token_id) for own in ids[:, len(prompt) :].tolist()]


def steered(
    spliced: Spliced, steering: Steering, prompt: Prompt, ids: Callable[[], Tensor], n_fed: Callable[[], int]
) -> Callable[[Tensor], Tensor]:
    """What a hook at the site does with rows (n, position, d_model): those of the last `n_fed()` positions of `ids()`."""
    lm, direction = spliced.lm, spliced.sae.W_dec[steering.feature]

    def edit(rows: Tensor) -> Tensor:
        now, count = ids(), n_fed()
        place = torch.arange(now.shape[1] - count, now.shape[1], device=rows.device)
        chosen = _kept(now[:, -count:], place, lm.codec.separator_token_id, spliced) & _at(place, len(prompt), steering.at)
        if not bool(chosen.any()):
            return rows
        text = chosen.nonzero()[:, 0]
        strength = steering.strength[text].to(rows.dtype)
        if steering.mode == "add":
            change = strength * steering.unit
        else:
            feature = torch.tensor([steering.feature], device=rows.device)
            code = feature_values(spliced.sae.codes(rows[chosen]), feature)[:, 0]
            change = strength * steering.unit - code if steering.mode == "clamp" else (strength - 1) * code
        changed = rows.clone()
        changed[chosen] = rows[chosen] + change[:, None] * direction
        return changed

    return edit


def _kept(ids: Tensor, place: Tensor, separator: int, spliced: Spliced) -> Tensor:
    """(n, position) which positions are rows, as the store's policy says."""
    if spliced.lm.keep_special:
        return torch.ones_like(ids, dtype=torch.bool)
    return (ids != separator) & (place > 0)


def _at(place: Tensor, n_prompt: int, at: str) -> Tensor:
    """(position,) which positions are steered."""
    if at == "prompt":
        return place < n_prompt
    if at == "last":
        return place == n_prompt - 1
    return place >= (n_prompt if at == "generated" else 0)


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(n,) next tokens of logits (n, vocabulary), the same noise for each."""
    if not temperature:
        return logits.argmax(dim=1)
    uniform = torch.rand(logits.shape[1], generator=generator, dtype=torch.float64).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    gumbel = -(-uniform.log()).log()
    return (logits.double() / temperature + gumbel.to(logits.device)).argmax(dim=1)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _unit(config: SteerConfig, spliced: Spliced) -> tuple[float, str]:
    """The unit of a strength, and in words what it is."""
    if config.mode == "scale":
        return 1.0, "times the code"
    if config.unit == "raw":
        return 1.0, "raw"
    if config.unit == "norm":
        store = open_store(config.run, spliced.record, config.store)
        return store.statistics(spliced.record.site).mean_norm, "mean norm of the store's rows"
    assert config.analysis is not None
    analysis = open_run_analysis(config.analysis, spliced.record.run_id, config.run)
    return float(analysis.peak[config.feature]), "the feature's peak"


def steer_lines(result: dict[str, Any], width: int = 100) -> list[str]:
    """The texts in columns, white space made visible; under each other where columns would be narrow."""
    unit = result["unit_is"] if result["mode"] == "scale" else f"x {result['unit']:.4g} ({result['unit_is']})"
    how = "greedy" if not result["temperature"] else f"temperature {result['temperature']}, seed {result['seed']}"
    lines = [
        f"feature {result['feature']} of {result['site']}: {result['mode']} strength {unit}, "
        f"at {result['at']} positions, {how}",
        f"prompt  {visible(result['prompt'])}",
    ]
    column = width // len(result["texts"]) - 2
    if column < 18:
        return [*lines, *(f"{own['strength']:>7g}  {visible(own['text'])}" for own in result["texts"])]
    lines.append("  ".join(f"{own['strength']:<{column}g}" for own in result["texts"]).rstrip())
    columns = [_wrapped(own["text"], column) for own in result["texts"]]
    for i in range(max(map(len, columns))):
        lines.append("  ".join(f"{own[i] if i < len(own) else '':<{column}}" for own in columns).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """A text's own lines, cut to a width."""
    parts = text.expandtabs(4).split("\n")
    return [line[i : i + width] for line in parts for i in range(0, max(len(line), 1), width)]
