"""In: a corpus and a language model. Out: a store of activations, extended or resumed where its last commit was.

The model runs once over windows in the order of the plan; each shard is computed from the windows that touch it,
at exactly `context` tokens in batches that start at the shard's first window: the shapes of a shard's forward passes,
and so its bytes, do not depend on what was computed before it. A shard is written while the next one is computed.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from actstore import paths
from actstore.codecs import ACTIVATION_ENCODINGS, ENCODINGS, encode_rows
from actstore.errors import EncodingError, IdentityMismatch, InputError
from actstore.files import publish_json, require_free_space
from actstore.layout import Layout, choose_layout
from actstore.plan import PartPlan
from actstore.schema import (
    PARTS,
    CorpusIdentity,
    Manifest,
    PartRecord,
    RowArray,
    SegmentRecord,
    WindowPolicy,
)
from actstore.writer import StoreWriter, require_store_place, write_shard
from pipelines.capture import (
    DTYPES,
    Site,
    blocks_of,
    capture,
    choose_device,
    load_model,
    model_identity,
    resolve_model,
    site_module,
)
from pipelines.corpus import Corpus, open_corpus
from pipelines.progress import Tracker, track
from pipelines.tokens import TextCodec, TokenTable, load_tokenizer, tokenize_documents
from pipelines.windows import Windows, cut_windows

SEGMENT_TOKENS = 64 << 20
"""A larger corpus becomes several segments, so that the first row does not wait for all tokenising."""
PACKINGS = ("packed", "document")


@dataclass(frozen=True)
class CollectConfig:
    """What `collect` is asked for; the names are the command's options."""

    out: Path
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
    mixed_hardware: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.context < 2 or self.batch_windows < 1:
            raise InputError(
                f"tokens {self.tokens}, context {self.context}, batch windows {self.batch_windows}: at least 1, 2 and 1."
            )
        if self.encoding not in ACTIVATION_ENCODINGS or self.compute_dtype not in DTYPES or self.packing not in PACKINGS:
            raise InputError(
                f"encoding {self.encoding!r}, compute dtype {self.compute_dtype!r}, packing {self.packing!r}: choose from "
                f"{', '.join(ACTIVATION_ENCODINGS)}; {', '.join(DTYPES)}; {', '.join(PACKINGS)}."
            )


def collect(config: CollectConfig) -> dict[str, Any]:
    """Build, extend or finish the store at `config.out`; returns what `info` would say of the work done.

    Nothing is written before the model, the layers, the corpus and the disk space have been checked. Raises
    InputError, IdentityMismatch, OutputExists, NoSpace, LockedStore or EncodingError; committed shards stay.
    """
    require_store_place(config.out)
    device = choose_device(config.device)
    model = load_model(config.model, device, "fp32")
    sites = _sites(config, model)
    codec, tokenizer_files = load_tokenizer(resolve_model(config.model))
    _require_same_vocabulary(config, model, codec)
    corpus = open_corpus(config.corpus, config.seed)
    manifest = _manifest(config, model, sites, codec, corpus)
    model = model.to(getattr(torch, DTYPES[config.compute_dtype]))
    run = _Run(config, manifest, model, sites, device)

    is_new = not (config.out / paths.MANIFEST).exists()
    first_table = run.next_table(corpus, codec, [], config.tokens) if is_new else None
    if is_new and first_table is None:
        raise InputError(f"corpus {config.corpus}: has no text; nothing was written.")
    with StoreWriter.open(config.out, manifest, tokenizer_files) as writer:
        committed_before = _n_committed(config.out)
        for segment in writer.segments():
            run.fill(writer, segment)
        while (left := config.tokens - sum(segment.n_tokens for segment in writer.segments())) > 0:
            table = first_table or run.next_table(corpus, codec, writer.segments(), left)
            first_table = None
            if table is None:
                break
            run.fill(writer, run.add_segment(writer, table))
        segments = writer.segments()
    return {
        "store": str(config.out),
        "store_id": manifest.store_id,
        "tokens": sum(segment.n_tokens for segment in segments),
        "rows": sum(part.n_rows for segment in segments for part in segment.parts.values()),
        "shards": _n_committed(config.out),
        "shards_committed_before": committed_before,
        "corpus_exhausted": sum(segment.n_tokens for segment in segments) < config.tokens,
    }


