"""What the axes of a store's arrays are called, so that xarray joins arrays along the axes they share. Pure."""

from __future__ import annotations

from actstore import paths

ROWS, CHANNELS = "rows", "channels"
_TABLES = {
    paths.TOKEN_IDS: "tokens",
    paths.DOCUMENT_OFFSETS: "document_bounds",
    paths.DOCUMENT_HELDOUT: "documents",
    paths.DOCUMENT_KEYS: "documents",
    paths.DOCUMENT_SOURCE: "name_bytes",
}


def table_dimensions(name: str, shape: tuple[int, ...], d_model: int) -> tuple[str, ...]:
    """The axes of a table of a segment, named as the segment's group names it.

    >>> table_dimensions("documents/offsets", (9,), 64), table_dimensions("channels/resid_post.3", (2, 64), 64)
    (('document_bounds',), ('mean_deviation', 'channels'))
    """
    if name in _TABLES:
        return (_TABLES[name],)
    if len(shape) == 2:
        return ("mean_deviation", _channels(shape[1], d_model))
    return ("windows",)


def row_dimensions(name: str, width: int, d_model: int) -> tuple[str, ...]:
    """The axes of a row array: its rows, and what a row has.

    Two sites share `channels` only where both have the model's width, since a group with two lengths of one
    dimension can't be opened as one dataset.

    >>> row_dimensions("acts/resid_post.3", 64, 64), row_dimensions("acts/mlp_hidden.3", 256, 64)
    (('rows', 'channels'), ('rows', 'channels_256'))
    """
    if not width:
        return (ROWS,)
    return (ROWS, "k" if name in paths.CODES else _channels(width, d_model))


def _channels(width: int, d_model: int) -> str:
    return CHANNELS if width == d_model else f"{CHANNELS}_{width}"
