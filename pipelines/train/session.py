"""One pass over a store that trains any number of SAEs: batches, steps, saved states, finished runs."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actstore.errors import IdentityMismatch, InputError
from actstore.files import require_free_space
from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, save_run
from pipelines.sae.row_sample import SAMPLE_ROWS, sample_rows, usual_code_width
from pipelines.shared.progress import Tracker, track
from pipelines.shared.visible_text import say
from pipelines.train.config import TrainConfig, recorded, require_same
from pipelines.train.log import MetricsLog
from pipelines.train.new_trainee import Samples, new_trainee
from pipelines.train.ranks import Ranks
from pipelines.train.saved_state import Facts, Saved, save_state
from pipelines.train.stopping import Stop
from pipelines.train.trainee import Trainee

LOG_EVERY_STEPS = 25


@dataclass
class Session:
    """A pass over the store: the SAEs in training, their streams, and the progress of the pass."""

    configs: list[TrainConfig]
    out: Path
    store: ActivationStore
    trainees: list[Trainee]
    sites: list[str]
    streams: dict[str, BatchStream]
    n_steps: int
    device: str
    ranks: Ranks
    history: list[list[int]]
    """[rows seen, number of ranks] at the start, and wherever the number of ranks changed."""
    log_bytes: list[int]
    metrics: list[dict[str, float]] = field(default_factory=list)
    diverged: dict[int, int] = field(default_factory=dict)
    """The SAEs that diverged, by number, and the rows each had seen; the others continue."""
    waited_s: float = 0.0

    @classmethod
    def begun(
        cls,
        configs: Sequence[TrainConfig],
        out: Path,
        device: str,
        ranks: Ranks,
        saved: Saved | None,
    ) -> Session:
        """A session at its start, or at its saved state."""
        first = configs[0]
        if first.batch % ranks.n_ranks or first.batch < 2 * ranks.n_ranks:
            raise InputError(
                f"batch {first.batch}: cannot be shared by {ranks.n_ranks} ranks; choose a multiple, two rows each at least."
            )
        facts = saved.facts if saved else None
        store = ActivationStore(first.store, snapshot=facts.snapshot if facts else None)
        sites = [store.site(config.site, config.layer) for config in configs]
        streams = {
            site: BatchStream(
                store,
                site,
                first.batch // ranks.n_ranks,
                seed=first.order_seed,
                rank=ranks.rank,
                n_ranks=ranks.n_ranks,
            )
            for site in dict.fromkeys(sites)
        }
        n_steps = _n_steps(first, store, next(iter(streams.values())).n_rows)
        weights_bytes = sum(8 * config.features * store.d_model(site) for config, site in zip(configs, sites, strict=True))
        require_free_space(out, 7 * weights_bytes, f"{len(configs)} SAEs and the state of their training")
        samples = Samples()
        trainees, settled = [], []
        for index, (config, site) in enumerate(zip(configs, sites, strict=True)):
            trainee = new_trainee(config, site, store, n_steps, device, ranks, samples, fresh=saved is None)
            settled.append(_settled(config, trainee))
            if facts is not None:
                require_same(out, settled[-1], facts.configs, index, len(configs))
            trainees.append(trainee)
        if saved is not None:
            saved.require_trainees([trainee.forms() for trainee in trainees])
            for trainee, tensors, counts in zip(trainees, saved.tensors, saved.facts.counts, strict=True):
                trainee.load(tensors, counts)
        session = cls(
            settled,
            out,
            store,
            trainees,
            sites,
            streams,
            n_steps,
            device,
            ranks,
            _with_start(facts.history, facts.rows_seen, ranks.n_ranks) if facts else [[0, ranks.n_ranks]],
            facts.log_bytes if facts else [0] * len(configs),
            facts.metrics if facts else [{} for _ in configs],
            {int(index): rows for index, rows in facts.diverged.items()} if facts else {},
        )
        for stream in streams.values():
            session._seek(stream)
        rows_seen = session.lead.rows_seen
        if ranks.mean({"rows_seen": rows_seen}, device)["rows_seen"] != rows_seen:
            raise IdentityMismatch(
                f"{out}: this rank is at {rows_seen:,} rows, others are not; show all ranks the same disk."
            )
        return session

    @property
    def alive(self) -> list[int]:
        """The SAEs that are still trained."""
        return [index for index in range(len(self.trainees)) if index not in self.diverged]

    @property
    def lead(self) -> Trainee:
        """The first SAE that is still trained. All of these are at the same step."""
        return self.trainees[self.alive[0]]

    def _seek(self, stream: BatchStream) -> None:
        """Move a stream to where the training resumes. Resuming is exact when the number of ranks is as before."""
        stream.load_state_dict({**stream.state_dict(), "row": self.lead.rows_seen // self.ranks.n_ranks})

    def run(self, stop: Stop) -> list[dict[str, Any]]:
        """Take all remaining steps, then publish the runs. An SAE that diverged gives its path and its rows, no run."""
        logs = self._logs() if self.ranks.is_first else []
        started, rows_before = time.monotonic(), self.lead.rows_seen
        try:
            if rows_before < self.n_steps * self.configs[0].batch:
                with track("train", self.n_steps * self.configs[0].batch, shown=self.ranks.is_first) as progress:
                    progress.resume(rows_before)
                    self._loop(stop, logs, progress)
        finally:
            for log in logs:
                log.close()
        self._leave_out_broken()
        seconds = time.monotonic() - started
        timing = {
            "rows_per_s": round((self.lead.rows_seen - rows_before) / max(seconds, 1e-9)),
            "data_wait_share": round(self.waited_s / max(seconds, 1e-9), 4),
        }
        return [
            (self._publish(index) if index not in self.diverged else self._left_out(index)) | timing
            for index in range(len(self.configs))
        ]

    def _logs(self) -> list[MetricsLog]:
        return [
            MetricsLog(
                config.out,
                n_bytes,
                rows_seen=self.lead.rows_seen,
                tensorboard=config.tensorboard,
                wandb=recorded(config) if config.wandb else None,
            )
            for config, n_bytes in zip(self.configs, self.log_bytes, strict=True)
        ]

    def _loop(self, stop: Stop, logs: list[MetricsLog], progress: Tracker) -> None:
        batch_rows, first = self.configs[0].batch, self.configs[0]
        batches = {site: iter(stream) for site, stream in self.streams.items()}
        saved_at = time.monotonic()
        try:
            for step in range(self.lead.n_steps + 1, self.n_steps + 1):
                rows = self._next_rows(batches)
                note = ""
                is_logged = step % LOG_EVERY_STEPS == 0 or step == self.n_steps
                for index in self.alive:
                    trainee = self.trainees[index]
                    x, losses = trainee.step(rows[self.sites[index]], batch_rows)
                    if is_logged:
                        self.metrics[index] = self.ranks.mean(trainee.metrics(x, losses), self.device)
                        if not math.isfinite(self.metrics[index]["loss"]):
                            self._leave_out(index)
                if is_logged:
                    for index in self.alive if logs else ():
                        logs[index].write(self.metrics[index])
                    note = _note([self.metrics[index] for index in self.alive])
                progress.advance(batch_rows, note)
                stopping = self.ranks.agree(bool(stop), self.device)
                is_due = first.checkpoint_minutes > 0 and time.monotonic() - saved_at >= 60 * first.checkpoint_minutes
                is_last = step == self.n_steps
                if ((stopping or is_due) and not is_last) or (is_last and len(self.trainees) > 1):
                    self._save(logs)
                    saved_at = time.monotonic()
                if stopping and not is_last:
                    self.ranks.agree(True, self.device)  # wait until the first rank has saved
                    _stop(stop)
        finally:
            for iterator in batches.values():
                iterator.close()  # type: ignore[attr-defined]

    def _next_rows(self, batches: dict[str, Iterator[np.ndarray]]) -> dict[str, torch.Tensor]:
        started = time.monotonic()
        rows = {site: torch.from_numpy(next(iterator)).to(self.device) for site, iterator in batches.items()}
        self.waited_s += time.monotonic() - started
        return rows

    def _leave_out(self, index: int) -> None:
        """Leave out an SAE that diverged. Raises InputError when none is left."""
        config, rows = self.configs[index], self.trainees[index].rows_seen
        said = f"{config.out}: training diverged within {rows:,} rows; choose an --lr below {config.lr:g}"
        if self.alive == [index]:
            raise InputError(f"{said}, and another --out.")
        self.diverged[index], self.metrics[index] = rows, {}
        if self.ranks.is_first:
            say(f"{said}; the other SAEs go on.", err=True)

    def _leave_out_broken(self) -> None:
        """Leave out SAEs with non-finite parameters: the last step may have broken them after its loss was computed."""
        for index in self.alive:
            if not all(bool(parameter.isfinite().all()) for parameter in self.trainees[index].sae.parameters()):
                self._leave_out(index)

    def _left_out(self, index: int) -> dict[str, Any]:
        return {"run": str(self.configs[index].out), "diverged_within": self.diverged[index]}

    def _save(self, logs: list[MetricsLog]) -> None:
        self._leave_out_broken()
        if not self.ranks.is_first:
            return
        self.log_bytes = [log.n_bytes for log in logs]
        facts = Facts(
            snapshot=self.store.snapshot,
            rows_seen=self.lead.rows_seen,
            diverged={str(index): rows for index, rows in self.diverged.items()},
            configs=[recorded(config) for config in self.configs],
            counts=[trainee.counts() for trainee in self.trainees],
            metrics=self.metrics,
            log_bytes=self.log_bytes,
            history=self.history,
        )
        save_state(self.out, [trainee.tensors() for trainee in self.trainees], facts)

    def _publish(self, index: int) -> dict[str, Any]:
        """Publish one finished run, whose weights take rows in raw units. Only the first rank writes."""
        config, trainee, site = self.configs[index], self.trainees[index], self.sites[index]
        sae, manifest = trainee.sae, self.store.manifest
        sae.fold_input_scale(trainee.scale)
        record = RunRecord(
            architecture=sae.architecture,
            d_model=sae.d_model,
            n_features=sae.n_features,
            k=sae.k,
            code_width=sae.code_width or self._usual_width(sae, site, config.seed),
            site=site,
            store_id=self.store.store_id,
            snapshot=self.store.snapshot,
            weights_sha256=manifest.model.weights_sha256,
            model=manifest.provenance.get("model", manifest.model.architecture),
            bos=manifest.policy.bos,
            input_scale=trainee.scale,
            rows_seen=trainee.rows_seen,
            history=self.history,
            config=recorded(config),
            metrics={
                **self.metrics[index],
                "dead_features": int(trainee.dead.sum()),
                "dead_window_rows": min(trainee.recipe.dead_after_rows, trainee.rows_seen),
            },
        )
        if self.ranks.is_first:
            record = save_run(config.out, sae, record)
        return {"run": str(config.out), "run_id": record.run_id, **asdict(record)}

    def _usual_width(self, sae: Sae, site: str, seed: int) -> int:
        """`usual_code_width` on a sample of the site's rows."""
        rows = torch.from_numpy(sample_rows(self.store, site, SAMPLE_ROWS, seed))
        return usual_code_width(sae, rows.to(self.device))


