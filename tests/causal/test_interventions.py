"""Edits from the patched block on, many in a batch, give what a hook in the whole model gives one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modelkit import build_model, write_texts
from torch import Tensor

from actstore.errors import InputError
from pipelines.causal.engine.language_model import LanguageModel, open_language_model
from pipelines.causal.engine.trace import (
    after_edits,
    after_row_edits,
    edited_logits,
    trace,
)
from pipelines.models.capture import hooked, require_patched
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of
from pipelines.models.sites.registry import patched_names
from pipelines.models.sites.site import Site


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("interventions")
    found = open_language_model(str(build_model(folder / "model", write_texts(folder / "texts"))), "cpu")
    found.model.double()
    return found


def ids(n: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(seed))


def one_by_one(lm: LanguageModel, tokens: Tensor, site: Site, edited: Tensor) -> Tensor:
    """(n, position, vocabulary) by a hook in the whole model, an edit at a time."""
    found = []
    for edit in edited:
        if site.name == "head_out":
            module = family_of(lm.model).heads_together(blocks_of(lm.model)[site.layer])
            handle = module.register_forward_pre_hook(lambda _m, _a, edit=edit: (edit[None],))
            found.append(lm.model(input_ids=tokens[None], use_cache=False).logits[0])
            handle.remove()
        else:
            with hooked(lm.model, site, lambda _, edit=edit: edit[None]):
                found.append(lm.model(input_ids=tokens[None], use_cache=False).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", patched_names())
def test_a_batch_of_edits_gives_what_hooks_give_one_at_a_time(lm: LanguageModel, name: str, layer: int) -> None:
    tokens, site = ids(), Site(name, layer)
    run = trace(lm.model, tokens)
    noise = torch.randn(5, *run.at(site).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edited = run.at(site) + noise
    expected = one_by_one(lm, tokens, site, edited)
    torch.testing.assert_close(after_edits(lm.model, run, site, edited, None), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(after_edits(lm.model, run, site, edited, 4), expected[:, 4], rtol=0, atol=1e-9)
    own = torch.tensor([3, 10, 0, 7, 7])
    found = after_edits(lm.model, run, site, edited, own)
    torch.testing.assert_close(found, expected[torch.arange(5), own], rtol=0, atol=1e-9)
    assert (expected[:, -1] - expected[0, -1]).abs().max() > 1e-3, "the edits matter"


@pytest.mark.parametrize("name", patched_names())
def test_an_edit_that_changes_nothing_gives_the_models_logits(lm: LanguageModel, name: str) -> None:
    tokens = ids()
    run = trace(lm.model, tokens)
    expected = lm.model(input_ids=tokens[None], use_cache=False).logits[0]
    found = after_edits(lm.model, run, Site(name, 1), run.at(Site(name, 1))[None], None)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("at", [-1, 4, 0])
@pytest.mark.parametrize("name", patched_names())
def test_row_edits_begin_at_their_position_and_give_what_edits_of_the_whole_text_give(
    lm: LanguageModel, name: str, at: int
) -> None:
    run, site = trace(lm.model, ids()), Site(name, 1)
    positions = torch.tensor([2, 10, 2, 0, 7])
    rows = 1000 * torch.randn(5, run.at(site).shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    edited = run.at(site).repeat(5, 1, 1)
    for i, (position, row) in enumerate(zip(positions.tolist(), rows, strict=True)):
        edited[i, position] = row
    expected = after_edits(lm.model, run, site, edited, at)
    found = after_row_edits(lm.model, run, site, positions, rows, at)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    clean = after_edits(lm.model, run, site, run.at(site)[None], at)
    assert (expected - clean).abs().max() > 1e-6, "the first of them matters at every position"


def test_how_edits_are_cut_into_batches_changes_nothing(lm: LanguageModel) -> None:
    run, site = trace(lm.model, ids()), Site("attn_out", 0)
    edited = run.at(site) + torch.arange(7.0, dtype=torch.float64)[:, None, None]
    whole = after_edits(lm.model, run, site, edited)
    sizes = []
    for first, stop, found in edited_logits(
        lm.model, run, site, 7, lambda first, stop: edited[first:stop], batch_positions=2 * len(run)
    ):
        sizes.append(stop - first)
        torch.testing.assert_close(found, whole[first:stop], rtol=0, atol=1e-9)
    assert sizes == [2, 2, 2, 1]


def n_hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def test_no_hook_is_left_behind_also_after_an_exception(lm: LanguageModel) -> None:
    trace(lm.model, ids())
    assert n_hooks(lm) == 0
    with pytest.raises(IndexError):
        trace(lm.model, torch.tensor([10**6]))
    assert n_hooks(lm) == 0

    def fail(_: Tensor) -> None:
        raise RuntimeError("stop")

    for name in patched_names():
        with pytest.raises(RuntimeError, match="stop"), hooked(lm.model, Site(name, 0), fail):
            lm.model(input_ids=ids()[None])
    assert n_hooks(lm) == 0


def test_a_site_or_layer_that_is_not_there_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"site 'resid_mid': known sites are .*head_out"):
        require_patched(lm.model, Site("resid_mid", 0))
    with pytest.raises(InputError, match=r"layer 3: the model has 3 blocks; choose 0 to 2"):
        require_patched(lm.model, Site("head_out", len(blocks_of(lm.model))))


def test_the_trace_works_on_a_saved_model_of_another_shape(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40)).eval()
    run = trace(model, torch.arange(9))
    assert run.streams.shape == (3, 9, 24)
    assert run.held["head_out"].shape == (2, 9, 24)
    torch.testing.assert_close(run.streams[1], run.streams[0] + run.held["attn_out"][0] + run.held["mlp_out"][0])
