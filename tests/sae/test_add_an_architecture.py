"""An architecture is one file: a module laid in their folder is trained, saved, loaded, encoded and offered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from folderkit import file_added
from storekit import StoreSpec, write_store

import pipelines.sae.architectures
from actstore.errors import InputError
from actstore.reader import ActivationStore
from cli import cli
from pipelines.sae.architectures.registry import architectures, make
from pipelines.sae.checkpoint import load_run
from pipelines.train.config import TrainConfig
from pipelines.train.stage import train

SITE = "resid_post.0"
TOY = '''
"""Every feature whose pre-activation exceeds a margin, which is learnt with the rest."""

import torch
from torch import nn

from pipelines.sae.base import Codes, Sae


class MarginSae(Sae):
    architecture = "margin"
    in_units_of_x = (*Sae.in_units_of_x, "margin")

    def __init__(self, d_model, n_features, k, *, seed=0):
        super().__init__(d_model, n_features, k, seed=seed)
        self.margin = nn.Parameter(torch.full((n_features,), 0.1))

    def codes(self, x, kernel="sparse-fp32"):
        pre, active = self.preactivations_above(x, self.b_enc, self.margin.detach(), kernel)
        return Codes((pre - self.margin[active.features]).relu(), active)

    def training_codes(self, x, kernel):
        return self.codes(x, kernel)
'''


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, StoreSpec())
    return path


@pytest.fixture
def added(tmp_path: Path) -> Iterator[None]:
    folder = tmp_path / "added"
    folder.mkdir()
    with file_added(pipelines.sae.architectures, architectures, folder, "margin", TOY):
        yield


@pytest.mark.usefixtures("added")
def test_it_is_trained_saved_loaded_and_encoded(rows_store: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        rows_store, tmp_path / "run", layer=0, architecture="margin", features=16, k=2, batch=64, device="cpu"
    )
    result = train(config)
    assert (result["architecture"], result["rows_seen"] > 0) == ("margin", True)
    sae, record = load_run(tmp_path / "run")
    assert (sae.architecture, record.k) == ("margin", 2)
    margin = sae.get_parameter("margin")
    assert bool((margin * record.input_scale != 0.1).any()), "it was trained"

    store = ActivationStore(rows_store)
    rows = torch.from_numpy(store.read(store.shards()[0], f"acts/{SITE}"))
    values, indices = sae.encode(rows)
    pre = (rows - sae.b_dec) @ sae.W_enc.T + sae.b_enc - margin
    dense = torch.zeros_like(pre).scatter_add(1, indices, values)
    torch.testing.assert_close(dense, pre.relu(), rtol=1e-4, atol=1e-4 * float(pre.max()))


@pytest.mark.usefixtures("added")
def test_the_commands_take_it_beside_the_others(rows_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [
        "--layer",
        "0",
        "--architecture",
        "margin",
        "--features",
        "16",
        "--k",
        "2",
        "--batch",
        "64",
        "--device",
        "cpu",
    ]
    for arguments in (
        ["train", str(rows_store), "--out", str(run), *options],
        ["export", str(run), "--out", str(tmp_path / "a.npz")],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert (arguments[0], result.exit_code) in (("train", 0), ("export", 1)), result.output
    assert "its architecture is margin, npz keeps" in result.output


@pytest.mark.usefixtures("added")
def test_it_is_offered_where_a_name_is_wrong() -> None:
    with pytest.raises(InputError, match="choose one of batchtopk, gated, jumprelu, margin, matryoshka, relu, topk"):
        make("none", 4, 8, 2)


def test_it_is_gone_with_its_file() -> None:
    with pytest.raises(InputError, match="architecture 'margin': there is none"):
        make("margin", 4, 8, 2)
