"""Bits per byte of the built-in model and of n-gram models, on test modules that none of them has seen.

`python -m pipelines.models.builtin.bits` prints one table. Unigram, bigram and trigram are interpolated Kneser–Ney models,
trained on exactly the model's training tokens. All four models share the tokenizer, the documents and the rule that a
document begins with a given `<|endoftext|>`. Bits per byte is the sum of all bits, divided by the documents' UTF-8 bytes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from pipelines.models.builtin import model_path
from pipelines.models.builtin.data import PinnedDocuments, encode_documents, read_pinned
from pipelines.models.builtin.ngram import KneserNey
from pipelines.models.builtin.score import document_bits

NGRAM_NAMES = ("unigram", "bigram (Kneser-Ney)", "trigram (Kneser-Ney)")
MODEL_NAME = "built-in model"


@dataclass(frozen=True)
class BitsReport:
    """Bits per byte by model name, the amount of text, and how the files differ from the pinned ones."""

    bits_per_byte: dict[str, float]
    ratio_to_trigram: float
    n_documents: int
    n_bytes: int
    n_tokens: int
    n_train_tokens: int
    python_version: str
    difference: str | None

    def table(self) -> str:
        """The report as text, one line per model."""
        lines = [
            f"{self.n_documents} test modules, {self.n_bytes} bytes, {self.n_tokens} tokens; "
            f"n-grams trained on {self.n_train_tokens} tokens",
            f"{'model':<24}{'bits per byte':>14}{'of the trigram':>16}",
        ]
        trigram = self.bits_per_byte[NGRAM_NAMES[-1]]
        lines += [f"{name:<24}{bits:>14.4f}{bits / trigram:>16.3f}" for name, bits in self.bits_per_byte.items()]
        files = self.difference or f"all files are the pinned ones (Python {self.python_version})"
        return "\n".join([*lines, f"note: {files}"])


def model_document_bits_per_byte(folder: Path, pinned: PinnedDocuments, split: str) -> float:
    """Bits per byte of the model in `folder` on the documents of a split, computed in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False)
    ids = encode_documents(Tokenizer.from_file(str(folder / "tokenizer.json")), pinned.documents[split])
    n_bytes = sum(document.n_bytes for document in pinned.documents[split])
    return float(document_bits(model, ids).sum()) / n_bytes


def measure(folder: Path, split: str = "test") -> BitsReport:
    """Score the model in `folder` and the three n-gram models on the pinned documents of `split`."""
    pinned = read_pinned(folder / "data.json")
    if not pinned.documents[split] or not pinned.documents["train"]:
        raise ValueError(
            f"found {len(pinned.documents[split])} {split} and {len(pinned.documents['train'])} train modules "
            f"of those pinned in {folder / 'data.json'}; run a Python that has its library's sources"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train_ids = encode_documents(tokenizer, pinned.documents["train"])
    ids = encode_documents(tokenizer, pinned.documents[split])
    n_bytes = sum(document.n_bytes for document in pinned.documents[split])
    n_vocab = tokenizer.get_vocab_size()
    bits_per_byte = {
        name: float(KneserNey(train_ids, order, n_vocab).document_bits(ids).sum()) / n_bytes
        for order, name in enumerate(NGRAM_NAMES, start=1)
    }
    bits_per_byte[MODEL_NAME] = model_document_bits_per_byte(folder, pinned, split)
    return BitsReport(
        bits_per_byte=bits_per_byte,
        ratio_to_trigram=bits_per_byte[MODEL_NAME] / bits_per_byte[NGRAM_NAMES[-1]],
        n_documents=len(ids),
        n_bytes=n_bytes,
        n_tokens=sum(len(document) - 1 for document in ids),
        n_train_tokens=sum(map(len, train_ids)),
        python_version=pinned.python_version,
        difference=pinned.difference(),
    )


def main() -> None:
    """Read the command line and print the table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.models.builtin.bits", description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path(), help="folder of the model (built-in)")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="which modules to score")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    report = measure(options.model, options.split)
    print(json.dumps(asdict(report), indent=1) if options.json else report.table())


if __name__ == "__main__":
    main()
