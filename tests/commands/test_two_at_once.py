"""Two commands at one output: the second is told so in one line, and nothing of the first is lost or mixed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commandkit import Command

from actstore.folder import Folder
from actstore.lease import held_file
from cli import cli
from pipelines.sae.checkpoint import load_run


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def verified(path: Path) -> None:
    result = CliRunner().invoke(cli, ["verify", str(path)])
    assert result.exit_code == 0, result.output


def second_is_told(first: Command, second: Command, out: Path) -> None:
    """The second ends with 1 and one line while the first is under way; the first ends with 0."""
    ended = second.result()
    assert not first.has_ended, "the two were not under way together"
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert lines == [f"error: {out}: another process is writing there; wait for it, or stop it."]
    assert first.result().returncode == 0


@pytest.mark.processes
@pytest.mark.parametrize("more", [[], ["--k", 2]], ids=["one run", "a sweep"])
def test_a_second_training_at_one_output_is_told_and_the_first_is_whole(
    store: Path, tmp_path: Path, more: list[object]
) -> None:
    asked = ["--layer", 2, "--features", 64, "--k", 4, *more, "--batch", 128, "--device", "cpu"]
    out, alone, epochs = tmp_path / "run", tmp_path / "alone", ["--epochs", 30]
    first = Command.forked(tmp_path, "train", store, "--out", out, *asked, *epochs)
    until(lambda: any(path.stat().st_size for path in out.rglob("metrics.jsonl")))
    second_is_told(first, Command.forked(tmp_path, "train", store, "--out", out, *asked, "--epochs", 1, "--seed", 7), out)
    verified(out)
    logs = list(out.rglob("metrics.jsonl"))
    assert {load_run(log.parent)[1].config["seed"] for log in logs} == {0}
    if len(logs) == 1:
        assert Command.forked(tmp_path, "train", store, "--out", alone, *asked, *epochs).join() == 0
        assert logs[0].read_bytes() == (alone / "metrics.jsonl").read_bytes(), "no line of the second is among the first's"


@pytest.mark.processes
def test_a_second_measurement_of_effects_at_one_output_is_told(run: Path, codes: Path, tmp_path: Path) -> None:
    out = tmp_path / "effects"
    asked = ["effects", run, codes, "--out", out, "--firings", 60, "--device", "cpu", "--resamples", 4000]
    first = Command.forked(tmp_path, *asked)
    until(lambda: (out / "plan.json").exists())
    second_is_told(first, Command.forked(tmp_path, *asked), out)
    verified(out)
    assert len(json.loads((out / "effects.json").read_bytes())["strongest"]) > 0


def test_every_command_holds_its_output(
    store: Path, run: Path, codes: Path, analysis: Path, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    """While another process holds it; what each wrote is then none of anything."""
    out = tmp_path / "out"
    own_run = Path(shutil.copytree(run, tmp_path / "run"))
    export = tmp_path / "params.npz"
    assert CliRunner().invoke(cli, ["export", str(run), "--out", str(export)]).exit_code == 0
    snapshot = json.loads((own_run / "run.json").read_bytes())["snapshot"]
    evaluation = own_run / f"evaluations/{snapshot}-windows128-pca16"
    wanted: list[tuple[Path, list[object]]] = [
        (out, ["collect", "--out", out, "--model", model_folder, "--corpus", texts, "--layer", 0, "--context", 32]),
        (out, ["recode", store, "--out", out]),
        (out, ["encode", store, run, "--out", out, "--workers", 1]),
        (out, ["train", store, "--out", out, "--layer", 2]),
        (out, ["train", store, "--out", out, "--layer", 2, "--k", 2, "--k", 4]),
        (out / "k4", ["train", store, "--out", out, "--layer", 2, "--k", 2, "--k", 4]),
        (evaluation, ["evaluate", own_run, store]),
        (tmp_path / "out.partial", ["analyze", codes, "--out", out, "--threads"]),
        (out, ["structure", analysis, "--out", out]),
        (out, ["concepts", codes, "--out", out, "--no-probe", "--labels", "python"]),
        (out, ["compare", run, run, "--out", out]),
        (out, ["superposition", "--out", out]),
        (out, ["effects", run, codes, "--out", out]),
        (out, ["import", export, "--store", store, "--out", out]),
        (out, ["demo", "--out", out]),
        (tmp_path / "other.npz", ["export", run, "--out", tmp_path / "other.npz"]),
        (tmp_path / "page.html", ["report", analysis, "--out", tmp_path / "page.html"]),
        (tmp_path / "grid.png", ["patch", "fox owl", "--run", run, "--site", "features", "--out", tmp_path / "grid.png"]),
    ]
    for held, arguments in wanted:
        with ExitStack() as stack:
            stack.enter_context(held_file(held) if held.suffix in (".npz", ".html", ".png") else Folder(held).lock())
            result = CliRunner().invoke(cli, list(map(str, arguments)))
        error = result.stderr.splitlines()[-1]
        assert result.exit_code == 1, arguments
        assert error == f"error: {held}: another process is writing there; wait for it, or stop it.", arguments
        for path in (held, out):
            shutil.rmtree(path, ignore_errors=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "params.npz", "params.json", "out.partial"}
