"""In: windows, a plan, a language model. Out: the shards of a store, array by array, ready to be written.

Each shard is computed from the windows that touch it, at exactly `context` tokens in batches that start at the
shard's first window: the shapes of its forward passes, and so its bytes, do not depend on what was computed before it
or by whom. While the model runs on a batch, threads encode the one before it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actstore.codecs import CHANNEL_WINDOWS, Channels, encode_rows
from actstore.errors import EncodingError, IdentityMismatch
from actstore.moments import Moments
from actstore.plan import PartPlan
from actstore.reader import Store, scale_array
from actstore.schema import PARTS, Manifest, SegmentRecord
from pipelines.models.capture import capture
from pipelines.models.load import DTYPES, choose_device, load_model, model_identity
from pipelines.models.sites.site import Site
from pipelines.text.windows import Windows

Ints = NDArray[np.int64]
Rows = NDArray[np.float32]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class SegmentText:
    """A segment's windows and plan, part by part: all that says which rows a shard holds."""

    windows: dict[str, Windows]
    plans: dict[str, PartPlan]

    @classmethod
    def open(cls, store: Store, segment: SegmentRecord) -> SegmentText:
        """From the tables of a published segment."""
        windows, plans = {}, {}
        for index, part in enumerate(PARTS):
            windows[part] = Windows(
                store.table(segment.index, "tokens/ids"),
                store.table(segment.index, f"{part}/windows/token_start"),
                store.table(segment.index, f"{part}/windows/n_tokens").astype(np.int64),
                store.manifest.policy,
            )
            counts = windows[part].kept_counts()
            plans[part] = PartPlan.build(store.manifest.seed, segment.index, index, segment.parts[part].layout, counts)
        return cls(windows, plans)


