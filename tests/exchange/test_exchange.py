"""From a run to a file and back: a run that other commands accept, and refusals that leave nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from exchangekit import moved_sae, write_run
from storekit import StoreSpec, write_store

from actstore.errors import IdentityMismatch, InputError, NotAStore, OutputExists, WidthMismatch
from actstore.reader import ActivationStore
from cli import cli
from pipelines.causal.ablate.stage import AblateConfig, ablate_features
from pipelines.codes.stage import EncodeConfig, encode
from pipelines.evaluate.baselines import BaselinesConfig, evaluate_beside_baselines
from pipelines.evaluate.stage import EvaluateConfig, evaluate
from pipelines.exchange.stage import ExportConfig, ImportConfig, export_run, import_run
from pipelines.sae.checkpoint import load_run

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, StoreSpec())
    return path


@pytest.fixture
def exported(tmp_path: Path, rows_store: Path) -> Path:
    write_run(tmp_path / "run", moved_sae("jumprelu", 4, 24, 3), rows_store, SITE)
    export_run(ExportConfig(tmp_path / "run", tmp_path / "a.npz"))
    return tmp_path / "a.npz"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_an_imported_run_is_accepted_wherever_a_run_is(run: Path, store: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))  # evaluate writes beside it
    export_run(ExportConfig(run, tmp_path / "a.npz"))
    imported = tmp_path / "imported"
    result = import_run(ImportConfig(tmp_path / "a.npz", store, imported))
    mine, theirs = load_run(run), load_run(imported)
    assert result["run_id"] == theirs[1].run_id != mine[1].run_id
    assert theirs[1].config["origin"]["run_id"] == mine[1].run_id
    assert (theirs[1].rows_seen, theirs[1].code_width) == (0, mine[1].code_width)
    for name, tensor in mine[0].state_dict().items():
        assert torch.equal(tensor, theirs[0].state_dict()[name])

    figures = {folder: evaluate(EvaluateConfig(folder, store, windows=2, device="cpu")) for folder in (run, imported)}
    same = ("fve", "l0", "ce_sae", "dead_features")
    assert [figures[imported][name] for name in same] == [figures[run][name] for name in same]
    encoded = encode(EncodeConfig(store, imported, tmp_path / "codes", workers=1))
    assert encoded["rows"] > 0
    ablated = [
        ablate_features(AblateConfig(folder, "def load(path):", store=store, device="cpu")) for folder in (run, imported)
    ]
    assert ablated[0]["features"] == ablated[1]["features"]
    with pytest.raises(InputError, match=r"imported: was imported, .* leave out --baselines"):
        evaluate_beside_baselines(BaselinesConfig(imported, store, baselines=True, device="cpu"))


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "matryoshka", "relu", "topk"])
def test_the_width_and_the_silent_features_are_those_of_the_stores_rows(
    architecture: str, tmp_path: Path, rows_store: Path
) -> None:
    sae = moved_sae(architecture, 4, 24, 3)
    record = write_run(tmp_path / "run", sae, rows_store, SITE)
    export_run(ExportConfig(tmp_path / "run", tmp_path / "a.npz"))
    result = import_run(ImportConfig(tmp_path / "a.npz", rows_store, tmp_path / "back"))
    assert result["code_width"] == record.code_width
    opened = ActivationStore(rows_store)
    rows = torch.cat([torch.from_numpy(opened.read(shard, f"acts/{SITE}")) for shard in opened.shards()])
    _, values, indices = sae(rows)
    fired = torch.zeros(24, dtype=torch.bool)
    fired[indices[values > 0]] = True
    assert result["metrics"] == {"dead_features": int((~fired).sum()), "dead_window_rows": len(rows)}


def test_the_commands_print_what_was_made(tmp_path: Path, rows_store: Path) -> None:
    record = write_run(tmp_path / "run", moved_sae("topk", 4, 24, 3), rows_store, SITE)
    there = invoke("export", tmp_path / "run", "--out", tmp_path / "a.npz")
    assert there.exit_code == 0, there.output
    assert there.stdout.splitlines()[:2] == [f"run {record.run_id}, topk, as npz:", str(tmp_path / "a.npz")]
    back = invoke("import", tmp_path / "a.npz", "--store", rows_store, "--out", tmp_path / "back")
    assert back.exit_code == 0, back.output
    assert f"{SITE}, topk, 24 features, k 3" in back.output
    assert f"run {record.run_id}" in back.output


# Refusals


def test_an_architecture_that_the_format_cannot_keep_is_refused_by_name(tmp_path: Path, rows_store: Path) -> None:
    write_run(tmp_path / "run", moved_sae("gated", 4, 24, 3), rows_store, SITE)
    with pytest.raises(InputError, match="its architecture is gated, npz keeps batchtopk, jumprelu"):
        export_run(ExportConfig(tmp_path / "run", tmp_path / "a.npz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["a.npz", "a.json"])
def test_neither_file_is_written_over(name: str, tmp_path: Path, rows_store: Path) -> None:
    write_run(tmp_path / "run", moved_sae("topk", 4, 24, 3), rows_store, SITE)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputExists, match=name):
        export_run(ExportConfig(tmp_path / "run", tmp_path / "a.npz"))
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="not a finished run"):
        export_run(ExportConfig(tmp_path, tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (StoreSpec(sites=(("resid_post.3", "fp32"),)), InputError, r"reads resid_post\.0, .* holds resid_post\.3"),
        (StoreSpec(d_model=6), WidthMismatch, "d_model=4, .* d_model=6"),
    ],
    ids=["site", "width"],
)
def test_a_store_of_other_rows_is_refused(
    spec: StoreSpec, error: type, message: str, exported: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "other", spec)
    with pytest.raises(error, match=message):
        import_run(ImportConfig(exported, tmp_path / "other", tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_a_store_of_another_model_is_refused(exported: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityMismatch, match=r"weights 000000000000, .* comes from"):
        import_run(ImportConfig(exported, store, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_an_existing_run_is_not_written_over(exported: Path, rows_store: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="run: exists"):
        import_run(ImportConfig(exported, rows_store, tmp_path / "run"))


@pytest.mark.parametrize("command", ["export", "import"])
def test_an_unknown_format_lists_those_that_there_are(
    command: str, exported: Path, rows_store: Path, tmp_path: Path
) -> None:
    arguments = [tmp_path / "run"] if command == "export" else [exported, "--store", rows_store]
    result = invoke(command, *arguments, "--format", "pickle", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "format 'pickle': there is none of that name; choose one of npz." in result.output
