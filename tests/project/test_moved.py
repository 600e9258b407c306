"""What a user imported from earlier versions either works or says where it went."""

from __future__ import annotations

from importlib import import_module

import pytest

from pipelines import MOVED


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("actstore", "ActivationStore"),
        ("actstore", "BatchStream"),
        ("actstore", "Store"),
        ("actstore.reader", "ActivationStore"),
        ("actstore.stream", "BatchStream"),
        ("pipelines.torch_stream", "ActivationDataset"),
        ("pipelines.sae.checkpoint", "load_run"),
        ("pipelines.lesson", "run_sae_pipeline"),
        ("pipelines.lesson", "SparseAutoencoder"),
    ],
)
def test_public_imports_still_work(module: str, name: str) -> None:
    assert getattr(import_module(module), name) is not None


@pytest.mark.parametrize("module", MOVED)
def test_a_moved_module_says_where_it_went(module: str) -> None:
    assert import_module(MOVED[module]) is not None
    with pytest.raises(ModuleNotFoundError, match=f"^{module}: is {MOVED[module]} now; import that.$") as error:
        import_module(module)
    assert "\n" not in str(error.value)