@dataclass(frozen=True)
class ShardMaker:
    """A model, and what is kept of it: computes any shard of a store of this manifest."""

    manifest: Manifest
    model: nn.Module
    device: str
    batch_windows: int

    @classmethod
    def load(cls, manifest: Manifest, model_name: str, device: str, batch_windows: int) -> ShardMaker:
        """Load the model that a store was made with. Raises IdentityMismatch when it has other weights."""
        chosen = choose_device(device)
        model = load_model(model_name, chosen, "fp32")
        theirs, ours = manifest.model.weights_sha256, model_identity(model).weights_sha256
        if theirs != ours:
            raise IdentityMismatch(
                f"model {model_name}: has weights {ours[:12]} here, the store comes from {theirs[:12]}; show every "
                "worker the same model."
            )
        return cls(manifest, model.to(getattr(torch, DTYPES[manifest.compute_dtype])), chosen, batch_windows)

    @cached_property
    def sites(self) -> list[Site]:
        return [Site.parse(label) for label in self.manifest.sites]

    def shard(
        self,
        text: SegmentText,
        part: str,
        shard: int,
        channels: dict[str, Channels],
        document: Callable[[int], str],
        advance: Advance,
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Every array of one shard, in disk order, and the statistics of its rows as the model gave them.

        `channels` has what int8 measures each site by; `document` names the document of a token, for the message of
        the EncodingError that a value raises which cannot be kept. `advance` is told of finished rows.
        """
        windows, plan = text.windows[part], text.plans[part]
        chosen, mine = plan.shard_windows(shard)
        place = np.argsort(plan.row_order(shard))
        arrays = {array.name: np.empty((len(place), *array.tail), array.dtype) for array in self.manifest.arrays}
        moments = {site.label: Moments(self.manifest.array(f"acts/{site.label}").width) for site in self.sites}

        def keep(site: Site, here: Ints, rows: Rows, token: Ints, position: Ints) -> None:
            name = f"acts/{site.label}"
            encoding = self.manifest.array(name).encoding
            try:
                arrays[name][here], scale = encode_rows(rows, encoding, channels.get(site.label))
            except EncodingError as error:
                at = int(token[error.row])
                raise error.at(site.label, document(at), at, int(position[error.row])) from error
            if scale is not None:
                arrays[scale_array(name)][here] = scale
            moments[site.label].update(rows)

        seen = 0
        with ThreadPoolExecutor(max(1, min(len(self.sites), (os.cpu_count() or 1) - 1))) as threads:
            pending: list[Future[None]] = []
            for batch, kept, rows in self._activations(windows, chosen):
                window, position = np.nonzero(kept)
                inside = slice(max(mine.start - seen, 0), max(min(mine.stop - seen, len(window)), 0))
                here = place[seen + inside.start - mine.start : seen + inside.stop - mine.start]
                seen += len(window)
                window, position = batch[window[inside]], position[inside]
                arrays["rows/window"][here], arrays["rows/position"][here] = window, position
                token = windows.token_start[window] + np.maximum(position - int(windows.policy.bos), 0)
                for future in pending:
                    future.result()
                pending = [
                    threads.submit(keep, site, here, rows[site.label][inside], token, position) for site in self.sites
                ]
                advance(len(here))
            for future in pending:
                future.result()
        return arrays, {label: found.record() for label, found in moments.items()}

    def channels(self, text: SegmentText) -> dict[str, Channels]:
        """Mean and deviation of each site's channels over the plan's first 256 training windows, where int8 needs them."""
        labels = int8_sites(self.manifest)
        if not labels:
            return {}
        moments = {label: Moments(self.manifest.array(f"acts/{label}").width) for label in labels}
        part = PARTS[0] if len(text.windows[PARTS[0]]) else PARTS[1]
        for _, _, rows in self._activations(text.windows[part], text.plans[part].window_order[:CHANNEL_WINDOWS]):
            for label in labels:
                moments[label].update(rows[label])
        return {label: found.channels() for label, found in moments.items()}

    def probe(self, windows: Windows) -> str:
        """crc32c of what this machine computes for the first windows: equal probes write equal bytes."""
        checksum = 0
        for rows in self.first_rows(windows).values():
            checksum = google_crc32c.extend(checksum, rows.tobytes())
        return f"{checksum:08x}"

    def first_rows(self, windows: Windows) -> dict[str, Rows]:
        """The rows of each site of the first batch of windows, by label in order."""
        first = np.arange(min(len(windows), self.batch_windows))
        found = next(iter(self._activations(windows, first)), (None, None, {}))[2]
        return dict(sorted(found.items()))

    def run(self, windows: Windows, chosen: Ints) -> None:
        """The forward passes of some windows and nothing else, to see how long they take."""
        for _ in self._activations(windows, chosen):
            pass

    def environment(self, probe: str) -> dict[str, Any]:
        """What computes the rows; two environments whose probes agree write the same bytes."""
        import transformers

        return {
            "device": torch.cuda.get_device_name() if self.device.startswith("cuda") else self.device,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "batch_windows": self.batch_windows,
            "probe_crc32c": probe,
        }

    def _activations(self, windows: Windows, chosen: Ints) -> Iterator[tuple[Ints, NDArray[np.bool_], dict[str, Rows]]]:
        """(window ids, kept positions, kept rows of each site in float32), batch after batch.

        Batches have near-equal numbers of windows: a small last one would cost more a window than the others.
        """
        n_batches = -(-len(chosen) // self.batch_windows)
        for batch in np.array_split(chosen, n_batches) if n_batches else []:
            inputs, kept = windows.batch(batch)
            found = capture(self.model, self.sites, torch.from_numpy(inputs).to(self.device))
            mask = torch.from_numpy(kept).to(self.device)
            yield batch, kept, {label: values[mask].float().cpu().numpy() for label, values in found.items()}


def int8_sites(manifest: Manifest) -> list[str]:
    """The sites whose rows are measured by channels."""
    return [label for label in manifest.sites if manifest.array(f"acts/{label}").encoding == "int8"]


def channels_of(store: Store, segment: SegmentRecord) -> dict[str, Channels]:
    """What a published segment's int8 sites are measured by."""
    return {label: store.channels(segment.index, f"acts/{label}") for label in int8_sites(store.manifest)}


def require_same_probe(where: str, segment: SegmentRecord, maker: ShardMaker, probe: str) -> None:
    """Raises IdentityMismatch when this machine computes other bits than the one that began a segment."""
    environment = segment.environment
    if environment["probe_crc32c"] != probe:
        raise IdentityMismatch(
            f"{where}: segment {segment.index} was begun with --batch-windows {environment['batch_windows']} on hardware "
            f"whose probe is {environment['probe_crc32c']} ({environment['cpu']}, torch {environment['torch']}), with "
            f"{maker.batch_windows} here it is {probe}; continue as it was begun, or pass --mixed-hardware to accept rows "
            "that differ in their last bits."
        )
