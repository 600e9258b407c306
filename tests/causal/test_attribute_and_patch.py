"""The commands `attribute` and `patch`: what they print, and the one line they refuse with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from modelkit import build_model
from PIL import Image

from cli import cli
from pipelines.causal.patch.heatmap import heat_lines

CLEAN, CORRUPT = "The fox 31 went to", "The owl 31 went to"


def output(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def read(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(output(*arguments, "--json")))


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("extra", [(), ("--by", "layer"), ("--raw",), ("--against", " to"), ("--position", 2)])
def test_attribute_gives_parts_that_sum_to_the_logit(model_folder: Path, extra: tuple[object, ...]) -> None:
    found = read("attribute", CLEAN, "--model", model_folder, "--target", " the", *extra)
    shares = [part["share"] for part in found["parts"]]
    assert sum(shares) == pytest.approx(found["sum"])
    assert abs(found["sum"] - found["logit"]) <= 1e-5 * sum(map(abs, shares))
    assert found["deviation"] < 1e-5
    assert [abs(share) for share in shares] == sorted(map(abs, shares), reverse=True)
    names = {part["name"] for part in found["parts"]}
    assert names >= {"embed", "position", "mlp.2", "final_norm_bias", "attn.1" if "--by" in extra else "L1H3"}
    assert found["target"] == " the"


def test_attribute_splits_what_a_runs_sae_reads_into_features(model_folder: Path, run: Path) -> None:
    found = read("attribute", CLEAN, "--run", run, "--movers", 2)
    names = [part["name"] for part in found["parts"]]
    assert {name.split()[0] for name in names} == {"feature", "sae_bias", "sae_error", "final_norm_bias"}
    assert found["deviation"] < 1e-5
    assert all(len(part["raises"]) == len(part["lowers"]) == 2 for part in found["parts"])
    shown = output("attribute", CLEAN, "--run", run, "--movers", 2, "--top", 2)
    assert "raises" in shown
    assert "of all shares' sizes" in shown


def test_attribute_without_the_final_norm_says_that_it_is_no_sum(model_folder: Path) -> None:
    shown = output("attribute", CLEAN, "--model", model_folder, "--no-final-norm")
    assert "not meant to sum to the logit" in shown


@pytest.mark.parametrize("site", ["resid_pre", "head_out"])
def test_patch_gives_a_grid_whose_estimates_can_be_checked(model_folder: Path, site: str, tmp_path: Path) -> None:
    options = ("--model", model_folder, "--site", site, "--target", " fox", "--against", " the", "--metric", "kl")
    exact = read("patch", CLEAN, CORRUPT, *options)
    assert exact["columns"] == [*exact["tokens"], "all"]
    assert len(exact["rows"]) == len(exact["values"]) == (3 if site == "resid_pre" else 12)
    if site == "resid_pre":
        assert exact["values"][0][-1] == pytest.approx(0, abs=1e-9), "all of the clean run in place: no divergence"
        assert exact["values"][0][0] == pytest.approx(exact["corrupt"], rel=1e-4), "the same start token: nothing is changed"
    estimated = read("patch", CLEAN, CORRUPT, *options, "--method", "attribution", "--check", 12)
    assert estimated["agreement"]["cells"] == 12
    assert estimated["notes"] == []
    noising = read("patch", CLEAN, CORRUPT, *options, "--method", "attribution", "--direction", "noising")
    assert "gradient of KL is zero at the clean run" in noising["notes"][0]
    assert noising["method"] == "integrated gradients, 16 steps"
    picture = tmp_path / "grid.png"
    assert f"saved: {picture}" in output("patch", CLEAN, CORRUPT, *options, "--out", picture)
    with Image.open(picture) as image:
        assert image.format == "PNG"
    output("patch", CLEAN, CORRUPT, *options, "--out", tmp_path / "grid.svg")
    assert "<svg" in (tmp_path / "grid.svg").read_text()


def test_patch_shows_features_and_leaves_positions_alone_that_are_no_rows(run: Path) -> None:
    options = ("--run", run, "--site", "features", "--metric", "log_probability", "--top", 3)
    found = read("patch", CLEAN, CORRUPT, *options)
    assert len(found["rows"]) <= 3
    assert all(row[0] is None and None not in row[1:] for row in found["values"])
    ablated = read("patch", CLEAN, *options, "--method", "attribution", "--check", 20)
    assert ablated["direction"] == "ablation"
    assert ablated["clean"] == 0
    assert ablated["corrupt"] is None
    assert ablated["agreement"]["rank_correlation"] > 0.5
    kl = read("patch", CLEAN, "--run", run, "--site", "features", "--metric", "kl")
    assert all(value is None or value >= 0 for row in kl["values"] for value in row)
    assert kl["notes"], "features are chosen by an estimate, and KL has no gradient here"


def test_a_grid_in_the_terminal_says_its_figures_or_shows_blocks() -> None:
    narrow = heat_lines(["a", "bb"], ["x", "y\n"], [[1.0, -0.5], [float("nan"), 0.0]])
    assert narrow[0].split() == ["x", "y⏎"]
    assert "-0.50" in narrow[1]
    wide = heat_lines(["a"], list("abcdefghijklmnopqr"), [[1.0] + [0.0] * 16 + [-1.0]])
    assert "█" in wide[-1]
    assert "-" in wide[-1]


def test_what_cannot_be_attributed_or_patched_is_refused_in_one_line(
    model_folder: Path, run: Path, tmp_path: Path, texts: Path
) -> None:
    model = ("--model", model_folder)
    assert "has no token" in refused("attribute", "", *model)
    assert "the model has 64 positions" in refused("attribute", "fox " * 90, *model)
    assert "tokens here" in refused("attribute", CLEAN, *model, "--target", " elephant")
    assert "position 90: the text has" in refused("attribute", CLEAN, *model, "--position", 90)
    assert "is no row in the run's store" in refused("attribute", CLEAN, "--run", run, "--position", 0)
    assert "by 'neuron': known are head and layer" in refused("attribute", CLEAN, *model, "--by", "neuron")
    unequal = refused("patch", CLEAN, "An owl", *model)
    assert "the prompts differ in length" in unequal
    assert "' fox'" in unequal
    assert "owl'" in unequal
    assert "less than 0.1 apart" in refused("patch", CLEAN, CORRUPT, *model, "--target", " fox", "--against", " the")
    assert "needs a corrupt text" in refused("patch", CLEAN, *model)
    assert "--site features and --run need each other" in refused("patch", CLEAN, CORRUPT, *model, "--site", "features")
    assert "site 'resid_mid': known are resid_pre" in refused("patch", CLEAN, CORRUPT, *model, "--site", "resid_mid")
    assert "direction 'sideways'" in refused("patch", CLEAN, CORRUPT, *model, "--direction", "sideways")
    assert "metric 'loss': known are" in refused("patch", CLEAN, CORRUPT, *model, "--metric", "loss")
    assert "add --method attribution" in refused("patch", CLEAN, CORRUPT, *model, "--check", 5)
    assert "such an ending" in refused("patch", CLEAN, CORRUPT, *model, "--out", tmp_path / "grid.txt")
    assert "name its run with --run" in refused("attribute", CLEAN, "--store", tmp_path)
    other = build_model(tmp_path / "other", texts, seed=5)
    assert "is not the one" in refused("attribute", CLEAN, "--run", run, "--model", other)
    assert "not a finished run" in refused("patch", CLEAN, "--run", tmp_path / "nowhere", "--site", "features")


@pytest.mark.parametrize("texts", [("attribute", CLEAN), ("patch", CLEAN, CORRUPT)], ids=["attribute", "patch"])
def test_without_network_the_default_model_is_one_line_that_names_the_built_in_one(
    texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    result = CliRunner().invoke(cli, texts)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: model gpt2: no such local folder, and the hub gave: ")
    assert line.endswith("; gpt2 is the default, --model builtin needs no network.")
    assert result.stderr.splitlines()[-1] == line
