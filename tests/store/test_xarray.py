"""What a library of labelled arrays sees in a store: axes that have names, and rows that say where they stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from storekit import TWO_SEGMENTS, write_store

from actstore.arrays import group_objects
from actstore.dimensions import row_dimensions
from actstore.layout import Layout
from actstore.reader import ActivationStore
from actstore.schema import RowArray


def test_xarray_opens_a_store_with_named_dimensions_and_coordinates(tmp_path: Path) -> None:
    store = ActivationStore(write_store(tmp_path / "store", TWO_SEGMENTS))
    tree = xr.open_datatree(tmp_path / "store/data.zarr", engine="zarr", consolidated=False)
    segment = tree["segments/0000"]
    assert segment["tokens"]["ids"].dims == ("tokens",)
    assert segment["documents"]["heldout"].dims == ("documents",)
    assert segment["documents"].sizes["document_bounds"] == segment["documents"].sizes["documents"] + 1
    assert segment["train/windows"]["token_start"].dims == ("windows",)

    train = segment["train"]
    rows = xr.merge([train["rows"].to_dataset(), train["acts"].to_dataset()])
    assert set(rows.coords) == {"window", "position"}
    assert {rows[site].dims for site in store.sites} == {("rows", "channels")}
    shard = store.shards()[0]
    for name in ("rows/window", "rows/position", "acts/resid_post.0"):
        seen = rows[name.partition("/")[2]].values[: shard.n_rows]
        np.testing.assert_array_equal(seen, store.read(shard, name))


def test_xarray_opens_one_group_of_a_store_with_open_zarr(tmp_path: Path) -> None:
    write_store(tmp_path / "store", TWO_SEGMENTS)
    rows = xr.open_zarr(tmp_path / "store/data.zarr", group="segments/0001/train/rows", consolidated=False)
    assert set(rows.coords) == {"window", "position"}
    acts = xr.open_zarr(tmp_path / "store/data.zarr", group="segments/0001/train/acts", consolidated=False)
    assert acts["resid_post.0"].dims == ("rows", "channels")
    assert acts.sizes["rows"] == rows.sizes["rows"]


def test_sites_of_two_widths_are_opened_as_one_dataset(tmp_path: Path) -> None:
    """Two lengths of one dimension in a group would be an error of xarray."""
    widths = {"acts/resid_post.3": 64, "acts/attn_out.3": 64, "acts/mlp_hidden.3": 256}
    arrays = [(name, RowArray(name, width, "float32", "fp32"), Layout(8, 8, 4), 8) for name, width in widths.items()]
    dimensions = {name: row_dimensions(name, width, d_model=64) for name, width in widths.items()}
    for name, data in group_objects("train", {}, arrays, dimensions).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    acts = xr.open_zarr(tmp_path / "data.zarr", group="train/acts", consolidated=False)
    assert dict(acts.sizes) == {"rows": 8, "channels": 64, "channels_256": 256}
    assert acts["resid_post.3"].dims == acts["attn_out.3"].dims == ("rows", "channels")
