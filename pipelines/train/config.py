"""The options of a training, and which of them identify a run."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from actstore.checked_json import checked
from actstore.errors import IdentityMismatch, InputError
from pipelines.sae.kernels import KERNELS
from pipelines.train.trainee import AUXK, RECIPES

NOT_RECORDED = ("out", "resume", "checkpoint_minutes", "tensorboard", "wandb")
"""Options that do not change the trained SAE."""
MOST_EPOCHS, MOST_ROWS = 1_000_000, 1 << 53
OWN = ("layer", "site", "architecture", "features", "k", "lr", "l1", "seed", "out")
"""Options in which the SAEs of one pass may differ."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of one SAE's training, named as on the command line.

    `tokens` (rows to train on) takes precedence over `epochs`. `lr` 0 means `default_learning_rate`, `l1` 0 the
    architecture's default. `seed` draws the initial weights, `order_seed` the order of the batches.
    """

    store: str | Path
    out: Path
    layer: int | None = None
    site: str = "resid_post"
    architecture: str = "topk"
    features: int = 4096
    k: int = 32
    tokens: int = 0
    epochs: float = 1.0
    batch: int = 4096
    lr: float = 0.0
    l1: float = 0.0
    auxk: float = AUXK
    recipe: str = "standard"
    kernel: str = "auto"
    seed: int = 0
    order_seed: int = 0
    device: str = "auto"
    checkpoint_minutes: float = 10.0
    resume: bool = False
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.features:
            raise InputError(f"k {self.k}: there are {self.features} features; choose --k between 1 and {self.features}.")
        numbers = (self.epochs, self.lr, self.l1, self.auxk, self.checkpoint_minutes)
        least = min(self.tokens, self.lr, self.l1, self.auxk, self.checkpoint_minutes)
        most = max(self.tokens, self.batch, self.features)
        is_bounded = all(map(math.isfinite, numbers)) and self.epochs <= MOST_EPOCHS and most <= MOST_ROWS
        if not is_bounded or self.batch < 2 or self.epochs <= 0 or least < 0:
            raise InputError(
                f"batch {self.batch}, epochs {self.epochs}, tokens {self.tokens}, lr {self.lr}, l1 {self.l1}, auxk "
                f"{self.auxk}, checkpoint-minutes {self.checkpoint_minutes}: must be positive and finite, batch at least "
                f"2, epochs at most {MOST_EPOCHS:,} (tokens, lr and l1 may be 0 for their default, the last two for none)."
            )
        if 0 < self.tokens < self.batch:
            raise InputError(
                f"tokens {self.tokens:,}: less than one batch of {self.batch:,}; choose --batch {max(2, self.tokens)} or "
                "less, or more --tokens."
            )
        if self.recipe not in RECIPES:
            raise InputError(f"recipe {self.recipe!r}: choose from {', '.join(RECIPES)}.")
        if self.kernel not in ("auto", *KERNELS):
            raise InputError(f"kernel {self.kernel!r}: choose from auto, {', '.join(KERNELS)}.")


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The options that identify a run or a saved state."""
    values = {name: value for name, value in asdict(config).items() if name not in NOT_RECORDED}
    return {**values, "store": str(config.store)}


def config_of(values: dict[str, Any], where: str, **changed: Any) -> TrainConfig:
    """The configuration whose `recorded` options are `values`, with some options changed.

    Raises DamagedStore for options that no training has, InputError for values that make none.
    """
    return TrainConfig(**{**vars(checked(values, _recorded_kind(), where)), "out": Path("nowhere"), **changed})


@cache
def _recorded_kind() -> type[Any]:
    """The dataclass of what `recorded` gives."""
    hints = get_type_hints(TrainConfig) | {"store": str}
    kept = [option for option in fields(TrainConfig) if option.name not in NOT_RECORDED]
    return make_dataclass(
        "Recorded",
        [
            (option.name, hints[option.name], field() if option.default is MISSING else field(default=option.default))
            for option in kept
        ],
    )


def require_same(out: Path, config: TrainConfig, saved: list[dict[str, Any]], index: int, n: int) -> None:
    """Raises IdentityMismatch, naming the options that differ, unless the saved training is the one that `config` asks for.

    `config` has its defaults replaced by their values.
    """
    if len(saved) != n:
        raise IdentityMismatch(
            f"{out}: is a training of {len(saved)} SAEs, {n} were asked for; give the options it began with."
        )
    asked, theirs = recorded(config), saved[index]
    differing = [
        f"{name} (there {theirs.get(name)}, asked {asked.get(name)})"
        for name in sorted(asked.keys() | theirs.keys())
        if name not in ("store", "device") and asked.get(name) != theirs.get(name)
    ]
    if differing:
        raise IdentityMismatch(f"{out}: is another training: {', '.join(differing)}; give the options it began with.")
