"""The tables of a segment, by name: its text, its windows, and the channels' means and deviations. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.encodings.channels import Channels

Tables = dict[str, NDArray[Any]]


def text_tables(
    ids: NDArray[np.unsignedinteger[Any]],
    offsets: NDArray[np.int64],
    heldout: NDArray[np.uint8],
    names: Sequence[str],
    keys: NDArray[np.uint64],
) -> Tables:
    """A segment's text: token ids (n_tokens,), and each document's first token, with the end, split, name and text key."""
    return {
        paths.TOKEN_IDS: ids,
        paths.DOCUMENT_OFFSETS: offsets,
        paths.DOCUMENT_HELDOUT: heldout,
        paths.DOCUMENT_SOURCE: np.frombuffer("\n".join(names).encode(), np.uint8),
        paths.DOCUMENT_KEYS: keys,
    }


def document_names(source: NDArray[np.uint8]) -> list[str]:
    """The names that `text_tables` was given, from its table `documents/source`."""
    return bytes(source).decode().split("\n")


def window_tables(
    part: str, token_start: NDArray[np.int64], n_tokens: NDArray[np.integer[Any]], first_row: NDArray[np.int64]
) -> Tables:
    """A split's windows, (n_windows,) each: first token, number of tokens, and plan row of the first kept row."""
    return {
        paths.window_table(part, paths.TOKEN_START): token_start,
        paths.window_table(part, paths.N_TOKENS): n_tokens.astype(np.uint32),
        paths.window_table(part, paths.FIRST_ROW): first_row,
    }


def channel_tables(channels: Mapping[str, Channels]) -> Tables:
    """The tables of the sites' channel means and deviations."""
    return {paths.channels(site): measured.table for site, measured in channels.items()}
