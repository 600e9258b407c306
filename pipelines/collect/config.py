"""What a collection is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actstore.encodings.registry import activation_encodings
from actstore.errors import InputError
from actstore.layout import SHARD_BUDGET_BYTES
from pipelines.models.load import DTYPES

PACKINGS = ("packed", "document")


@dataclass(frozen=True)
class CollectConfig:
    """What `collect` is asked for; the names are the command's options."""

    out: str | Path
    model: str = "gpt2"
    corpus: str = "stdlib"
    layer: tuple[int, ...] = ()
    site: tuple[str, ...] = ("resid_post",)
    tokens: int = 1_000_000
    context: int = 128
    encoding: str = "fp16"
    compute_dtype: str = "fp32"
    device: str = "auto"
    batch_windows: int = 32
    seed: int = 0
    packing: str = "packed"
    bos: bool = True
    keep_special: bool = False
    shard_mib: int = SHARD_BUDGET_BYTES >> 20
    mixed_hardware: bool = False
    workers: int = 0
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.context < 2 or self.batch_windows < 1 or self.shard_mib < 1 or self.workers < 0:
            raise InputError(
                f"tokens {self.tokens}, context {self.context}, batch windows {self.batch_windows}, shard MiB "
                f"{self.shard_mib}, workers {self.workers}: at least 1, 2, 1, 1 and 0."
            )
        if self.encoding not in activation_encodings() or self.compute_dtype not in DTYPES or self.packing not in PACKINGS:
            raise InputError(
                f"encoding {self.encoding!r}, compute dtype {self.compute_dtype!r}, packing {self.packing!r}: choose from "
                f"{', '.join(activation_encodings())}; {', '.join(DTYPES)}; {', '.join(PACKINGS)}."
            )
