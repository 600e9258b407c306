"""A run on the MLP's neurons, rows wider than the stream: what takes it does what it says, the rest refuses it in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actstore.errors import InputError
from pipelines.causal.ablate.feature_edits import ablate, read_prompt, set_everywhere
from pipelines.causal.attribute.stage import AttributeConfig, attribute
from pipelines.causal.effects.stage import EffectsConfig, effects
from pipelines.causal.effects.table import read_table
from pipelines.causal.engine.language_model import Spliced, open_spliced
from pipelines.causal.lens.stage import LensConfig, lens
from pipelines.causal.patch.stage import PatchConfig, patch
from pipelines.causal.steer.stage import SteerConfig, steer
from pipelines.models.capture import require_patched
from pipelines.models.forward import blocks_of
from pipelines.models.sites.site import Site

TEXT = "The fox 31 went to the wood"
LAYER = 1


@pytest.fixture(scope="module")
def trained(model_folder: Path, texts: Path, client: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, codes) of an SAE on `mlp_hidden.1`."""
    from pipelines.codes.stage import EncodeConfig, encode
    from pipelines.collect.config import CollectConfig
    from pipelines.collect.stage import collect
    from pipelines.train.config import TrainConfig
    from pipelines.train.stage import train

    folder = tmp_path_factory.mktemp("neurons")
    asked = CollectConfig(
        out=folder / "store", model=str(model_folder), corpus=str(texts), layer=(LAYER,), site=("mlp_hidden",), context=32,
        encoding="fp32", tokens=2000,
    )  # fmt: skip
    collect(asked)
    train(TrainConfig(store=asked.out, out=folder / "run", site="mlp_hidden", features=48, k=4, epochs=2, batch=256))
    encode(EncodeConfig(store=asked.out, run=folder / "run", out=folder / "codes"), client)
    return folder / "run", folder / "codes"


@pytest.fixture(scope="module")
def spliced(trained: tuple[Path, Path]) -> Spliced:
    return open_spliced(trained[0], device="cpu")


def by_hook(spliced: Spliced, ids: Tensor, change: Tensor) -> Tensor:
    """(position, vocabulary) logits of the whole model with `change` (position, 4 d_model) added before the MLP's W_out."""
    module: Any = blocks_of(spliced.lm.model)[LAYER].mlp.c_proj
    handle = module.register_forward_pre_hook(lambda _, args: (args[0] + change,))
    try:
        with torch.no_grad():
            found: Tensor = spliced.lm.model(input_ids=ids[None], use_cache=False).logits[0]
            return found
    finally:
        handle.remove()


def test_ablating_a_feature_of_neurons_is_what_a_hook_in_the_mlp_does(spliced: Spliced) -> None:
    read = read_prompt(spliced, spliced.lm.prompt(TEXT))
    features = read.features.tolist()
    assert read.rows.shape[1] == 128
    assert len(features) > 3
    found = ablate(read, [set_everywhere(read, feature) for feature in features])
    for i, feature in enumerate(features):
        change = -read.code(feature)[:, None] * spliced.sae.W_dec[feature].detach()
        expected = by_hook(spliced, read.prompt.ids, change)
        torch.testing.assert_close(read.logits(found.hidden[i]), expected[-1], rtol=0, atol=1e-4)
        assert float(found.normal_ablated[i].max()) > 0


def test_effects_at_its_firings_are_measured(trained: tuple[Path, Path], spliced: Spliced, tmp_path: Path) -> None:
    asked = EffectsConfig(*trained, tmp_path / "out", top=5, firings=30, resamples=20, device="cpu")
    effects(asked)
    rows = read_table((tmp_path / "out" / "effects.parquet").read_bytes())
    assert len(rows) == 5
    assert all(np.isfinite(row["kl"]) and row["kl"] > 0 for row in rows)


def test_it_can_be_steered(trained: tuple[Path, Path]) -> None:
    found = steer(SteerConfig(trained[0], 3, TEXT, strength=(0.0, 1e4), unit="raw", mode="clamp", tokens=8, device="cpu"))
    assert len({own["text"] for own in found["texts"]}) == 2


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda run: attribute(AttributeConfig(TEXT, run=run, device="cpu")), "neither attributed nor patched"),
    (lambda run: patch(PatchConfig(TEXT, run=run, site="features", device="cpu")), "neither attributed nor patched"),
    (lambda run: lens(LensConfig(run, device="cpu")), "its directions are of the MLP's neurons"),
    (lambda run: lens(LensConfig(run, 3, device="cpu")), "its directions are of the MLP's neurons"),
]


@pytest.mark.parametrize(("use", "reason"), REFUSED, ids=["attribute", "patch", "lens", "lens of a feature"])
def test_what_cannot_take_neurons_refuses_them_in_one_line(
    use: Callable[[Path], Any], reason: str, trained: tuple[Path, Path]
) -> None:
    with pytest.raises(InputError, match=rf"^site mlp_hidden\.1: .*{reason}") as caught:
        use(trained[0])
    assert "\n" not in str(caught.value)


def test_neurons_are_no_site_of_a_patch(spliced: Spliced) -> None:
    with pytest.raises(InputError, match=r"site mlp_hidden\.0: .*neither attributed nor patched"):
        require_patched(spliced.lm.model, Site("mlp_hidden", 0))
    with pytest.raises(InputError, match="site 'mlp_hidden': known are resid_pre"):
        PatchConfig("a", "b", site="mlp_hidden")
