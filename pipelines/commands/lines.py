"""Results as the lines that a user wants first; `--json` and the files have the rest."""

from __future__ import annotations

from typing import Any

from pipelines.commands.output import duration, number, size

UNUSUAL_SHARE = 0.3
"""From this share of held-out tokens on, a collection is warned."""
SHOWN_NAMES = 5
"""Most names of a list that are printed; the others are counted."""

SHOWN_VALUES = 14
"""Most values of a record that `info` prints of results it knows no more of."""
Fields = list[tuple[str, str | None]]


def aligned(fields: Fields) -> list[str]:
    """`label  text` with the texts below one another; a field without text is left out."""
    width = max(len(label) for label, _ in fields)
    return [f"{label:<{width}}  {text}" for label, text in fields if text]


def some(names: list[str]) -> str:
    """The first names of a list, and how many there are beyond them."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def collect_lines(result: dict[str, Any]) -> list[str]:
    n, replaced = result.get("control_tokens", 0), result.get("lone_surrogates")
    before = result["shards_committed_before"]
    return aligned(
        [
            ("store", f"{result['store']} (id {result['store_id']})"),
            ("rows", f"{result['rows']:,} from {result['tokens']:,} tokens"),
            ("shards", f"{result['shards']:,}" + (f", {before:,} of them were there before" if before else "")),
            ("device", result.get("device")),
            (
                "control",
                f"{n:,} tokens of the text are special tokens: this tokenizer cannot take them as text" if n else None,
            ),
            ("corpus", "exhausted: it has no more tokens" if result["corpus_exhausted"] else None),
            ("skipped", result.get("corpus_skipped")),
            ("surrogates", f"{replaced:,} lone, replaced by U+FFFD" if replaced else None),
            *_split_lines(result["added"]),
        ]
    )


def _split_lines(added: dict[str, int]) -> list[tuple[str, str | None]]:
    """What was held out of the text that was added, and what that text says twice."""
    if not added["documents"]:
        return []
    share = added["heldout_tokens"] / max(added["tokens"], 1)
    warning = None
    if not added["heldout"]:
        warning = "nothing is held out, so nothing can be evaluated on other text: collect several documents"
    elif share > UNUSUAL_SHARE:
        warning = f"{share:.0%} of the tokens are held out and not trained on: collect more documents, or smaller ones"
    repeated, near = added["repeated"], added["near"]
    return [
        ("held out", f"{share:.1%} of the tokens, {added['heldout']:,} of {added['documents']:,} documents"),
        (
            "copies",
            f"{repeated:,} documents repeat the text of another, on the same side of the split" if repeated else None,
        ),
        ("near copies", f"{near:,} held-out documents share half of their text with training documents" if near else None),
        ("warning", warning),
    ]


def estimate_lines(result: dict[str, Any]) -> list[str]:
    arrays = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in result["disk_bytes_by_array"].items())
    return aligned(
        [
            ("rows", f"{result['rows']:,} from {result['tokens']:,} tokens"),
            ("disk", f"{size(result['disk_bytes'])} ({arrays})"),
            ("memory", size(result["memory_bytes"])),
            ("time", f"{duration(result['seconds'])} at {result['tokens_per_s']:,} tokens/s"),
            ("device", result["device"]),
            ("skipped", result.get("corpus_skipped")),
            (
                "shards",
                f"{result['shards']:,} of {result['shard_rows']:,} rows, in chunks of {result['chunk_rows']:,} rows",
            ),
        ]
    )


def repair_lines(result: dict[str, Any]) -> list[str]:
    return aligned(
        [
            ("store", result["store"]),
            ("faults", f"{result['faults']:,}"),
            ("restored", some(result["restored"])),
            ("dropped", some(result["dropped"])),
            ("shards", some(result["shards"])),
            ("next", result.get("next")),
        ]
    )


def recode_lines(result: dict[str, Any]) -> list[str]:
    return aligned(
        [
            ("store", f"{result['store']} (id {result['store_id']})"),
            ("rows", f"{result['rows']:,}"),
            ("disk", f"{size(result['disk_bytes'])}, {result['of_the_source']:.1%} of the source"),
            *((f"unexplained, {site}", number(share)) for site, share in result["unexplained"].items()),
        ]
    )


def train_lines(result: dict[str, Any]) -> list[str]:
    """A run that has just been trained; figures are those of its last step."""
    wait = result["data_wait_share"]
    speed = f"{result['rows_per_s']:,} rows/s, {duration(result['seconds'])}" + (
        f", {wait:.0%} of it waiting for data" if wait >= 0.01 else ""
    )
    return aligned(
        [
            *_run_fields(result),
            ("speed", f"{speed}, on {result['device']} (kernel {result['config']['kernel']})"),
            ("more", f"{result['path']}/run.json, or --json"),
        ]
    )


def _run_fields(run: dict[str, Any]) -> Fields:
    """What a run is, from its record with `path` and `run_id`."""
    config, metrics = run.get("config", run), run["metrics"]
    identity: Fields = [
        ("run", f"{run['path']} (id {run['run_id']})"),
        ("SAE", f"{run['architecture']}, {run['n_features']:,} features, k {run['k']}, d_model {run['d_model']:,}"),
    ]
    if "origin" in config:
        origin = config["origin"]
        return [
            *identity,
            ("imported", f"run {origin['run_id'] or 'not named'} of {origin['model'] or 'a model that is not named'}"),
            ("reads", f"{run['site']} of {config['store']} (id {run['store_id']})"),
            ("silent", f"{metrics['dead_features']:,} features in {metrics['dead_window_rows']:,} rows of the store"),
        ]
    l1 = f", l1 {number(config['l1'])}" if config["l1"] else ""
    return [
        *identity,
        ("trained on", f"{run['site']} of {config['store']} (id {run['store_id']}), {run['rows_seen']:,} rows"),
        ("rate", f"lr {number(config['lr'])}{l1}"),
        ("FVE", number(metrics["fve"])),
        ("L0", number(metrics["l0"])),
        ("dead", f"{metrics['dead']:.1%} of the features"),
        ("loss", number(metrics["loss"])),
    ]


def encode_lines(result: dict[str, Any]) -> list[str]:
    cut = f"{result['codes_cut']:,} codes in {result['rows_cut']:,} rows did not fit" if result["codes_cut"] else None
    return aligned(
        [
            ("codes", f"{result['codes']} (id {result['store_id']})"),
            ("rows", f"{result['rows']:,}"),
            ("features", f"{result['features']:,}, at most {result['code_width']:,} of a row"),
            ("cut", cut),
            ("disk", size(result["disk_bytes"])),
        ]
    )


def analysis_lines(result: dict[str, Any]) -> list[str]:
    """An analysis, from its record with `path`."""
    return aligned(
        [
            ("analysis", result["path"]),
            ("codes", f"{result['codes']} (id {result['codes_id']})"),
            ("run", f"{result['run']} (id {result['run_id']}), {result['site']}"),
            ("store", f"{result['store']} (id {result['store_id']})"),
            ("model", f"{result['model']} on {result['corpus']}"),
            ("rows", f"{result['n_rows']:,}, {result['k']} codes of each at most"),
            ("features", f"{result['n_features']:,}"),
            ("by frequency", ", ".join(f"{band} {n:,}" for band, n in result["bands"].items())),
            ("pairs", f"{result['pairs_kept']:,} kept of {result['pairs']:,}, within {result['within']}"),
            ("disk", size(result["disk_bytes"]) if "disk_bytes" in result else None),
        ]
    )


def report_lines(result: dict[str, Any]) -> list[str]:
    return aligned([("page", f"{result['page']}, {result['features']:,} features, {size(result['bytes'])}")])


def info_lines(facts: dict[str, Any]) -> list[str]:
    """What `info` says of each kind."""
    if facts["kind"] == "run":
        fields = [*_run_fields(facts), ("model", facts["model"]), ("disk", size(facts["disk_bytes"]))]
        return aligned([("kind", "run"), *fields])
    if facts["kind"] == "analysis":
        return ["kind          analysis", *analysis_lines(facts)]
    if facts["kind"] == "sweep":
        from pipelines.train.sweep_record import comparison_table

        return [
            *aligned([("kind", "sweep"), ("folder", facts["path"]), ("store", facts["store"])]),
            *comparison_table(facts),
        ]
    if facts["kind"] not in ("activations", "codes"):
        return _results_lines(facts)
    return _store_lines(facts)


def _results_lines(facts: dict[str, Any]) -> list[str]:
    """Other results, such as those of `structure`: their record's plain values."""
    apart = ("kind", "path", "objects", "disk_bytes")
    shown = [(name.replace("_", " "), str(facts[name])) for name in facts if name not in apart][:SHOWN_VALUES]
    files = f"{facts['objects']:,} files, {size(facts['disk_bytes'])}"
    return aligned([("kind", facts["kind"]), ("folder", facts["path"]), *shown, ("disk", files)])