@dataclass(frozen=True)
class _Run:
    """One collection under way: what every shard needs to be computed."""

    config: CollectConfig
    manifest: Manifest
    model: nn.Module
    sites: list[Site]
    device: str

    def next_table(
        self, corpus: Corpus, codec: TextCodec, segments: list[SegmentRecord], n_tokens: int
    ) -> TokenTable | None:
        """The token table after the segments there are, once the disk has been found large enough for its rows."""
        skip = sum(segment.n_documents for segment in segments)
        modulus = segments[0].heldout_modulus if segments else None
        table = tokenize_documents(corpus.documents(skip), codec, min(n_tokens, SEGMENT_TOKENS), modulus)
        if table is not None:
            require_free_space(self.config.out, len(table.ids) * (self._row_bytes() + 16), f"{len(table.ids):,} tokens")
        return table

    def add_segment(self, writer: StoreWriter, table: TokenTable) -> SegmentRecord:
        """Publish a token table, its windows and its plan's cut into shards as the next segment."""
        segments = writer.segments()
        tables: dict[str, NDArray[Any]] = {
            "tokens/ids": table.ids,
            "documents/offsets": table.offsets,
            "documents/heldout": table.heldout,
            "documents/source": np.frombuffer("\n".join(table.names).encode(), np.uint8),
        }
        parts = {}
        for index, part in enumerate(PARTS):
            windows = cut_windows(table, part, self.manifest.policy)
            kept = windows.kept_counts()
            pooled = max(array.width for array in self.manifest.arrays) * np.dtype(np.float32).itemsize
            layout = choose_layout(int(kept.sum()), self._row_bytes(), pooled)
            plan = PartPlan.build(self.config.seed, len(segments), index, layout, kept)
            tables[f"{part}/windows/token_start"] = windows.token_start
            tables[f"{part}/windows/n_tokens"] = windows.n_tokens.astype(np.uint32)
            tables[f"{part}/windows/first_row"] = plan.first_rows
            parts[part] = PartRecord(len(windows), layout.n_rows, layout.shard_rows, layout.chunk_rows)
        record = SegmentRecord(
            index=len(segments),
            first_document=sum(segment.n_documents for segment in segments),
            n_documents=len(table.names),
            n_tokens=len(table.ids) - len(table.names),
            heldout_modulus=table.heldout_modulus,
            parts=parts,
            environment=self._environment(self._probe(cut_windows(table, PARTS[0], self.manifest.policy))),
            objects={},
        )
        return writer.add_segment(record, tables)

    def fill(self, writer: StoreWriter, segment: SegmentRecord) -> None:
        """Compute and commit every missing shard of a segment, then seal it."""
        missing = writer.missing_shards(segment.index)
        if missing:
            windows = {part: self._windows(writer.path, segment, part) for part in PARTS}
            plans = {part: self._plan(segment, part, windows[part]) for part in PARTS}
            self._require_same_hardware(segment, windows[PARTS[0]])
            n_rows = sum(stop - start for start, stop in (segment.parts[p].layout.shard_range(s) for p, s in missing))
            require_free_space(self.config.out, n_rows * self._row_bytes(), f"{n_rows:,} rows")
            with track("collect", n_rows) as progress, ThreadPoolExecutor(1) as pool:
                pending: Future[None] | None = None
                for part, shard in missing:
                    arrays = self._shard(plans[part], windows[part], shard, progress)
                    if pending is not None:
                        pending.result()
                    pending = pool.submit(write_shard, writer.path, self.manifest, segment, part, shard, arrays)
                if pending is not None:
                    pending.result()
        if not paths.sealed_record(writer.path, segment.index).exists():
            writer.seal(segment.index)

    def _shard(self, plan: PartPlan, windows: Windows, shard: int, progress: Tracker) -> dict[str, NDArray[Any]]:
        """Every array of one shard, in disk order, and the moments of its activations."""
        chosen, mine = plan.shard_windows(shard)
        place = np.argsort(plan.row_order(shard))
        arrays = {array.name: np.empty((len(place), *array.tail), array.dtype) for array in self.manifest.arrays}
        sums: dict[str, NDArray[np.float64]] = {}
        seen = 0
        for batch, kept, rows in self._activations(windows, chosen):
            window, position = np.nonzero(kept)
            inside = slice(max(mine.start - seen, 0), max(min(mine.stop - seen, len(window)), 0))
            here = place[seen + inside.start - mine.start : seen + inside.stop - mine.start]
            seen += len(window)
            window, position = batch[window[inside]], position[inside]
            arrays["rows/window"][here], arrays["rows/position"][here] = window, position
            for site in self.sites:
                array = self.manifest.array(f"acts/{site.label}")
                values = rows[site.label][inside]
                try:
                    arrays[array.name][here] = encode_rows(values, array.encoding)
                except EncodingError as error:
                    token = windows.token_start[window[error.row]] + position[error.row] - int(self.config.bos)
                    raise self._at_token(error, site, int(token), int(position[error.row])) from error
                own = values.astype(np.float64)
                moments = np.stack([own.sum(axis=0), np.square(own).sum(axis=0)])
                sums[site.label] = sums.get(site.label, 0.0) + moments
            progress.advance(len(here))
        return arrays | {f"stats/{label}": total / len(place) for label, total in sums.items()}

    def _activations(
        self, windows: Windows, chosen: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, NDArray[np.float32]]]]:
        """(window ids, kept positions, kept rows of each site in float32), batch after batch; the last may be short."""
        size = self.config.batch_windows
        for start in range(0, len(chosen), size):
            batch = chosen[start : start + size]
            inputs, kept = windows.batch(batch)
            found = capture(self.model, self.sites, torch.from_numpy(inputs).to(self.device))
            mask = torch.from_numpy(kept).to(self.device)
            yield batch, kept, {label: values[mask].float().cpu().numpy() for label, values in found.items()}

    def _windows(self, store: Path, segment: SegmentRecord, part: str) -> Windows:
        from actstore.reader import Store

        reader = Store(store, partial=True)
        return Windows(
            reader.table(segment.index, "tokens/ids"),
            reader.table(segment.index, f"{part}/windows/token_start"),
            reader.table(segment.index, f"{part}/windows/n_tokens").astype(np.int64),
            self.manifest.policy,
        )

    def _plan(self, segment: SegmentRecord, part: str, windows: Windows) -> PartPlan:
        layout: Layout = segment.parts[part].layout
        return PartPlan.build(self.config.seed, segment.index, PARTS.index(part), layout, windows.kept_counts())

    def _probe(self, windows: Windows) -> str:
        """crc32c of what this machine computes for the first windows: equal probes write equal bytes."""
        checksum = 0
        first = np.arange(min(len(windows), self.config.batch_windows))
        for _, _, rows in self._activations(windows, first):
            for label in sorted(rows):
                checksum = google_crc32c.extend(checksum, rows[label].tobytes())
        return f"{checksum:08x}"

    def _environment(self, probe: str) -> dict[str, Any]:
        """What computes the rows; two environments whose probes agree write the same bytes."""
        import transformers

        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else self.device,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "batch_windows": self.config.batch_windows,
            "probe_crc32c": probe,
        }

    def _require_same_hardware(self, segment: SegmentRecord, windows: Windows) -> None:
        theirs, ours = segment.environment["probe_crc32c"], self._probe(windows)
        if theirs != ours and self.config.mixed_hardware:
            publish_json(paths.commits(self.config.out, segment.index) / f"mixed-{ours}.json", self._environment(ours))
        elif theirs != ours:
            raise IdentityMismatch(
                f"{self.config.out}: segment {segment.index} was begun with --batch-windows "
                f"{segment.environment['batch_windows']} on hardware whose probe is {theirs} ({segment.environment['cpu']}, "
                f"torch {segment.environment['torch']}), with {self.config.batch_windows} here it is {ours}; continue as it "
                "was begun, or pass --mixed-hardware to accept rows that differ in their last bits."
            )

    def _at_token(self, error: EncodingError, site: Site, token: int, position: int) -> EncodingError:
        """Say which token of the corpus a row that cannot be kept stands at."""
        return EncodingError(
            f"{site.label}: token {token} of the table, position {position} of its window: {error}", error.row
        )

    def _row_bytes(self) -> int:
        """Bytes of one row over all sites, before compression."""
        return sum(max(array.width, 1) * np.dtype(array.dtype).itemsize for array in self.manifest.arrays)


