"""A collection: plans the segments of a store, and computes any of their shards, array by array, ready to be written.

Each shard is computed from the windows that touch it, at exactly `context` tokens in batches that start at the
shard's first window: the shapes of its forward passes, and so its bytes, do not depend on what was computed before it
or by whom. While the model runs on a batch, threads encode the one before it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actstore import paths
from actstore.encodings.channels import CHANNEL_WINDOWS, Channels
from actstore.errors import EncodingError, IdentityMismatch
from actstore.moments import RowMoments
from actstore.schema import PARTS, Manifest, site_values
from pipelines.collect.config import CollectConfig
from pipelines.collect.segment_plan import SegmentPlan
from pipelines.models.capture import capture
from pipelines.models.load import DTYPES, choose_device, load_model, model_identity
from pipelines.models.sites.site import Site
from pipelines.text.codec import TextCodec
from pipelines.text.corpus import Corpus
from pipelines.text.tokens import TokenSource, TokenTable
from pipelines.text.windows import Windows

Ints = NDArray[np.int64]
Rows = NDArray[np.float32]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class CorpusText:
    """A corpus, and the tokenizer that reads it."""

    corpus: Corpus
    codec: TextCodec
    tokenizer_files: dict[str, bytes]

    def source(self, document: int = 0, token: int = 0) -> TokenSource:
        """The corpus's tokens, behind the first `token` tokens of a document."""
        return TokenSource(self.corpus.documents(document), self.codec, document, token)