def _with_start(history: list[list[int]], rows_seen: int, n_ranks: int) -> list[list[int]]:
    """The history, with a new entry if the number of ranks has changed."""
    return history if history and history[-1][1] == n_ranks else [*history, [rows_seen, n_ranks]]


def _n_steps(config: TrainConfig, store: ActivationStore, n_rows: int) -> int:
    """The steps of a training on a store of `n_rows` rows. Raises InputError where no batch is filled without repetition."""
    if config.batch > n_rows:
        raise InputError(
            f"batch {config.batch:,}: {store.url} has {n_rows:,} rows to train on, and a batch would repeat some; choose "
            f"--batch {n_rows} or less, or collect more tokens."
        )
    wanted = config.tokens or round(config.epochs * n_rows)
    if wanted < config.batch:
        raise InputError(
            f"epochs {config.epochs:g}: {wanted:,} of {store.url}'s {n_rows:,} rows, less than one batch of "
            f"{config.batch:,}; choose --batch {max(2, wanted)} or less, or more --epochs."
        )
    return wanted // config.batch


def _settled(config: TrainConfig, trainee: Trainee) -> TrainConfig:
    """The configuration with defaults replaced by their values."""
    objective = trainee.recipe.objective
    return replace(config, lr=trainee.recipe.lr, l1=objective.l1, kernel=objective.kernel)


def _note(metrics: list[dict[str, float]]) -> str:
    if len(metrics) == 1:
        return "FVE {fve:.3f}  L0 {l0:.1f}  dead {dead:.1%}  loss {loss:.4f}".format(**metrics[0])
    scores = [figures["fve"] for figures in metrics]
    return f"{len(metrics)} SAEs  FVE {min(scores):.3f} to {max(scores):.3f}"


def _stop(stop: Stop) -> None:
    if stop.signal == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt
