"""What a user can get wrong: one clear line that names the thing and the remedy, exit 1, nothing written or lost."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from modelkit import folder_state, run_cli

from actstore.errors import InputError
from actstore.reader import ActivationStore
from cli import MODULES, cli
from pipelines.commands.numbers import Real, Whole
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run, save_run

Refused = Callable[..., str]


def the_line(command: str, exit_code: int, stdout: str, stderr: str) -> str:
    """The one line of an error, after the line that shows the configuration, and the address of a dashboard."""
    assert exit_code == 1, (stdout, stderr)
    assert stdout == ""
    *before, line = (shown for shown in stderr.splitlines() if not shown.startswith("dashboard: "))
    assert len(before) <= 1, stderr
    assert all(shown.startswith(f"{command}: ") for shown in before), stderr
    assert line.startswith("error: ")
    return line


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Nothing below the folders is written, changed or removed."""
    before = [folder_state(folder) for folder in folders]
    yield
    assert [folder_state(folder) for folder in folders] == before


@pytest.fixture
def refused(tmp_path: Path, store: Path, run: Path) -> Refused:
    """Run a command in this process and give its error; whatever lies in `tmp_path` must be as it was."""

    def refuse(command: str, *arguments: object) -> str:
        with untouched(tmp_path, store, run):
            result = CliRunner().invoke(cli, [command, *map(str, arguments)])
        return the_line(command, result.exit_code, result.stdout, result.stderr)

    return refuse


@pytest.fixture
def asked(model_folder: Path, texts: Path, tmp_path: Path) -> dict[str, object]:
    """The options of a collection that would work."""
    return {"--out": tmp_path / "new", "--model": model_folder, "--corpus": texts, "--tokens": 200, "--context": 32}


def options(given: dict[str, object]) -> list[object]:
    return [part for pair in given.items() for part in pair]


@pytest.fixture
def half_written(store: Path, tmp_path: Path) -> Path:
    """The store without its last commits."""
    own = Path(shutil.copytree(store, tmp_path / "half"))
    (own / "commits/0000/sealed.json").unlink()
    (own / "commits/0000/train/000003.json").unlink()
    return own


# The model


def test_no_such_model_folder(refused: Refused, asked: dict[str, object], tmp_path: Path) -> None:
    line = refused("collect", *options(asked | {"--model": tmp_path / "nowhere"}))
    assert str(tmp_path / "nowhere") in line
    assert "no such local folder" in line
    assert line.endswith("pass a local folder, `builtin`, or a hub id with the network up.")


def test_a_hub_id_without_network(asked: dict[str, object], tmp_path: Path) -> None:
    with untouched(tmp_path):
        result = run_cli("collect", *options(asked | {"--model": "no-such-owner/no-such-model"}))
    line = the_line("collect", result.returncode, result.stdout, result.stderr)
    assert line.startswith("error: model no-such-owner/no-such-model: no such local folder, and the hub gave: ")
    assert line.endswith("or a hub id with the network up.")


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_the_model_has_not(layer: int, refused: Refused, asked: dict[str, object]) -> None:
    line = refused("collect", *options(asked | {"--layer": layer}))
    assert line == f"error: layer {layer}: the model has 3 blocks; choose 0 to 2."


def test_a_device_that_is_not_there(refused: Refused, asked: dict[str, object]) -> None:
    assert "choose auto or cpu." in refused("collect", *options(asked | {"--device": "abacus"}))


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        (
            "--encoding",
            "nonsense",
            "encoding 'nonsense', compute dtype 'fp32', packing 'packed': choose from fp16, fp32, bf16, int8; fp32, bf16; "
            "packed, document.",
        ),
        ("--compute-dtype", "int8", "encoding 'fp16', compute dtype 'int8', packing 'packed': choose from "),
        ("--packing", "loose", "encoding 'fp16', compute dtype 'fp32', packing 'loose': choose from "),
        ("--site", "nonsense", "site 'nonsense': known sites are resid_pre, resid_post, attn_out, mlp_out, mlp_hidden."),
        ("--tokens", 0, "--tokens 0: not a number from 1 to 9,007,199,254,740,992; choose one."),
        ("--workers", -1, "--workers -1: not a number from 0 to 9,007,199,254,740,992; choose one."),
        ("--shard-mib", 0, "--shard-mib 0: not a number from 1 to 9,007,199,254,740,992; choose one."),
        ("--context", 65, "context 65: the model has 64 positions; choose --context 64 or less."),
    ],
)
def test_a_collection_that_makes_no_sense(
    option: str, value: object, line: str, refused: Refused, asked: dict[str, object]
) -> None:
    for command in ("collect", "estimate"):
        assert refused(command, *options(asked | {option: value})).startswith(f"error: {line}")


@pytest.mark.parametrize("command", ["collect", "info", "verify", "repair", "recode"])
def test_a_place_of_an_unknown_kind(command: str, refused: Refused, asked: dict[str, object], store: Path) -> None:
    place = "ftp://host/store"
    given = {"collect": options(asked | {"--out": place}), "recode": [store, "--out", place]}.get(command, [place])
    line = refused(command, *given)
    assert line == "error: ftp://host/store: scheme 'ftp' is not known; use a path or one of s3, gs, az."


# The corpus


@pytest.mark.parametrize("content", [None, "", "\ufeff"], ids=["no file", "an empty file", "nothing but a mark"])
def test_an_empty_corpus(content: str | None, refused: Refused, asked: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    if content is not None:
        (tmp_path / "books/a.txt").write_text(content)
    line = refused("collect", *options(asked | {"--corpus": tmp_path / "books"}))
    assert f"corpus {tmp_path / 'books'}: " in line
    assert ("has no text; nothing was written" if content is not None else "no file there") in line


def test_a_corpus_column_that_is_not_there(refused: Refused, asked: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a story", "title": "b"}) + "\n")
    line = refused("collect", *options(asked | {"--corpus": f"{tmp_path}/d.jsonl#body"}))
    assert "d.jsonl: no column 'body'; it has text, title: choose one with #column." in line


def test_a_corpus_that_is_no_utf8(refused: Refused, asked: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    line = refused("collect", *options(asked | {"--corpus": tmp_path / "a.txt"}))
    assert line.endswith("a.txt: byte 3 is not utf-8; convert the file to UTF-8.")


# The output


@pytest.mark.parametrize("there", ["a file", "a folder"])
def test_an_output_that_exists(
    there: str,
    refused: Refused,
    asked: dict[str, object],
    store: Path,
    run: Path,
    codes: Path,
    analysis: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "mine"
    if there == "a folder":
        out.mkdir()
    (out / "thesis.txt" if there == "a folder" else out).write_text("years of work")
    commands: dict[str, list[object]] = {
        "collect": options(asked),
        "train": [store, "--layer", 2, "--features", 64, "--k", 4, "--batch", 256],
        "recode": [store],
        "encode": [store, run],
        "analyze": [codes],
        "report": [analysis],
    }
    for command, arguments in commands.items():
        line = refused(command, *arguments, "--out", out)
        assert line.startswith(f"error: {out}: exists"), command
        assert "choose another --out, or move it away." in line


def test_an_output_of_the_same_kind_is_not_written_over(
    refused: Refused, asked: dict[str, object], store: Path, run: Path, codes: Path, analysis: Path, client: Any
) -> None:
    assert "holds another store" in refused("collect", *options(asked | {"--out": store, "--context": 16}))
    assert "holds another store" in refused("collect", *options(asked | {"--out": codes}))
    assert "holds another store" in refused("encode", store, run, "--out", store, "--scheduler", client.scheduler.address)
    assert f"{run}: exists" in refused("train", store, "--layer", 2, "--out", run)
    assert f"{analysis}: exists" in refused("analyze", codes, "--out", analysis)
    assert f"{analysis}: exists" in refused("analyze", store, run, "--out", analysis)


def test_too_little_free_space(
    refused: Refused,
    asked: dict[str, object],
    store: Path,
    run: Path,
    codes: Path,
    analysis: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actstore.files.free_bytes", lambda path: 1_000_000)
    out = tmp_path / "new"
    commands: dict[str, list[object]] = {
        "collect": options(asked),
        "train": [store, "--layer", 2, "--features", 64, "--k", 4, "--batch", 256],
        "recode": [store],
        "encode": [store, run],
        "analyze": [codes],
        "report": [analysis],
    }
    for command, arguments in commands.items():
        line = refused(command, *arguments, "--out", out)
        assert re.search(rf"{out}: .* needs .* MB and 67 MB in reserve, the disk has 1 MB free; free some space", line), (
            command
        )


# The store


def test_a_store_that_is_none(refused: Refused, run: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "file").write_text("no store")
    found = {"store": "is an empty folder", "file": "is a file", "nowhere": "nothing is there"}
    for path in (tmp_path / name for name in found):
        named = "is a file, " if path.name == "file" else ""
        for command, *arguments in (
            ("recode", path, "--out", tmp_path / "new"),
            ("train", path, "--out", tmp_path / "new"),
            ("evaluate", run, path),
            ("encode", path, run, "--out", tmp_path / "new"),
            ("analyze", path, "--out", tmp_path / "new"),
        ):
            line = refused(command, *arguments)
            assert line.startswith(f"error: {path}: {named}not a store (no manifest.json); pass a folder"), command
        line = refused("repair", path)
        assert line == f"error: {path}: {named}not a store; pass a folder that `collect` or `encode` wrote."
        for command in ("info", "verify"):
            assert refused(command, path).startswith(f"error: {path}: {found[path.name]}; pass a"), command
        for command, *arguments in (("features", path), ("feature", path, 0), ("report", path, "--out", tmp_path / "new")):
            assert refused(command, *arguments).startswith(f"error: {path}: {named}not an analysis (no analysis.json)"), (
                command
            )


def test_a_run_that_is_none(refused: Refused, store: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a text")
    for command, *arguments in (
        ("encode", store, tmp_path / "nowhere", "--out", tmp_path / "new"),
        ("evaluate", tmp_path / "nowhere", store),
        ("inspect", tmp_path / "nowhere", "--texts", tmp_path / "texts.txt"),
    ):
        assert refused(command, *arguments).startswith(f"error: {tmp_path / 'nowhere'}: not a finished run"), command


def test_a_store_of_the_other_kind(refused: Refused, store: Path, codes: Path, run: Path, tmp_path: Path) -> None:
    assert "holds codes, activations are needed" in refused("train", codes, "--out", tmp_path / "new")
    assert "holds codes, activations are needed" in refused("evaluate", run, codes)
    assert "holds activations, codes are needed" in refused("analyze", store, "--out", tmp_path / "new")


def test_an_encoding_that_is_none(refused: Refused, store: Path, tmp_path: Path) -> None:
    line = refused("recode", store, "--out", tmp_path / "new", "--encoding", "nonsense")
    assert line == "error: encoding 'nonsense': choose from fp16, fp32, bf16, int8."


def test_codes_cannot_be_recoded(refused: Refused, codes: Path, tmp_path: Path) -> None:
    assert "holds codes, activations are needed" in refused("recode", codes, "--out", tmp_path / "new")


def test_a_store_that_somebody_writes(refused: Refused, asked: dict[str, object], store: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(store, tmp_path / "store"))
    (own / "lock").touch()
    with (own / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        given = options(asked | {"--out": own, "--encoding": "fp32", "--tokens": 1_000_000, "--layer": 0})
        for command, *arguments in (("collect", *given, "--layer", 2), ("repair", own), ("recode", store, "--out", own)):
            line = refused(command, *arguments)
            assert line == f"error: {own}: another process is writing there; wait for it, or stop it.", command
        for command in ("info", "verify"):
            assert CliRunner().invoke(cli, [command, str(own)]).exit_code == 0, "who only reads need not wait"


def test_a_row_that_is_not_there(refused: Refused, store: Path) -> None:
    n_rows = ActivationStore(store).n_rows()
    line = refused("info", store, "--row", n_rows)
    assert line == f"error: {store}: has {n_rows:,} train rows, row {n_rows:,} was asked for; count from 0."


def test_a_folder_that_is_none(refused: Refused, tmp_path: Path) -> None:
    assert (
        refused("ls", tmp_path / "nowhere")
        == f"error: {tmp_path / 'nowhere'}: not a folder; pass one that holds stores or runs."
    )


def test_a_half_written_store(refused: Refused, half_written: Path, run: Path, tmp_path: Path) -> None:
    for command, *arguments in (
        ("train", half_written, "--layer", 2, "--out", tmp_path / "new"),
        ("recode", half_written, "--out", tmp_path / "new"),
        ("encode", half_written, run, "--out", tmp_path / "new"),
        ("evaluate", run, half_written),
    ):
        line = refused(command, *arguments)
        assert re.search(rf"{half_written}: half-written, \d+ of \d+ shards are committed; run the command .* again", line)


def test_a_layer_or_site_the_store_has_not(refused: Refused, store: Path, tmp_path: Path) -> None:
    assert "has no site resid_post.1; it holds resid_post.0, resid_post.2" in refused(
        "train", store, "--out", tmp_path / "new", "--layer", 1
    )
    assert "several sites fit resid_post; it holds resid_post.0, resid_post.2" in refused(
        "train", store, "--out", tmp_path / "new"
    )


# The SAE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"d_model": 16},
            "the SAE has d_model=16, {store} has d_model=32; train a new SAE, or pass a store of the same model.",
        ),
        (
            {"site": "resid_post.1"},
            "the SAE reads resid_post.1, {store} holds resid_post.0, resid_post.2; pass a store of that",
        ),
        ({"weights_sha256": "f" * 64}, "the SAE was trained on a model with weights ffffffffffff, {store} comes from"),
    ],
    ids=["another width", "another store's site", "another model"],
)
def test_an_sae_of_something_else(
    change: dict[str, object], message: str, refused: Refused, store: Path, run: Path, tmp_path: Path
) -> None:
    record = replace(load_run(run)[1], **change)  # type: ignore[arg-type]
    save_run(tmp_path / "run", TopKSae(record.d_model, record.n_features, record.k), record)
    expected = f"error: {tmp_path / 'run'}: {message.format(store=store)}"
    assert refused("encode", store, tmp_path / "run", "--out", tmp_path / "new").startswith(expected)
    assert refused("evaluate", tmp_path / "run", store).startswith(expected)


def test_more_active_features_than_there_are(refused: Refused, store: Path, tmp_path: Path) -> None:
    line = refused("train", store, "--out", tmp_path / "new", "--layer", 2, "--features", 50, "--k", 51)
    assert line == "error: k 51: there are 50 features; choose --k between 1 and 50."


# The analysis and the cluster


@pytest.mark.parametrize("feature", [64, 1000])
def test_a_feature_that_is_not_there(feature: int, refused: Refused, analysis: Path) -> None:
    line = refused("feature", analysis, feature)
    assert line == f"error: feature {feature}: {analysis} has 64 features; choose 0 to 63."


def test_an_order_that_is_none(refused: Refused, analysis: Path) -> None:
    assert refused("features", analysis, "--sort", "beauty").endswith(
        "choose one of frequency, mean, peak, documents, burstiness, id."
    )


def test_a_scheduler_that_does_not_answer(
    refused: Refused, codes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    line = refused("analyze", codes, "--out", tmp_path / "new", "--scheduler", address)
    assert time.monotonic() - started < 15
    assert line.startswith(f"error: scheduler {address}: does not answer within 10 s; check the address")
    assert capfd.readouterr() == ("", ""), "what libraries say stays off the terminal"


@pytest.mark.parametrize("command", ["collect", "encode", "analyze"])
def test_a_scheduler_whose_address_is_none(
    command: str, refused: Refused, asked: dict[str, object], store: Path, run: Path, codes: Path, tmp_path: Path
) -> None:
    given = {"collect": options(asked), "encode": [store, run], "analyze": [codes]}[command]
    line = refused(command, *given, "--out", tmp_path / "new", "--scheduler", "nonsense://host")
    assert line.startswith("error: scheduler nonsense://host: ")
    assert "check the address" in line


WITH_WORKERS = ("collect", "estimate", "encode", "analyze", "structure", "concepts", "demo")


def test_workers_mean_the_same_in_every_command() -> None:
    found = {}
    for name in MODULES:
        for parameter in cli.get_command(None, name).params:  # type: ignore[attr-defined, union-attr]
            if "--workers" in parameter.opts:
                found[name] = (parameter.help, parameter.type.bounds[0])
    assert found == dict.fromkeys(found, ("Local Dask worker processes; 0: in this process.", 0))
    assert set(found) == set(WITH_WORKERS)


def test_no_workers_are_this_process(store: Path, run: Path, codes: Path, tmp_path: Path) -> None:
    from storekit import files_of

    result = CliRunner().invoke(cli, ["encode", str(store), str(run), "--out", str(tmp_path / "codes"), "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert files_of(tmp_path / "codes") == files_of(codes)


def test_every_number_option_has_bounds() -> None:
    """A number without one was a training that never ends, a traceback, or a NaN that passes every comparison."""
    unbounded = [
        f"{name} {parameter.opts[0]}"
        for name in MODULES
        for parameter in cli.get_command(None, name).params  # type: ignore[attr-defined, union-attr]
        if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
        and not isinstance(parameter.type, Whole | Real)
    ]
    assert unbounded == []


BEYOND = {Whole: ["9" * 30, "-" + "9" * 30], Real: ["nan", "inf", "-inf", "1e300", "-1e300"]}


def test_a_number_beyond_its_bounds_is_one_line_in_every_option_of_every_command() -> None:
    for name in MODULES:
        command = cli.get_command(None, name)  # type: ignore[attr-defined]
        for parameter in command.params:
            for value in BEYOND.get(type(parameter.type), []):
                context = click.Context(command)
                with pytest.raises(InputError) as refusal:
                    parameter.type_cast_value(context, (value,) if parameter.multiple else value)
                assert str(refusal.value).startswith(f"{parameter.opts[0]} {value}: not a number "), (name, parameter.opts)


@pytest.mark.parametrize("epochs", ["1e300", "nan", "inf", "-1", "0"])
def test_epochs_that_never_end_are_refused(epochs: str, refused: Refused, store: Path, tmp_path: Path) -> None:
    line = refused("train", store, "--layer", 2, "--out", tmp_path / "new", "--epochs", epochs)
    assert line == f"error: --epochs {epochs}: not a number above 0 to 1e+06; choose one."


# Interventions


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        ("ablate", ["TEXT", "--feature", 64], "feature 64: the SAE has 64 features; choose 0 to 63."),
        ("ablate", [""], "has no token; give some text."),
        ("ablate", ["fox " * 99], "the model has 64 positions; shorten it."),
        ("steer", [64, "fox"], "feature 64: the SAE has 64 features; choose 0 to 63."),
        ("steer", [1, ""], "has no token; give some text."),
        ("steer", [1, "fox", "--tokens", 64], "more than the model's 64 positions; ask for fewer."),
        ("lens", [64], "feature 64: the SAE has 64 features; choose 0 to 63."),
    ],
)
def test_a_feature_or_text_that_does_not_fit_is_refused(
    refused: Refused, run: Path, command: str, arguments: list[object], line: str
) -> None:
    assert refused(command, run, *arguments, "--device", "cpu").endswith(line)


@pytest.mark.parametrize("command", ["ablate", "steer", "lens", "effects"])
def test_a_store_without_the_layer_of_the_sae_is_refused(
    refused: Refused, run: Path, small_store: Path, codes: Path, tmp_path: Path, command: str
) -> None:
    needed = {"ablate": ["fox"], "steer": [1, "fox"], "lens": [], "effects": [codes, "--out", tmp_path / "effects"]}
    line = refused(command, run, *needed[command], "--store", small_store, "--device", "cpu")
    assert "the SAE reads resid_post.2" in line
    assert "holds resid_post.0" in line
