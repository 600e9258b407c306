"""A model's folder from a stranger runs no code: it is loaded as weights of a known family, or refused in one line."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from modelkit import ROOT
from safetensors.torch import load_file
from torch import nn

from actstore.errors import InputError
from cli import cli
from pipelines.models.load import load_model
from pipelines.text.tokenizer_files import open_tokenizer


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder, for a stranger to change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a stranger's code would make."""
    return tmp_path / "ran"


class Payload:
    """What runs when a pickle of it is loaded without care."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def configure(folder: Path, file: str = "config.json", **values: Any) -> None:
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | values))


def bring_code(folder: Path, mark: Path, **auto_map: str) -> None:
    """A module that leaves its mark when it is imported, and a configuration that asks for it."""
    classes = {name.rpartition(".")[2] for name in auto_map.values()}
    lines = ["from pathlib import Path", f"Path({str(mark)!r}).touch()", *(f"class {name}: pass" for name in classes)]
    (folder / "own.py").write_text("\n".join(lines))
    configure(folder, auto_map=auto_map)


def refused(folder: Path, load: Callable[[str], object] = lambda name: load_model(name, "cpu", "fp32")) -> str:
    with pytest.raises(InputError) as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"model {folder}: ")


def one_line(load: Callable[[], object]) -> str:
    """The error's line; nothing where what is loaded does not need the file that was changed."""
    try:
        load()
    except InputError as error:
        line = str(error)
    else:
        return ""
    assert "\n" not in line
    return line


def test_an_unknown_family_is_refused_without_a_question(
    folder: Path, mark: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bring_code(folder, mark, AutoConfig="own.Config", AutoModelForCausalLM="own.Model")
    configure(folder, model_type="strange")
    assert refused(folder) == "family 'strange'; known are gpt2; the code that comes with it is not run."
    assert not mark.exists()
    said = capfd.readouterr()
    assert "y/N" not in said.out + said.err


def test_the_command_gives_one_line_and_waits_for_no_answer(folder: Path, mark: Path, tmp_path: Path) -> None:
    bring_code(folder, mark, AutoConfig="own.Config", AutoModelForCausalLM="own.Model")
    configure(folder, model_type="strange")
    asked = ["collect", "--out", str(tmp_path / "store"), "--model", str(folder), "--tokens", "100"]
    result = CliRunner().invoke(cli, asked, input="y\n" * 9)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["collect", "error"]
    assert not mark.exists()


def test_code_beside_a_known_family_is_not_run(folder: Path, mark: Path) -> None:
    bring_code(folder, mark, AutoConfig="own.Config", AutoModelForCausalLM="own.Model", AutoTokenizer="own.Tokens")
    configure(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokens", "own.Tokens"]})
    assert isinstance(load_model(str(folder), "cpu", "fp32"), nn.Module)
    assert open_tokenizer(str(folder)).is_fast
    assert not mark.exists()


@pytest.mark.parametrize(
    "value", ["someone/kernel", "kernels-community/flash-attn2", "flash_attention_2", "paged|someone/kernel"]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_would_be_fetched_is_refused(key: str, value: str, folder: Path) -> None:
    configure(folder, **{key: value})
    line = f"config.json asks for attention by {value!r}, known are eager, sdpa; remove attn_implementation from it."
    assert refused(folder) == line


@pytest.mark.parametrize("form", ["torch", "pickle", "bytes"])
def test_pickled_weights_that_are_no_tensors_are_refused_in_one_line(
    form: str, folder: Path, mark: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    if form == "torch":
        torch.save({"transformer.wte.weight": Payload(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(mark)) if form == "pickle" else b"no pickle at all")
    assert refused(folder) == (
        "its pickled weights are something other than tensors; reading them could run code, and was stopped; "
        "take the model as safetensors."
    )
    assert not mark.exists()
    assert not recwarn.list


def test_sound_pickled_weights_are_read_and_safetensors_come_first(folder: Path, mark: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save({name: Payload(mark) for name in weights}, folder / "pytorch_model.bin")
    first = load_model(str(folder), "cpu", "fp32").state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    second = load_model(str(folder), "cpu", "fp32").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not mark.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"n_head": 0},
        {"n_head": "four"},
        {"activation_function": "none such"},
        {"model_type": ["gpt2"]},
        {"model_type": {"a": 1}},
        {"dtype": "none such"},
        {"n_embd": 10**9},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_configuration_that_is_wrong_in_any_way_is_one_line(values: dict[str, Any], folder: Path) -> None:
    configure(folder, **values)
    assert refused(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '"x"', "[" * 100_000, "\x00"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_a_file_that_is_no_object_is_one_line(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    if file.startswith("model"):
        (folder / "model.safetensors").unlink()
    if file != "generation_config.json":
        assert refused(folder)
    elif line := one_line(lambda: load_model(str(folder), "cpu", "fp32")):
        assert line.startswith(f"model {folder}: ")


def test_an_index_of_weights_cannot_make_a_pickle_run(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(mark)}, folder / "part.bin")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "part.bin"}}))
        assert "could run code, and was stopped" in refused(folder)
        (folder / index).unlink()
    assert not mark.exists()


@pytest.mark.parametrize("tokenizer_class", ["NoneSuch", 3, None])
def test_a_tokenizer_of_a_strange_class_is_one_line_or_the_fast_one(tokenizer_class: object, folder: Path) -> None:
    configure(folder, "tokenizer_config.json", tokenizer_class=tokenizer_class)
    line = one_line(lambda: open_tokenizer(str(folder)))
    assert not line or line.startswith(f"model {folder}: no tokenizer")


def test_whatever_transformers_loads_is_loaded_without_its_code() -> None:
    for path in [*sorted((ROOT / "pipelines").rglob("*.py")), *sorted((ROOT / "actstore").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if node.func.attr == "from_pretrained":
                assert named.get("trust_remote_code") == "False", where
            if ast.unparse(node.func) == "torch.load":
                assert named.get("weights_only") == "True", where
            if ast.unparse(node.func) == "np.load":
                assert named.get("allow_pickle") == "False", where
            assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "pd.read_pickle"), where
