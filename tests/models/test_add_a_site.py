"""Another place of a block becomes a known site by one file in the folder of sites."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modelkit import D_MODEL, build_model, write_texts
from torch import Tensor, nn

import pipelines.models.sites
from actstore.errors import InputError
from actstore.reader import ActivationStore
from pipelines.causal.attribute.logit_parts import feature_parts
from pipelines.causal.engine.trace import after_edits, after_row_edits, trace
from pipelines.causal.patch.stage import PatchConfig
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.models.capture import capture, hooked, require_collected, require_patched, site_width
from pipelines.models.load import load_model
from pipelines.models.sites.registry import collected_names, patched_names, site_kinds
from pipelines.models.sites.site import Site
from pipelines.sae.architectures.topk import TopKSae

FILE = '''
from pipelines.models.sites.site import SiteKind


class MlpIn(SiteKind):
    """What a block's MLP reads: the stream after attention, through the norm."""

    name = "mlp_in"
    values_are = "the normed values of the residual stream"
    reads_input = True
    in_stream_basis = False

    def module(self, family, block):
        return family.mlp(block)

    def into_stream(self, family, block, edited, before, attn_out):
        return family.after_block(block, before, attn_out, family.mlp(block)(edited))
'''
SITE = Site("mlp_in", 1)


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of sites, and one file more."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "mlp_in.py").write_text(FILE)
    monkeypatch.setattr(pipelines.models.sites, "__path__", [*pipelines.models.sites.__path__, str(folder)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    return build_model(folder / "model", write_texts(folder / "texts"))


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return load_model(str(folder), "cpu", "fp32").double().requires_grad_(False)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(0))


def test_a_file_is_known_while_its_folder_is_listed(one_file: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collected_names()[-1] == patched_names()[-1] == "mlp_in"
    monkeypatch.undo()
    assert "mlp_in" not in site_kinds()


def test_errors_list_the_site(one_file: None, model: nn.Module) -> None:
    for require in (require_collected, require_patched):
        with pytest.raises(InputError, match=r"site 'mlp_low': known sites are .*, mlp_in\."):
            require(model, Site("mlp_low", 0))
    with pytest.raises(InputError, match=r"site 'mlp_low': known are .*, mlp_in, features"):
        PatchConfig("a", "b", site="mlp_low")


def test_its_rows_are_captured(one_file: None, model: Any) -> None:
    tokens = ids(2, 9)
    rows = capture(model, [require_collected(model, SITE), Site("mlp_out", 1)], tokens)[SITE.label]
    parts = capture(model, [Site("resid_pre", 1), Site("attn_out", 1)], tokens)
    assert site_width(model, SITE) == rows.shape[-1] == D_MODEL
    assert torch.equal(rows, model.transformer.h[1].ln_2(parts["attn_out.1"] + parts["resid_pre.1"]))


def test_its_rows_are_collected(one_file: None, small_config: CollectConfig, tmp_path: Path) -> None:
    collect(replace(small_config, out=tmp_path / "store", site=("mlp_in", "resid_post")))
    store = ActivationStore(tmp_path / "store")
    assert store.sites == ["mlp_in.0", "resid_post.0"]
    assert store.d_model("mlp_in.0") == D_MODEL


def test_it_is_patched_as_a_hook_in_the_whole_model_does(one_file: None, model: nn.Module) -> None:
    tokens = ids(8)
    run = trace(model, tokens)
    edited = run.at(SITE) + torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(1)).double()
    with hooked(model, require_patched(model, SITE), lambda _: edited[None]):
        expected = model(input_ids=tokens[None], use_cache=False).logits[0]
    found = after_edits(model, run, SITE, edited[None], None)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    with hooked(model, SITE, lambda x: torch.cat([x[:, :7], edited[None, 7:]], dim=1)):
        expected = model(input_ids=tokens[None], use_cache=False).logits[0, -1]
    found = after_row_edits(model, run, SITE, torch.tensor([7]), edited[7:])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_values_that_are_no_sum_of_the_streams_parts_are_not_split_into_features(one_file: None, model: nn.Module) -> None:
    run, sae = trace(model, ids(8)), TopKSae(D_MODEL, 48, 5, seed=2).double()
    with pytest.raises(InputError, match=r"site mlp_in\.1: the normed values .* are not what was written to the stream"):
        feature_parts(model, run, SITE, sae)


def test_names_are_listed_without_torch() -> None:
    script = (
        "import sys\nfrom pipelines.models.sites.registry import collected_names, patched_names\n"
        "assert collected_names() and patched_names()\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
