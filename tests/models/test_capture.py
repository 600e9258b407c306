"""What is captured is what the model computes: compared with transformers' own hidden states, and with the model's sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modelkit import D_MODEL, N_LAYER
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from actstore.errors import InputError
from pipelines.models.capture import capture, hooked, require_collected, site_width
from pipelines.models.forward import blocks_of
from pipelines.models.load import choose_device, load_model, model_identity
from pipelines.models.sites.registry import collected_names
from pipelines.models.sites.site import Site

ALL_SITES = [Site(name, layer) for layer in range(N_LAYER) for name in collected_names()]


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> GPT2LMHeadModel:
    """The model as transformers loads it."""
    return GPT2LMHeadModel.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def model(model_folder: Path) -> nn.Module:
    """The model as the stages load it."""
    return load_model(str(model_folder), "cpu", "fp32")


@pytest.fixture(scope="module")
def ids(reference: GPT2LMHeadModel) -> Tensor:
    return torch.randint(reference.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_tiny_model_has_outliers_as_trained_ones_have(reference: GPT2LMHeadModel, ids: Tensor) -> None:
    with torch.inference_mode():
        rows = reference(ids, output_hidden_states=True).hidden_states[1]
    assert rows.abs().max() > 30 * rows.abs().median()
    norms = reference.transformer.wpe.weight.norm(dim=1)
    assert norms[0] > 10 * norms[1:].max()


@pytest.mark.parametrize("layer", range(N_LAYER))
def test_residual_rows_equal_transformers_hidden_states(
    layer: int, model: nn.Module, reference: GPT2LMHeadModel, ids: Tensor
) -> None:
    found = capture(model, [Site("resid_pre", layer), Site("resid_post", layer)], ids)
    with torch.inference_mode():
        hidden = reference(ids, output_hidden_states=True).hidden_states
        assert_close(found[f"resid_pre.{layer}"], hidden[layer])
        after = found[f"resid_post.{layer}"]
        if layer == N_LAYER - 1:  # transformers' last hidden state is behind the final LayerNorm
            after = reference.transformer.ln_f(after)
        assert_close(after, hidden[layer + 1])


@pytest.mark.parametrize("layer", range(N_LAYER))
def test_a_block_adds_its_attention_and_its_mlp_to_the_stream(layer: int, model: nn.Module, ids: Tensor) -> None:
    before, after, attention, mlp = (
        capture(model, [Site(name, layer)], ids)[f"{name}.{layer}"]
        for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    )
    assert_close(before + attention + mlp, after)


def test_all_sites_in_one_pass_equal_each_site_alone(model: nn.Module, ids: Tensor) -> None:
    together = capture(model, ALL_SITES, ids)
    assert set(together) == {site.label for site in ALL_SITES}
    for site in ALL_SITES:
        assert together[site.label].shape == (*ids.shape, site_width(model, site))
        assert site_width(model, site) == (4 * D_MODEL if site.name == "mlp_hidden" else D_MODEL)
        assert torch.equal(together[site.label], capture(model, [site], ids)[site.label])


@pytest.mark.parametrize(
    ("sites", "blocks_run"),
    [
        ([Site("resid_pre", 0)], 0),
        ([Site("resid_post", 0)], 1),
        ([Site("resid_pre", 2)], 2),
        ([Site("mlp_out", 1), Site("resid_post", 0)], 2),
        ([Site("resid_post", N_LAYER - 1)], N_LAYER),
    ],
    ids=lambda value: "+".join(site.label for site in value) if isinstance(value, list) else "",
)
def test_nothing_after_the_last_wanted_site_is_run(
    sites: list[Site], blocks_run: int, model: nn.Module, ids: Tensor
) -> None:
    ran: list[str] = []
    watched = {f"block {i}": block.ln_1 for i, block in enumerate(blocks_of(model))}
    watched |= {"ln_f": model.transformer.ln_f, "lm_head": model.lm_head}
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    try:
        capture(model, sites, ids)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [f"block {i}" for i in range(blocks_run)]


def test_no_hook_is_left_behind(model: nn.Module, ids: Tensor) -> None:
    before = n_hooks(model)
    capture(model, ALL_SITES, ids)
    with pytest.raises(IndexError):
        capture(model, ALL_SITES, ids + 1000)
    with pytest.raises(InputError):
        capture(model, [Site("resid_pre", 0), Site("resid_pre", N_LAYER)], ids)

    def fail(activation: Tensor) -> None:
        raise RuntimeError("inside the edit")

    with pytest.raises(RuntimeError, match="inside the edit"), hooked(model, Site("resid_pre", 1), fail):
        model(ids)
    assert n_hooks(model) == before


@pytest.mark.parametrize("name", collected_names())
def test_what_an_edit_returns_replaces_the_activation(name: str, model: nn.Module, ids: Tensor) -> None:
    width = site_width(model, Site(name, 1))
    replacement = torch.linspace(-1, 1, width).expand(*ids.shape, width)
    block = [Site(site, 1) for site in collected_names()]
    with torch.inference_mode(), hooked(model, Site(name, 1), lambda activation: replacement):
        found = capture(model, [*block, Site("resid_pre", 2)], ids)
        logits = model(ids).logits
    assert torch.equal(found[f"{name}.1"], replacement)
    assert torch.equal(found["resid_pre.2"], found["resid_post.1"])
    if name != "resid_post":
        assert_close(found["resid_pre.1"] + found["attn_out.1"] + found["mlp_out.1"], found["resid_post.1"])
    with torch.inference_mode():
        assert not torch.equal(logits, model(ids).logits)


def test_an_edit_that_returns_nothing_changes_nothing(model: nn.Module, ids: Tensor) -> None:
    with torch.inference_mode():
        clean = model(ids).logits
        for site in ALL_SITES:
            with hooked(model, site, lambda activation: None):
                assert torch.equal(model(ids).logits, clean)


def test_mlp_hidden_are_the_neurons_after_their_nonlinearity(
    model: nn.Module, reference: GPT2LMHeadModel, ids: Tensor
) -> None:
    """What the block's MLP makes of its input, computed with transformers' own modules: GELU(x W + b)."""
    found = capture(model, [Site("mlp_hidden", 1)], ids)["mlp_hidden.1"]
    seen: list[Tensor] = []
    handle = reference.transformer.h[1].mlp.act.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        reference(ids)
    handle.remove()
    torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-5)
    assert found.min() > -0.2
    assert found.shape[-1] == 4 * D_MODEL


def test_the_composed_gelu_is_replaced_and_the_logits_agree(
    model: nn.Module, reference: GPT2LMHeadModel, ids: Tensor
) -> None:
    assert any(isinstance(module, NewGELUActivation) for module in reference.modules())
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    with torch.inference_mode():
        assert_close(model(ids).logits, reference(ids).logits)


def test_the_same_weights_are_the_same_model_in_any_folder(model: nn.Module, copy: Path) -> None:
    assert model_identity(load_model(str(copy), "cpu", "fp32")) == model_identity(model)
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.1.ln_1.bias"][0] += 1e-7
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = load_model(str(copy), "cpu", "fp32")
    assert model_identity(changed).weights_sha256 != model_identity(model).weights_sha256


# What is not there


def refused(action: Callable[[], object]) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("layer", [N_LAYER, -1])
def test_a_layer_the_model_has_not_is_refused(layer: int, model: nn.Module) -> None:
    message = refused(lambda: require_collected(model, Site("resid_post", layer)))
    assert message == f"layer {layer}: the model has 3 blocks; choose 0 to 2."


def test_an_unknown_site_is_refused_with_the_known_ones(model: nn.Module) -> None:
    message = refused(lambda: require_collected(model, Site("resid_mid", 0)))
    assert message == "site 'resid_mid': known sites are resid_pre, resid_post, attn_out, mlp_out, mlp_hidden."


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert refused(lambda: load_model(str(tmp_path), "cpu", "fp32")).endswith("family 'bert'; known are gpt2.")


def test_a_folder_that_is_not_there_or_holds_no_model_is_refused(tmp_path: Path) -> None:
    assert "no such local folder" in refused(lambda: load_model(str(tmp_path / "nowhere"), "cpu", "fp32"))
    assert "its folder is not a transformers model" in refused(lambda: load_model(str(tmp_path), "cpu", "fp32"))


def test_a_hub_id_without_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(lambda: load_model("no-such-owner/no-such-model", "cpu", "fp32"))
    assert message.startswith("model no-such-owner/no-such-model: ")
    assert message.endswith("pass a local folder, `builtin`, or a hub id with the network up.")


def test_missing_weights_are_refused_and_not_drawn_at_random(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing, such as transformer.h.1.mlp.c_fc.weight" in refused(
        lambda: load_model(str(copy), "cpu", "fp32")
    )


@pytest.mark.parametrize("damage", ["cut", "another shape", "no JSON"])
def test_a_damaged_model_is_refused(damage: str, copy: Path) -> None:
    if damage == "cut":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    else:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text("{" if damage == "no JSON" else json.dumps({**config, "n_embd": 64}))
    assert str(copy) in refused(lambda: load_model(str(copy), "cpu", "fp32"))


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda", "mps")
    assert refused(lambda: choose_device("abacus")).endswith("choose auto or cpu.")
    if not torch.cuda.is_available():
        assert refused(lambda: choose_device("cuda")).startswith("device cuda: cannot be used")