def _sites(config: CollectConfig, model: nn.Module) -> list[Site]:
    """Every asked (site, layer), checked against the model; without a layer, the middle one."""
    layers = config.layer or (len(blocks_of(model)) // 2,)
    sites = [Site(name, layer) for layer in sorted(set(layers)) for name in dict.fromkeys(config.site)]
    for site in sites:
        site_module(model, site)
    limit = cast(Any, model).config.max_position_embeddings
    if config.context > limit:
        raise InputError(f"context {config.context}: the model has {limit} positions; choose --context {limit} or less.")
    return sites


def _require_same_vocabulary(config: CollectConfig, model: nn.Module, codec: TextCodec) -> None:
    known, given = cast(Any, model).config.vocab_size, codec.backend.get_vocab_size()
    if given > known:
        raise InputError(
            f"model {config.model}: its tokenizer has {given} tokens, the model knows {known}; put the right one beside it."
        )


def _manifest(config: CollectConfig, model: nn.Module, sites: list[Site], codec: TextCodec, corpus: Corpus) -> Manifest:
    identity = model_identity(model)
    dtype = ENCODINGS[config.encoding].dtype
    return Manifest(
        kind="activations",
        model=identity,
        tokenizer_sha256=codec.sha256,
        corpus=CorpusIdentity(corpus.spec, corpus.fingerprint),
        policy=WindowPolicy(
            context=config.context,
            bos=config.bos,
            packing=config.packing,
            keep_special=config.keep_special,
            bos_token_id=codec.bos_token_id,
            separator_token_id=codec.separator_token_id,
        ),
        arrays=(
            RowArray("rows/window", 0, "uint32", "raw"),
            RowArray("rows/position", 0, "uint16", "raw"),
            *(RowArray(f"acts/{site.label}", identity.d_model, dtype, config.encoding) for site in sites),
        ),
        compute_dtype=config.compute_dtype,
        seed=config.seed,
        provenance={"model": config.model},
    )


def _n_committed(store: Path) -> int:
    return sum(1 for _ in (store / "commits").glob("*/*/*.json"))
