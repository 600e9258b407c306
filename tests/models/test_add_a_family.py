"""A decoder of other modules and another order becomes a known family by one file in the folder of families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipelines.models.families
from actstore.errors import InputError
from pipelines.causal.attribute.logit_parts import BIAS, HEAD_BIAS, direct_logit_attribution
from pipelines.causal.engine.branches import finish_branches
from pipelines.causal.engine.cut import cut_at, finish
from pipelines.causal.engine.trace import after_edits, after_row_edits, trace
from pipelines.models.capture import capture, hooked, site_width
from pipelines.models.families.registry import families, family_of
from pipelines.models.forward import embed, logits, run_blocks
from pipelines.models.load import load_model
from pipelines.models.sites.registry import collected_names, patched_names
from pipelines.models.sites.site import Site

N_LAYERS, D_MODEL, N_HEADS, D_HEAD, N_NEURONS, N_TOKENS = 3, 12, 4, 5, 30, 40

FILE = '''
import torch

from pipelines.models.families.family import Family


class Toy(Family):
    """Attention and MLP side by side, no positions in the stream, an RMSNorm at the end, a bias in the head."""

    model_type = "toy"

    def n_neurons(self, model):
        return model.trunk[0].think.down.in_features

    def blocks(self, model):
        return model.trunk

    def token_and_position(self, model, ids):
        return model.table(ids), None

    def attention(self, block):
        return block.look

    def heads_together(self, block):
        return block.look.join

    def head_weights(self, model, layer):
        join = model.trunk[layer].look.join
        return join.weight.T.reshape(self.n_heads(model), -1, self.d_model(model)), None

    def mlp(self, block):
        return block.think

    def mlp_norm(self, block):
        return block.second

    def neurons_together(self, block):
        return block.think.down

    def after_block(self, block, before, attn_out, mlp_out=None):
        return before + attn_out + (block.think(block.second(before)) if mlp_out is None else mlp_out)

    def run_block(self, model, layer, hidden, mask, place, keys=None):
        return model.trunk[layer](hidden, mask, keys)

    def causal_mask(self, model, hidden):
        return model.mask(hidden)

    def final_norm(self, model):
        return model.last

    def final_scale(self, model, stream):
        return (stream.double().pow(2).mean(dim=-1) + model.last.eps).sqrt()

    def final_linear(self, model, vectors):
        return model.last.weight.double() * vectors.double()

    def final_bias(self, model):
        return None

    def unembedding(self, model):
        return model.head.weight

    def head_bias(self, model):
        return model.head.bias
'''


class Look(nn.Module):
    """Attention, whose heads together are wider than the stream."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.qkv = nn.Linear(D_MODEL, 3 * N_HEADS * D_HEAD)
        self.join = nn.Linear(N_HEADS * D_HEAD, D_MODEL, bias=False)

    def forward(self, x: Tensor, mask: Tensor, keys: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (N_HEADS, D_HEAD)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if keys is not None:
            k, v = keys.update(k, v, self.layer)
        z = (q @ k.transpose(2, 3) + mask).softmax(dim=-1) @ v
        joined: Tensor = self.join(z.transpose(1, 2).flatten(2))
        return joined


class Think(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_MODEL, N_NEURONS), nn.Linear(N_NEURONS, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.first, self.second = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.look, self.think = Look(layer), Think()

    def forward(self, x: Tensor, mask: Tensor, keys: Any = None) -> Tensor:
        out: Tensor = x + self.look(self.first(x), mask, keys) + self.think(self.second(x))
        return out


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="toy", hidden_size=D_MODEL, num_attention_heads=N_HEADS, max_position_embeddings=16
        )
        self.table = nn.Embedding(N_TOKENS, D_MODEL)
        self.trunk = nn.ModuleList(Block(layer) for layer in range(N_LAYERS))
        self.last, self.head = nn.RMSNorm(D_MODEL, eps=1e-3), nn.Linear(D_MODEL, N_TOKENS)

    def mask(self, x: Tensor) -> Tensor:
        return x.new_full((x.shape[1], x.shape[1]), -torch.inf).triu(1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.table(input_ids)
        mask = self.mask(x)
        for block in self.trunk:
            x = block(x, mask)
        return SimpleNamespace(logits=self.head(self.last(x)))


IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5], [35, 8, 9, 7, 9, 3, 2]])


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of families, and one file more."""
    (tmp_path / "toy.py").write_text(FILE)
    monkeypatch.setattr(pipelines.models.families, "__path__", [*pipelines.models.families.__path__, str(tmp_path)])
    return


@pytest.fixture
def model(one_file: None) -> nn.Module:
    torch.manual_seed(0)
    made = Decoder().double().eval().requires_grad_(False)
    for weight in (block.look.qkv.weight for block in made.trunk):  # type: ignore[union-attr]
        weight.mul_(4)  # so that attention does not look everywhere alike
    made.last.weight.copy_(torch.rand(D_MODEL) + 0.5)
    return made


def test_a_file_is_known_while_its_folder_is_listed(one_file: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(families()) == ["gpt2", "toy"]
    monkeypatch.undo()
    assert list(families()) == ["gpt2"]


def test_errors_list_the_family(one_file: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="family 'bert'; known are gpt2, toy"):
        load_model(str(tmp_path), "cpu", "fp32")
    with pytest.raises(InputError, match="model: is a Linear; known are gpt2, toy of transformers"):
        family_of(nn.Linear(1, 1))


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_captured_rows_are_those_of_own_hooks(model: Any, layer: int) -> None:
    block, seen = model.trunk[layer], {}
    handles = [
        block.register_forward_hook(lambda _, args, out: seen.update(resid_pre=args[0], resid_post=out)),
        block.look.register_forward_hook(lambda _, args, out: seen.update(attn_out=out)),
        block.think.register_forward_hook(lambda _, args, out: seen.update(mlp_out=out)),
        block.think.up.register_forward_hook(lambda _, args, out: seen.update(mlp_hidden=out.relu())),
    ]
    model(IDS)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(collected_names())
    for name, rows in seen.items():
        site = Site(name, layer)
        assert torch.equal(capture(model, [site], IDS)[site.label], rows)
        assert site_width(model, site) == rows.shape[-1]
    assert site_width(model, Site("mlp_hidden", layer)) == N_NEURONS
    assert site_width(model, Site("head_out", layer)) == N_HEADS * D_HEAD


def test_the_forward_pass_in_pieces_is_the_models_own(model: Any) -> None:
    half = run_blocks(model, embed(model, IDS), 0, 2)
    torch.testing.assert_close(logits(model, run_blocks(model, half, 2)), model(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*collected_names(), "head_out"])
def test_edits_run_on_from_a_site_as_in_the_whole_model(model: Any, name: str) -> None:
    site, ids = Site(name, 1), IDS[:1]
    noise = torch.randn(*ids.shape, site_width(model, site), generator=torch.Generator().manual_seed(1)).double()
    cut = cut_at(model, site, ids)
    with hooked(model, site, lambda x: x + noise):
        expected = model(ids).logits
    assert (expected - model(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, finish(model, cut, cut.x + noise)), expected, rtol=1e-9, atol=1e-9)
    if name in patched_names():
        run = trace(model, ids[0])
        found = after_edits(model, run, site, run.at(site) + noise, None)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", patched_names())
def test_edits_of_one_position_need_only_what_comes_after(model: Any, name: str) -> None:
    site, position, ids = Site(name, 1), 3, IDS[:1]
    run = trace(model, ids[0])
    row = 10 * torch.randn(1, run.at(site).shape[1], generator=torch.Generator().manual_seed(2)).double()
    edited = run.at(site).clone()
    edited[position] = row
    with hooked(model, site, lambda _: edited[None]):
        expected = model(ids).logits[0]
    found = after_row_edits(model, run, site, torch.tensor([position]), row)[0]
    torch.testing.assert_close(found, expected[-1], rtol=1e-9, atol=1e-9)
    assert (found - model(ids).logits[0, -1]).abs().max() > 1e-6
    cut, at = cut_at(model, site, ids), torch.tensor([[position]])
    clean, branch = finish_branches(model, cut, (row - cut.x[0, position])[None], at)
    torch.testing.assert_close(logits(model, branch)[0, 0], expected[position], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(model, clean), model(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by_head", [True, False])
def test_the_parts_sum_to_the_logit(model: Any, by_head: bool) -> None:
    expected = model(IDS[:1]).logits[0, -1]
    for target, against, centred in [(5, None, False), (5, None, True), (5, 9, True)]:
        found = direct_logit_attribution(model, IDS[0], target, against, by_head=by_head, centred=centred)
        value = expected[target] - (expected[against] if against is not None else expected.mean() * centred)
        assert float(found.shares.sum()) == pytest.approx(float(value), abs=1e-10)
        assert found.logit == pytest.approx(float(value), abs=1e-10)
        assert found.names[0] == "embed"
        assert found.names[-1] == HEAD_BIAS
        assert not {"position", "attn_bias.0", BIAS} & set(found.names)
        assert len(found.names) == 2 + N_LAYERS * (1 + (N_HEADS if by_head else 1))
