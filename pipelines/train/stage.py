"""In: a store. Out: runs, that is SAEs trained on shuffled batches streamed from the store, any number in one pass.

Every SAE sees the same batches as if it were trained alone, and ends with the same bits. An interrupted training resumes
from its last saved state and ends with the same bits, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actstore.errors import InputError, OutputExists
from actstore.folder import Folder
from actstore.sealed_folder import contents
from pipelines.compute.freed_memory import keep_freed_memory
from pipelines.models.load import choose_device
from pipelines.sae.checkpoint import WEIGHTS
from pipelines.sae.tensor_file import making
from pipelines.train.config import OWN, TrainConfig
from pipelines.train.log import METRICS
from pipelines.train.ranks import device_of_rank, is_first_process, ranks_of_environment
from pipelines.train.saved_state import STATE, discard_state, load_state
from pipelines.train.session import Session
from pipelines.train.stopping import stop_when_asked


def train(config: TrainConfig) -> dict[str, Any]:
    """Train one SAE on one site of a store and publish the run. Returns its record as plain values.

    Raises what `train_together` raises.
    """
    with alone([config], config.out):
        record = train_together([config], config.out)[0]
        finish(config.out)
    return record


@contextmanager
def alone(configs: Sequence[TrainConfig], out: Path) -> Iterator[None]:
    """Hold the locks of all folders that a training writes; the first of several ranks holds them.

    Raises LockedStore while another process writes one of them, OutputExists when one holds anything else.
    """
    if not (out / STATE).exists():
        _require_free_place(configs, out)  # before a lock file is put there
    with ExitStack() as stack:
        if is_first_process():
            for folder in dict.fromkeys((out, *(config.out for config in configs))):
                stack.enter_context(Folder(folder).lock())
        yield


def train_together(configs: Sequence[TrainConfig], out: Path) -> list[dict[str, Any]]:
    """Train SAEs in one pass over the store; publish each at its own `out`. Their configurations may differ in `OWN` only.

    An SAE that diverges (its loss is not finite) is left out, with a line on stderr, and the others continue. Its result is
    `diverged_within`, a number of rows, instead of a run's record.

    The folder `out` holds the state of the training: the folder of the run, or one above the runs. The state stays until
    `finish`; until then the same training can be resumed, and publishes the same bits again.

    Raises InputError (also when every SAE diverged), NotAStore, IncompleteStore, DamagedStore, NoSpace, OutputExists, and
    IdentityMismatch when `out` holds another training.
    """
    first = configs[0]
    shared = {replace(config, **{name: getattr(first, name) for name in OWN}) for config in configs}
    if len(shared) > 1 or len({config.out for config in configs}) < len(configs):
        raise InputError(f"SAEs trained together may differ in {', '.join(OWN)} only, and each needs a place of its own.")
    saved = load_state(out)
    if saved is not None and not first.resume:
        raise OutputExists(
            f"{out}: holds a training interrupted after {saved.facts.rows_seen:,} rows; continue it with --resume, or "
            "choose another --out."
        )
    if saved is None:
        _require_free_place(configs, out)
    keep_freed_memory()
    device = device_of_rank(choose_device(first.device))
    with ranks_of_environment(device) as ranks, stop_when_asked() as stop:
        return Session.begun(configs, out, device, ranks, saved).run(stop)


def finish(out: Path) -> None:
    """Remove the training's state at `out`, once everything that the training was for is published."""
    if is_first_process():
        discard_state(out)


def _require_free_place(configs: Sequence[TrainConfig], out: Path) -> None:
    """Raises OutputExists when an output folder holds anything but the leftovers of an interrupted training."""
    leftovers = {METRICS, WEIGHTS, STATE, "tensorboard", "wandb"}
    leftovers |= {making(Path(name)).name for name in (WEIGHTS, STATE)}
    leftovers |= {config.out.name for config in configs if config.out.parent == out}
    for path in dict.fromkeys((out, *(config.out for config in configs))):
        if path.exists() and (not path.is_dir() or contents(Folder(path)) - leftovers):
            raise OutputExists(f"{path}: exists; choose another --out, or move it away.")
