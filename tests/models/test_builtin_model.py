"""Claims about the built-in model, its n-gram yardsticks, and the data both have seen."""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.models.builtin import model_path
from pipelines.models.builtin.data import encode_documents, read_pinned, split_of
from pipelines.models.builtin.fast import CausalAttention, LinearCrossEntropy
from pipelines.models.builtin.ngram import FALLBACK_DISCOUNTS, KneserNey, estimate_discounts
from pipelines.models.builtin.score import document_bits, sliding_windows
from pipelines.shared.stdlib_sources import is_machine_made, is_test_module, stdlib_files

MAX_WEIGHT_BYTES = 8_000_000
needs_model = pytest.mark.skipif(
    not (model_path() / "model.safetensors").is_file(),
    reason=f"no built-in model at {model_path()}; copy one made by python -m pipelines.models.builtin.train",
)


def random_documents(seed: int, n_vocab: int, n_documents: int = 5, n_tokens: int = 60) -> list[np.ndarray]:
    """Documents of skewed random tokens that begin with token 0."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_vocab + 1)
    return [
        np.concatenate([[0], generator.choice(n_vocab, n_tokens, p=weights / weights.sum())]) for _ in range(n_documents)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ngram_probabilities_are_positive_and_sum_to_one_for_seen_and_unseen_contexts(order: int, seed: int) -> None:
    n_vocab = 13
    model = KneserNey(random_documents(seed, n_vocab), order, n_vocab)
    generator = np.random.default_rng(seed)
    contexts = [(0,), (0, 1, 2), (12, 12, 12), *map(tuple, generator.integers(n_vocab, size=(40, 3)))]
    for context in contexts:
        p = model.prob(context)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fast_scorer_equals_the_product_of_prob(order: int) -> None:
    n_vocab = 13
    model = KneserNey(random_documents(3, n_vocab), order, n_vocab)
    document = random_documents(4, n_vocab)[0]
    bits = sum(-np.log2(model.prob(document[:i])[document[i]]) for i in range(1, len(document)))
    assert model.document_bits([document])[0] == pytest.approx(bits, rel=1e-12)


def reference_trigram(documents: list[np.ndarray], n_vocab: int, u: int, v: int, w: int) -> float:
    """Interpolated Kneser–Ney by dictionaries and recursion, for the same discounts rule."""
    tables = [Counter(tuple(t) for d in documents for t in zip([d[0], d[0], *d[1:]], [d[0], *d[1:]], d[1:], strict=False))]
    while len(next(iter(tables[0]))) > 1:
        tables.insert(0, Counter(ngram[1:] for ngram in tables[0]))
    p = 1 / n_vocab
    for table, ngram in zip(tables, [(w,), (v, w), (u, v, w)], strict=True):
        discount = dict(enumerate(estimate_discounts(np.array(list(table.values()))), start=1))
        followers = {n: c for n, c in table.items() if n[:-1] == ngram[:-1]}
        if total := sum(followers.values()):
            left = sum(discount[min(c, 3)] for c in followers.values()) / total
            own = followers.get(ngram, 0)
            p = (own - discount[min(own, 3)] if own else 0) / total + left * p
    return p


def test_trigram_equals_an_independent_reference_on_a_tiny_corpus() -> None:
    n_vocab = 5
    documents = [np.array(ids) for ids in ([0, 1, 2, 3, 1, 2, 4], [0, 1, 2, 3, 3, 3, 1, 2], [0, 4, 4, 1, 2, 3])]
    model = KneserNey(documents, 3, n_vocab)
    for u in range(n_vocab):
        for v in range(n_vocab):
            p = model.prob((u, v))
            wanted = [reference_trigram(documents, n_vocab, u, v, w) for w in range(n_vocab)]
            np.testing.assert_allclose(p, wanted, rtol=1e-12)


def test_discounts_follow_chen_and_goodman_and_fall_back_on_small_corpora() -> None:
    counts = np.repeat([1, 2, 3, 4], [100, 40, 20, 12])
    y = 100 / 180
    wanted = (1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6)
    assert estimate_discounts(counts) == pytest.approx(wanted)
    assert estimate_discounts(np.array([1, 1, 2])) == FALLBACK_DISCOUNTS


def test_ngram_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match="order 9 with 4096 tokens"):
        KneserNey(random_documents(0, 13), 9, 4096)
    with pytest.raises(ValueError, match="1 documents, none of 2 tokens"):
        KneserNey([np.array([0])], 2, 13)


@pytest.mark.parametrize("n_tokens", [1, 2, 255, 256, 257, 258, 384, 385, 386, 1000])
def test_sliding_windows_score_each_token_once_with_enough_left_context(n_tokens: int) -> None:
    times = np.zeros(n_tokens, dtype=int)
    for window in sliding_windows(n_tokens):
        assert window.stop - window.start <= 256
        assert window.first_target - window.start >= 127 or window.start == 0
        times[window.first_target : window.stop + 1] += 1
    assert times[0] == 0
    assert (times[1:] == 1).all()


class UniformModel(torch.nn.Module):
    """Gives every one of 16 tokens the same probability: 4 bits a token."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        class Output:
            logits = torch.zeros(*input_ids.shape, 16)

        return Output()


