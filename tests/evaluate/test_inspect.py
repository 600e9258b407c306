"""What `inspect` says of new sentences, against the model and the SAE run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelkit import build_model
from transformers import AutoTokenizer, GPT2LMHeadModel

from actstore.errors import IdentityMismatch, InputError
from pipelines.evaluate.inspect import InspectConfig, inspect
from pipelines.evaluate.inspect_lines import inspect_lines
from pipelines.sae.checkpoint import load_run

LINES = ["The fox number 3 went to the wood, and", "", "it saw 9 of its friends — “déjà vu”.", "a mole"]
WRITTEN = [line for line in LINES if line]


ByHand = tuple[np.ndarray, list[list[int]], Any]


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("texts") / "lines.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return inspect(InspectConfig(run=run, texts=file, features=5, tokens=3, device="cpu"))


@pytest.fixture(scope="module")
def by_hand(run: Path, model_folder: Path) -> ByHand:
    """Dense codes (tokens, F) of all lines by the definition; the ids of each line; the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    rows: list[torch.Tensor] = []
    model.transformer.h[2].register_forward_hook(
        lambda _m, _i, output: rows.append((output[0] if isinstance(output, tuple) else output)[0, 1:])
    )
    ids_of = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in WRITTEN]
    with torch.inference_mode():
        for ids in ids_of:
            model(torch.tensor([[tokenizer.bos_token_id, *ids]]))
    sae, record = load_run(run)
    x = torch.cat(rows).double()
    pre = (x - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    top = pre.topk(record.k, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()).numpy(), ids_of, tokenizer


def test_the_features_are_those_of_highest_mean(found: dict[str, Any], by_hand: ByHand) -> None:
    codes, ids_of, _ = by_hand
    mean = codes.mean(axis=0)
    assert (found["texts"], found["tokens"]) == (len(WRITTEN), sum(map(len, ids_of)))
    assert [feature["feature"] for feature in found["features"]] == np.argsort(-mean)[:5].tolist()
    for feature in found["features"]:
        assert feature["mean"] == pytest.approx(mean[feature["feature"]], rel=1e-4)


def test_the_tokens_are_those_that_fire_it_most(found: dict[str, Any], by_hand: ByHand) -> None:
    codes, ids_of, tokenizer = by_hand
    places = [(line, position) for line, ids in enumerate(ids_of) for position in range(len(ids))]
    for feature in found["features"]:
        column = codes[:, feature["feature"]]
        strongest = [row for row in np.argsort(-column, kind="stable")[:3].tolist() if column[row] > 0]
        assert len(feature["firings"]) == len(strongest) > 0
        for firing, row in zip(feature["firings"], strongest, strict=True):
            line, position = places[row]
            assert firing["value"] == pytest.approx(column[row], rel=1e-4)
            assert firing["token"] == tokenizer.decode([ids_of[line][position]])
            assert firing["before"] == tokenizer.decode(ids_of[line][max(0, position - 6) : position])
            assert LINES[firing["line"] - 1] == WRITTEN[line]


def test_each_line_shows_the_value_the_text_before_and_the_token(found: dict[str, Any]) -> None:
    lines = inspect_lines(found)
    first = found["features"][0]
    firing = first["firings"][0]
    assert lines[0] == f"{found['tokens']} tokens of 3 texts; features by mean activation:"
    assert lines[1] == f"feature {first['feature']}: mean {first['mean']:.4f}"
    assert lines[2] == f"  {firing['value']:>8.3f}  {firing['before']}[{firing['token']}]"
    assert len(lines) == 1 + sum(1 + len(feature["firings"]) for feature in found["features"])


def test_a_line_longer_than_the_model_is_refused_by_its_number(run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("short\n\n" + "the fox and the owl " * 30 + "\n")
    with pytest.raises(InputError, match=r"texts\.txt: line 3 has \d+ tokens, the model 64 positions; split the line"):
        inspect(InspectConfig(run=run, texts=tmp_path / "texts.txt", device="cpu"))


@pytest.mark.parametrize("data", [b"", b"\n  \n\t\n"], ids=["empty", "blank"])
def test_a_file_without_text_is_refused(run: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "texts.txt").write_bytes(data)
    with pytest.raises(InputError, match="has no text; put one text on each line"):
        inspect(InspectConfig(run=run, texts=tmp_path / "texts.txt", device="cpu"))


@pytest.mark.parametrize("data", [None, b"\xff\xfe"], ids=["missing", "not-utf-8"])
def test_a_file_that_is_no_text_is_refused(run: Path, tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "texts.txt").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        inspect(InspectConfig(run=run, texts=tmp_path / "texts.txt", device="cpu"))


def test_another_model_is_refused(run: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a fox\n")
    other = build_model(tmp_path / "other", texts, seed=1)
    with pytest.raises(IdentityMismatch, match="name the right one with --model"):
        inspect(InspectConfig(run=run, texts=tmp_path / "texts.txt", model=str(other), device="cpu"))
