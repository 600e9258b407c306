"""A format is one file: a module laid in the folder of formats is offered by `export` and `import`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from exchangekit import moved_sae, write_run
from folderkit import file_added
from storekit import StoreSpec, write_store

import pipelines.exchange.formats
from actstore.errors import InputError
from cli import cli
from pipelines.exchange.format import format_named, formats
from pipelines.sae.checkpoint import load_run

SITE = "resid_post.0"
TOY = '''
"""Everything as one JSON file."""

import json

import torch

from pipelines.exchange.format import Origin
from pipelines.sae.architectures.registry import make


class Toy:
    name = "toy"
    architectures = ("topk",)

    def files(self, out):
        return [out]

    def write(self, sae, record, out):
        weights = {name: tensor.tolist() for name, tensor in sae.state_dict().items()}
        out.write_text(json.dumps({"site": record.site, "k": record.k, "weights": weights}))

    def read(self, path):
        value = json.loads(path.read_text())
        weights = {name: torch.tensor(numbers) for name, numbers in value["weights"].items()}
        n_features, d_model = weights["W_dec"].shape
        sae = make("topk", d_model, n_features, value["k"])
        sae.load_state_dict(weights)
        return sae, Origin(value["site"])


FORMAT = Toy()
'''


def test_a_format_in_one_file_is_offered_and_goes_both_ways(tmp_path: Path) -> None:
    write_store(tmp_path / "store", StoreSpec())
    sae = moved_sae("topk", 4, 24, 3)
    write_run(tmp_path / "run", sae, tmp_path / "store", SITE)
    there = ["export", str(tmp_path / "run"), "--format", "toy", "--out", str(tmp_path / "a.toy")]
    back = ["import", str(tmp_path / "a.toy"), "--format", "toy", "--store", str(tmp_path / "store")]
    with file_added(pipelines.exchange.formats, formats, tmp_path, "toy", TOY):
        for arguments in (there, [*back, "--out", str(tmp_path / "back")]):
            result = CliRunner().invoke(cli, arguments)
            assert result.exit_code == 0, result.output
        with pytest.raises(InputError, match=r"choose one of npz, toy\."):
            format_named("none")
    for name, tensor in load_run(tmp_path / "back")[0].state_dict().items():
        assert torch.equal(tensor, sae.state_dict()[name])
    assert "toy" not in formats()
