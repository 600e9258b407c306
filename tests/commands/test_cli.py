"""The command line as a contract: every option is a field, every result can be read by a program, Ctrl-C loses nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from modelkit import ROOT, faults_in, folder_state, run_cli, write_texts

from actstore import __version__
from actstore.reader import ActivationStore
from cli import cli
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.train.sweep import SWEPT

COMMANDS = cli.list_commands(click.Context(cli))
CONFIGS = {
    "demo": "pipelines.demo.DemoConfig",
    "collect": "pipelines.collect.config.CollectConfig",
    "estimate": "pipelines.collect.config.CollectConfig",
    "recode": "pipelines.stores.care.RecodeConfig",
    "train": "pipelines.train.config.TrainConfig",
    "evaluate": "pipelines.evaluate.baselines.BaselinesConfig",
    "encode": "pipelines.codes.stage.EncodeConfig",
    "analyze": "pipelines.analysis.stage.AnalyzeConfig",
    "inspect": "pipelines.evaluate.inspect.InspectConfig",
    "attribute": "pipelines.causal.attribute.stage.AttributeConfig",
    "patch": "pipelines.causal.patch.stage.PatchConfig",
    "report": "pipelines.report.stage.ReportConfig",
    "export": "pipelines.exchange.stage.ExportConfig",
    "import": "pipelines.exchange.stage.ImportConfig",
    "ablate": "pipelines.causal.ablate.stage.AblateConfig",
    "steer": "pipelines.causal.steer.stage.SteerConfig",
    "effects": "pipelines.causal.effects.stage.EffectsConfig",
    "lens": "pipelines.causal.lens.stage.LensConfig",
    "concepts": "pipelines.concepts.stage.ConceptsConfig",
    "compare": "pipelines.compare.stage.CompareConfig",
    "superposition": "pipelines.compare.superposition.SuperpositionConfig",
    "structure": "pipelines.structure.stage.StructureConfig",
}
"""The frozen configuration that each stage's command builds."""

WITHOUT_CONFIG = {"ls", "info", "verify", "repair", "features", "feature", "search"}
"""Commands that only show what is there, or drop what is damaged."""

NOT_FIELDS = {"as_json", "resume", "sources"}
"""How to print; a promise that is checked before the stage; `analyze`'s CODES or STORE RUN, which become `codes`."""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def command_of(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def values_of(command: str) -> dict[str, Any]:
    """What a command passes on when it is given nothing but what it must be given."""
    needed: list[str] = []
    for parameter in command_of(command).params:
        if parameter.required:
            needed += ["1"] if parameter.param_type_name == "argument" else [parameter.opts[0], "x"]
    values = command_of(command).make_context(command, needed).params
    hidden = NOT_FIELDS - ({"resume"} if command == "train" else set())
    return {name: value for name, value in values.items() if name not in hidden}


def config_of(command: str) -> type:
    module, _, name = CONFIGS[command].rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


# The options


def test_every_command_has_a_configuration_or_needs_none() -> None:
    assert set(COMMANDS) == set(CONFIGS) | WITHOUT_CONFIG


@pytest.mark.parametrize("command", CONFIGS)
def test_options_and_defaults_are_the_fields_and_defaults_of_the_configuration(command: str) -> None:
    config = config_of(command)
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    if command == "analyze":
        fields.pop("codes")
    values = values_of(command)
    assert list(values) == list(fields) or set(values) == set(fields)
    for name, default in fields.items():
        if default is not dataclasses.MISSING:
            if name in SWEPT and command == "train":
                default = () if default is None else (default,)
            assert (values[name], type(values[name])) == (default, type(default)), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_and_its_defaults(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    example = result.stdout.partition("Example:")[2]
    assert f"actstore {command} " in example
    assert "--json" in result.stdout


def test_the_help_lists_every_command_and_the_version_is_the_packages() -> None:
    listed = invoke("--help").stdout
    assert "Example:" in listed
    assert all(command in listed for command in COMMANDS)
    assert __version__ in invoke("--version").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["info"],
        ["collect"],
        ["collect", "--out", "x", "--no-such-option"],
        ["collect", "--out", "x", "--tokens", "many"],
        ["collect", "--out", "x", "--workers", "two"],
        ["verify", "store", "--level", "nonsense"],
        ["repair", "store", "--level", "nonsense"],
        ["repair"],
        ["recode", "store"],
        ["info", "store", "--row", "first"],
        ["train", "store", "--out", "x", "--layer", "six"],
        ["feature", "analysis", "first"],
        ["analyze", "a", "b", "c", "--out", "x"],
    ],
    ids=" ".join,
)
def test_a_wrong_usage_exits_with_2_and_does_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stage_says_what_it_runs_with_defaults_included(store: Path, tmp_path: Path) -> None:
    result = invoke("train", store, "--out", tmp_path / "run", "--layer", 2, "--features", 8, "--k", 2, "--batch", 64)
    assert result.exit_code == 0
    first = result.stderr.splitlines()[0]
    assert first.startswith(
        f"train: store={store} out={tmp_path / 'run'} layer=2 site=resid_post architecture=topk features=8 k=2 "
    )
    assert " epochs=1.0 batch=64 lr=auto l1=auto " in first