def _store_lines(facts: dict[str, Any]) -> list[str]:
    rows, shards = facts["rows"], (facts["shards_committed"], facts["shards_planned"])
    is_codes = facts["kind"] == "codes"
    made_from = facts["source"].get("store_id")
    index = "with a feature index" if facts.get("feature_index") else "without a feature index: run `encode` again"
    return aligned(
        [
            ("kind", facts["kind"]),
            ("store", f"{facts['path']} (id {facts['store_id']}, snapshot {facts['snapshot']})"),
            ("model", f"{facts['model']} (weights {facts['weights']}), context {facts['context']}"),
            ("corpus", f"{facts['corpus']}, {facts['tokens']:,} tokens, seed {facts['seed']}"),
            ("made from", f"store {facts.get('store', '')} (id {made_from})".replace("  ", " ") if made_from else None),
            ("run", f"{facts['run']} (id {facts['source']['run_id']}), {facts['source']['site']}" if is_codes else None),
            ("features", f"{facts['features']:,}, at most {facts['code_width']} of a row; {index}" if is_codes else None),
            ("rows", f"{rows['train']:,} to train on, {rows['heldout']:,} held out"),
            ("shards", f"{shards[0]:,} of {shards[1]:,}" + ("" if shards[0] == shards[1] else ": half-written")),
            *((name, text) for name, text in facts["arrays"].items()),
            ("computed in", facts["compute_dtype"]),
            ("disk", f"{size(facts['disk_bytes'])}, {size(facts['disk_bytes_per_million_tokens'])} a million tokens"),
        ]
    )