def test_a_uniform_model_needs_log2_vocabulary_bits_for_every_token_but_the_first() -> None:
    documents = [np.zeros(n, dtype=np.int64) for n in (1, 2, 300, 700)]
    np.testing.assert_allclose(document_bits(UniformModel(), documents), [0, 4, 4 * 299, 4 * 699], rtol=1e-6)


def test_training_attention_equals_the_library_one() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(5, 2, 24, 8, generator=generator, requires_grad=True) for _ in range(3)]
    weights = torch.randn(5, 2, 24, 8, generator=generator)
    ours = CausalAttention.apply(*qkv)
    library = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    torch.testing.assert_close(ours, library)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), qkv), torch.autograd.grad((library * weights).sum(), qkv), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_blockwise_loss_equals_the_library_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1100, 8, generator=generator, requires_grad=True)
    weight = torch.randn(30, 8, generator=generator, requires_grad=True)
    targets = torch.randint(30, (1100,), generator=generator)
    ours = LinearCrossEntropy.apply(hidden, weight, targets)
    library = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(ours, library)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(library, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_stdlib_files_are_sorted_hand_written_modules_without_tests(tmp_path: Path) -> None:
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(set(names))
    assert {"json.decoder", "argparse", "encodings.utf_8"} <= set(names)
    assert not {"encodings.cp1252", "encodings.cp858", "pydoc_data.topics", "html.entities"} & set(names)
    assert all(file.package == file.name.split(".")[0] for file in files)
    assert is_test_module(Path("unittest/test/test_case.py"))
    assert not is_test_module(Path("unittest/case.py"))
    table = tmp_path / "table.py"
    table.write_bytes(b"codecs.charmap_build(table)")
    assert is_machine_made("encodings.koi8_r", table)
    assert not is_machine_made("codecs", table)


@needs_model
def test_splits_share_no_top_level_package_and_follow_the_rule() -> None:
    record = json.loads((model_path() / "data.json").read_text(encoding="utf-8"))
    packages = defaultdict(set)
    for split in ("train", "dev", "test"):
        packages[split] = {name.split(".")[0] for name in record[split]}
        assert {split_of(package) for package in packages[split]} == {split}
    assert not packages["train"] & packages["dev"]
    assert not packages["train"] & packages["test"]
    assert not packages["dev"] & packages["test"]


@needs_model
def test_splits_cover_the_standard_library_of_the_pinned_python() -> None:
    pinned = read_pinned(model_path() / "data.json")
    if pinned.difference() is not None:
        pytest.skip(f"other files than the pinned ones: {pinned.difference()}")
    if pinned.python_version != platform.python_version():
        pytest.skip(f"pinned Python {pinned.python_version}, running {platform.python_version()}")
    names = {document.name for documents in pinned.documents.values() for document in documents}
    assert names == {file.name for file in stdlib_files()}


def test_pinned_data_of_another_python_is_said_plainly(tmp_path: Path) -> None:
    record = {"python_version": "3.0.0", "train": {"argparse": "00", "no_such_module": "00"}, "dev": {}, "test": {}}
    (tmp_path / "data.json").write_text(json.dumps(record), encoding="utf-8")
    pinned = read_pinned(tmp_path / "data.json")
    assert (pinned.changed, pinned.missing) == (("train/argparse",), ("train/no_such_module",))
    difference = pinned.difference()
    assert difference is not None
    assert "of 2 pinned modules 1 have other bytes and 1 are absent" in difference


@needs_model
def test_shipped_weights_are_fp16_and_small_and_load_with_transformers() -> None:
    weights = model_path() / "model.safetensors"
    assert weights.stat().st_size <= MAX_WEIGHT_BYTES
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert model.config.model_type == "gpt2"
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id
    text = "def f(x):\n    return x  # né 中\n"
    ids = tokenizer(text).input_ids
    assert ids == Tokenizer.from_file(str(model_path() / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text


@needs_model
def test_the_model_needs_few_bits_for_a_test_module() -> None:
    pinned = read_pinned(model_path() / "data.json")
    documents = [document for document in pinned.documents["test"] if document.name == "textwrap"]
    if not documents:
        pytest.skip("this Python has no source of the test module textwrap")
    ids = encode_documents(Tokenizer.from_file(str(model_path() / "tokenizer.json")), documents)
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    assert document_bits(model, ids)[0] / documents[0].n_bytes < 1.6