# What a program reads


def read(result: Result) -> Any:
    """Standard output as strict JSON: no NaN, nothing before or after."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=pytest.fail)


def test_info_and_verify_print_json(store: Path) -> None:
    found = read(invoke("info", store, "--json"))
    opened = ActivationStore(store)
    assert found["store_id"] == opened.store_id
    assert found["rows"] == {part: opened.n_rows(part) for part in ("train", "heldout")}
    assert found["shards_committed"] == found["shards_planned"]
    assert found["disk_bytes"] == opened.disk_bytes
    assert read(invoke("verify", store, "--json")) == {"path": str(store), "level": "full", "faults": []}


def test_verify_prints_the_faults_as_json_and_exits_with_1(store: Path, tmp_path: Path) -> None:
    own = shutil.copytree(store, tmp_path / "store")
    file = own / "data.zarr/segments/0000/train/acts/resid_post.0/c/0/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    result = invoke("verify", own, "--json")
    assert result.exit_code == 1
    (fault,) = json.loads(result.stdout)["faults"]
    assert "train/acts/resid_post.0/c/0/0" in fault
    progress, line = result.stderr.splitlines()
    assert progress.startswith("verify: ")
    assert line.startswith("error: ")


def test_repair_prints_json_and_says_what_to_do_next(store: Path, tmp_path: Path) -> None:
    whole = read(invoke("repair", store, "--json"))
    assert whole == {"store": str(store), "faults": 0, "restored": [], "dropped": [], "shards": []}
    own = shutil.copytree(store, tmp_path / "store")
    name = "data.zarr/segments/0000/train/acts/resid_post.0/c/0/0"
    (own / name).unlink()
    (own / "manifest.json").write_text("{}")
    found = read(invoke("repair", own, "--level", "meta", "--json"))
    assert found["restored"] == ["manifest.json"]
    assert found["shards"] == ["segment 0 train 0"]
    assert "commits/0000/train/000000.json" in found["dropped"]
    assert found["next"] == "run the command that wrote the store again, with the same arguments"


def test_recode_and_ls_print_json(store: Path, run: Path, tmp_path: Path) -> None:
    found = read(invoke("recode", store, "--out", tmp_path / "int8", "--encoding", "int8", "--json"))
    opened = ActivationStore(tmp_path / "int8")
    assert found["store_id"] == opened.store_id
    assert found["disk_bytes"] == opened.disk_bytes
    assert set(found["unexplained"]) == set(opened.sites)
    shutil.copytree(run, tmp_path / "run")
    listed = {Path(row["path"]).name: row for row in read(invoke("ls", tmp_path, "--json"))}
    assert {name: row["kind"] for name, row in listed.items()} == {"int8": "store", "run": "run"}
    assert listed["int8"]["id"] == opened.store_id


def test_estimate_and_the_origin_of_a_row_print_json(store: Path, texts: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", model_folder, "--corpus", texts, "--tokens", 4000, "--context", 32, "--layer", 1)
    found = read(invoke("estimate", "--out", tmp_path / "new", *arguments, "--json"))
    assert found["tokens"] == 4000
    assert found["rows"] == pytest.approx(4000, rel=0.01)
    assert not (tmp_path / "new").exists()
    origin = read(invoke("info", store, "--row", 5, "--json"))
    assert (origin["segment"], origin["shard"]) == (0, 0)
    assert origin["document_name"] in ActivationStore(store).document_names(0)
    assert f"[[{origin['token']}]]" in origin["text"]


def test_collect_and_train_print_json(store: Path, texts: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", model_folder, "--corpus", texts, "--tokens", 300, "--context", 32, "--layer", 1)
    collected = read(invoke("collect", "--out", tmp_path / "store", *arguments, "--json"))
    assert collected["tokens"] == 300
    assert collected["store_id"] == ActivationStore(tmp_path / "store").store_id
    options = ("--layer", 2, "--features", 16, "--k", 2, "--batch", 128)
    trained = read(invoke("train", store, "--out", tmp_path / "run", *options, "--json"))
    assert trained["n_features"] == 16
    assert trained["store_id"] == ActivationStore(store).store_id


def test_evaluate_and_inspect_print_json(store: Path, run: Path, tmp_path: Path) -> None:
    figures = read(invoke("evaluate", run, store, "--windows", 4, "--pca", 4, "--json"))
    assert figures["heldout_rows"] == ActivationStore(store).n_rows("heldout")
    (tmp_path / "texts.txt").write_text("The fox went to the river.\nAn owl saw it.\n")
    found = read(invoke("inspect", run, "--texts", tmp_path / "texts.txt", "--features", 3, "--json"))
    assert found["texts"] == 2
    assert len(found["features"]) == 3


def test_encode_and_everything_after_it_print_json(store: Path, codes: Path, analysis: Path, tmp_path: Path) -> None:
    assert read(invoke("info", codes, "--json"))["kind"] == "codes"
    listed = read(invoke("features", analysis, "--top", 4, "--json"))
    assert len(listed) == 4
    card = read(invoke("feature", analysis, listed[0]["feature"], "--json"))
    assert card["feature"] == listed[0]["feature"]
    found = read(invoke("search", analysis, card["tokens"][0]["text"], "--json"))
    assert listed[0]["feature"] in [row["feature"] for row in found["results"][0]["features"]]
    page = read(invoke("report", analysis, "--out", tmp_path / "page.html", "--json"))
    assert page["bytes"] == (tmp_path / "page.html").stat().st_size


def test_encode_and_analyze_print_json(store: Path, run: Path, client: Any, tmp_path: Path) -> None:
    where = ("--scheduler", client.scheduler.address, "--json")
    opened = ActivationStore(store)
    assert read(invoke("encode", store, run, "--out", tmp_path / "codes", *where))["rows"] == sum(
        opened.n_rows(part) for part in ("train", "heldout")
    )
    analyzed = read(invoke("analyze", store, run, "--out", tmp_path / "analysis", *where))
    assert sum(analyzed["bands"].values()) == 64
    assert (tmp_path / "analysis.codes/manifest.json").read_bytes() == (tmp_path / "codes/manifest.json").read_bytes()


# Failure


def test_an_error_is_one_line_and_debug_shows_where_it_was_raised(tmp_path: Path) -> None:
    plain, debug = run_cli("info", tmp_path), run_cli("--debug", "info", tmp_path)
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.count("\n") == 1
    assert plain.stderr.startswith(f"error: {tmp_path}: is an empty folder; pass a store")
    assert "Traceback" in debug.stderr
    assert "NotAStore" in debug.stderr


def test_resuming_needs_a_store(tmp_path: Path) -> None:
    result = invoke("collect", "--out", tmp_path / "store", "--resume")
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'store'}: nothing to resume; leave --resume out to begin a new store.\n"


def test_ctrl_c_keeps_what_was_committed_and_the_same_command_completes_it(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    texts = write_texts(tmp_path / "texts", 60)  # seconds of work, so that the signal comes in its midst
    config = CollectConfig(
        out=out, model=str(model_folder), corpus=str(texts), layer=(0,), context=8, batch_windows=1, encoding="fp32"
    )
    options = ("--layer", "0", "--context", "8", "--batch-windows", "1", "--encoding", "fp32")
    # A shell's background job ignores SIGINT, and so would a child of it; a handler becomes the default on exec.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "cli.py"),
            "collect",
            "--out",
            out,
            "--model",
            model_folder,
            "--corpus",
            texts,
            *options,
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, ignored)
    while len(list(out.glob("commits/0000/*/*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert (process.returncode, printed) == (130, "")
    lines = [line for line in said.splitlines() if line and not line.startswith("collect: ")]
    assert lines == ["stopped; everything committed is kept."]

    stopped = ActivationStore(out, partial=True)
    assert sum(len(stopped.shards(part)) for part in ("train", "heldout")) >= 2
    assert faults_in(out) == []
    committed = {name: state for name, state in folder_state(out / "commits").items() if name.endswith(".json")}
    assert not (out / "commits/0000/sealed.json").exists()
    result = collect(config)
    assert 2 <= result["shards_committed_before"] < result["shards"]
    after = folder_state(out / "commits")
    assert {name: after[name] for name in committed} == committed
    assert faults_in(out) == []