@dataclass(frozen=True)
class Collection:
    """The configuration, the manifest of its store, and the model whose rows are kept.

    `corpus_text` is None on a worker, which takes tokens from the tables of the store.
    """

    config: CollectConfig
    manifest: Manifest
    model: nn.Module
    device: str
    corpus_text: CorpusText | None = None

    @classmethod
    def of_store(cls, config: CollectConfig, manifest: Manifest, device: str) -> Collection:
        """The collection that a store comes from. Raises IdentityMismatch when the model has other weights here."""
        chosen = choose_device(device)
        model = load_model(config.model, chosen, "fp32")
        theirs, ours = manifest.model.weights_sha256, model_identity(model).weights_sha256
        if theirs != ours:
            raise IdentityMismatch(
                f"model {config.model}: has weights {ours[:12]} here, the store comes from {theirs[:12]}; show every "
                "worker the same model."
            )
        return cls(config, manifest, model.to(getattr(torch, DTYPES[manifest.compute_dtype])), chosen)

    @property
    def text(self) -> CorpusText:
        """The corpus, where it is read."""
        assert self.corpus_text is not None, "workers take tokens from the store"
        return self.corpus_text

    @cached_property
    def sites(self) -> list[Site]:
        return [Site.parse(label) for label in self.manifest.sites]

    def plan(self, table: TokenTable, segment: int) -> SegmentPlan:
        """A token table's windows, their order, and how their rows are cut into shards."""
        return SegmentPlan.cut(self.manifest, table, segment, self.config.shard_mib)

    def shard(
        self,
        plan: SegmentPlan,
        part: str,
        shard: int,
        channels: dict[str, Channels],
        document: Callable[[int], str],
        advance: Advance,
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Every array of one shard, in disk order, and the statistics of its rows as the model gave them.

        `channels` has the channel means and deviations of each site whose encoding needs them; `document` names the document
        of a token, for the message of an EncodingError. `advance` gets the number of finished rows."""
        windows, own = plan.windows[part], plan.plans[part]
        chosen, mine = own.shard_windows(shard)
        place = np.argsort(own.row_order(shard))
        arrays = {array.name: np.empty((len(place), *array.tail), array.dtype) for array in self.manifest.arrays}
        moments = {site: RowMoments(self.manifest.d_model(site)) for site in self.manifest.sites}

        def keep(site: str, here: Ints, rows: Rows, token: Ints, position: Ints) -> None:
            try:
                values = site_values(site, rows, self.manifest.encoding(site), channels.get(site))
            except EncodingError as error:
                at = int(token[error.row])
                raise error.at(site, document(at), at, int(position[error.row])) from error
            for name, kept in values.items():
                arrays[name][here] = kept
            moments[site].update(rows)

        seen = 0
        with ThreadPoolExecutor(max(1, min(len(self.sites), (os.cpu_count() or 1) - 1))) as threads:
            pending: list[Future[None]] = []
            for batch, kept, rows in self._activations(windows, chosen):
                window, position = np.nonzero(kept)
                inside = slice(max(mine.start - seen, 0), max(min(mine.stop - seen, len(window)), 0))
                here = place[seen + inside.start - mine.start : seen + inside.stop - mine.start]
                seen += len(window)
                window, position = batch[window[inside]], position[inside]
                arrays[paths.WINDOW][here], arrays[paths.POSITION][here] = window, position
                token = windows.token_at(window, position)
                for future in pending:
                    future.result()
                pending = [
                    threads.submit(keep, site, here, rows[site][inside], token, position) for site in self.manifest.sites
                ]
                advance(len(here))
            for future in pending:
                future.result()
        return arrays, {site: sums.record() for site, sums in moments.items()}

    def channels(self, plan: SegmentPlan) -> dict[str, Channels]:
        """Mean and deviation of each site's channels over the plan's first 256 training windows, where they are needed."""
        sites = self.manifest.measured_sites
        if not sites:
            return {}
        moments = {site: RowMoments(self.manifest.d_model(site)) for site in sites}
        part = PARTS[0] if len(plan.windows[PARTS[0]]) else PARTS[1]
        for _, _, rows in self._activations(plan.windows[part], plan.plans[part].window_order[:CHANNEL_WINDOWS]):
            for site in sites:
                moments[site].update(rows[site])
        return {site: sums.channels() for site, sums in moments.items()}

    def probe(self, windows: Windows) -> str:
        """crc32c of what this machine computes for the first windows: equal probes write equal bytes."""
        checksum = 0
        for rows in self.first_rows(windows).values():
            checksum = google_crc32c.extend(checksum, rows.tobytes())
        return f"{checksum:08x}"

    def first_rows(self, windows: Windows) -> dict[str, Rows]:
        """The rows of each site of the first batch of windows, by label in order."""
        first = np.arange(min(len(windows), self.config.batch_windows))
        rows = next(iter(self._activations(windows, first)), (None, None, {}))[2]
        return dict(sorted(rows.items()))

    def run(self, windows: Windows, chosen: Ints) -> None:
        """Run the forward passes of some windows and nothing else, to time them."""
        for _ in self._activations(windows, chosen):
            pass

    def compute_error(self, windows: Windows) -> dict[str, float]:
        """The effect of computing in another dtype than fp32 on the rows of the first windows: unexplained variance by
        site."""
        exact = replace(self, model=load_model(self.config.model, self.device, "fp32")).first_rows(windows)
        rows = self.first_rows(windows)
        return {site: unexplained(exact[site], rows[site]) for site in exact}

    def environment(self, probe: str) -> dict[str, Any]:
        """The environment that computes the rows; two environments whose probes agree write the same bytes."""
        import transformers

        return {
            "device": torch.cuda.get_device_name() if self.device.startswith("cuda") else self.device,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "batch_windows": self.config.batch_windows,
            "probe_crc32c": probe,
        }

    def _activations(self, windows: Windows, chosen: Ints) -> Iterator[tuple[Ints, NDArray[np.bool_], dict[str, Rows]]]:
        """(window ids, kept positions, kept rows of each site in float32), batch after batch.

        Batches have near-equal numbers of windows: a small last batch would take more time per window.
        """
        n_batches = -(-len(chosen) // self.config.batch_windows)
        for batch in np.array_split(chosen, n_batches) if n_batches else []:
            inputs, kept = windows.batch(batch)
            captured = capture(self.model, self.sites, torch.from_numpy(inputs).to(self.device))
            mask = torch.from_numpy(kept).to(self.device)
            yield batch, kept, {site: values[mask].float().cpu().numpy() for site, values in captured.items()}


def unexplained(exact: Rows, copy: Rows) -> float:
    """Share of the rows' variance that a copy of them misses: Σ‖x − x'‖² / Σ‖x − mean x‖²."""
    wide = exact.astype(np.float64)
    total = np.square(wide - wide.mean(axis=0)).sum()
    return float(np.square(copy - wide).sum() / total) if total else 0.0
