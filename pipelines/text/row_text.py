"""In: a store and the number of a row. Out: the token, the document and the text it stands in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from actstore import paths
from actstore.reader import Store
from pipelines.text.tokenizer_files import store_tokenizer

CONTEXT_TOKENS = 24


def describe_row(url: str | Path, row: int, part: str = "train") -> dict[str, Any]:
    """Where a row comes from, and its document's text around its token. Raises InputError when there is no such row."""
    store = Store(url, partial=True)
    origin, codec = store.locate(row, part), store_tokenizer(store)
    ids = store.table(origin.segment, paths.TOKEN_IDS)
    at = max(origin.token_index, origin.document_start - 1)
    first, last = max(at - CONTEXT_TOKENS, origin.document_start), min(at + CONTEXT_TOKENS, origin.document_stop)
    if origin.token_index >= 0:
        before, token, after = codec.around(ids[first:last], at - first)
    else:
        before, token, after = "", codec.token_text(codec.bos_token_id), codec.text(ids[origin.document_start : last])
    return {**asdict(origin), "token": token, "text": f"{before}[[{token}]]{after}"}
