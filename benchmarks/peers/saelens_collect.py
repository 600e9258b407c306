"""SAELens' activation cache: rows a second that its `CacheActivationsRunner` writes, offline, on a local GPT-2.

    saelens/bin/python benchmarks/peers/saelens_collect.py --model FOLDER --text FILE… --out DIR [--tokens N] [--best]

Run by the Python of an environment that has SAELens. The model is a transformers folder with its tokenizer, run in
fp32; the rows are the residual stream after block `--layer` (`blocks.L.hook_resid_post`), position 0 included, kept
in fp32 as SAELens does. The text is cut beforehand into windows of a first token and `--context` - 1 text tokens,
with SAELens' own `concat_and_batch_sequences`; the forward pass ends after the layer, as SAELens does by itself.

Measured is `CacheActivationsRunner.run()`: batching, forward passes, writing the Arrow files, putting them together.
Left out are imports, loading the model, tokenising, a first batch that is not kept (libraries load parts of themselves
on the first call), and the final shuffle (an index over what is written).

`--best` is the fastest way to the same rows that SAELens' own options give: the transformers model and not
TransformerLens' (`model_class_name`), with PyTorch's tanh-GELU (`model_from_pretrained_kwargs`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
TEXT_CHARACTERS = 8192
BUFFER_BYTES = 2_000_000_000
"""The largest buffer SAELens accepts, and its default; it writes one file a buffer."""


def let_local_folders_through() -> None:
    """Two repairs of TransformerLens 3.9 under transformers 5, without which it knows models of its list only.

    It looks a model's name up before it looks for a folder; and it reads `n_ctx`, which GPT-2's config had before.
    """
    from transformer_lens import loading_from_pretrained as loading
    from transformers import GPT2Config

    known_name = loading.get_official_model_name
    loading.get_official_model_name = lambda name: name if Path(name).is_dir() else known_name(name)
    GPT2Config.attribute_map["n_ctx"] = "n_positions"


def windows_of_text(model: Path, files: list[Path], context: int, n_windows: int) -> Dataset:
    """The first `n_windows` windows of the files as a tokenised dataset. Raises SystemExit when the text is too short."""
    import torch
    from datasets import Dataset
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (
        text[start : start + TEXT_CHARACTERS]
        for text in (path.read_text(encoding="utf-8") for path in files)
        for start in range(0, len(text), TEXT_CHARACTERS)
    )
    tokens = (
        torch.tensor(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
        for text in texts
    )
    bos = tokenizer.bos_token_id
    cut = concat_and_batch_sequences(tokens, context, begin_batch_token_id=bos, sequence_separator_token_id=bos)
    windows = [window.tolist() for window in islice(cut, n_windows)]
    if len(windows) < n_windows:
        raise SystemExit(
            f"the text has {len(windows):,} windows of {context} tokens, {n_windows:,} are asked: pass more files"
        )
    return Dataset.from_dict({"input_ids": windows})


def runner_config(arguments: argparse.Namespace, d_model: int, n_windows: int, windows_per_buffer: int) -> Any:
    """SAELens' own configuration of one run; everything not named here is its default."""
    from sae_lens import CacheActivationsRunnerConfig

    best: dict[str, Any] = {
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {"activation_function": "gelu_pytorch_tanh", "dtype": "float32"},
        "hook_name": f"transformer.h.{arguments.layer}",
    }
    usual: dict[str, Any] = {
        "model_class_name": "HookedTransformer",
        "hook_name": f"blocks.{arguments.layer}.hook_resid_post",
    }
    return CacheActivationsRunnerConfig(
        dataset_path="local",
        model_name=str(arguments.model),
        model_batch_size=arguments.batch_windows,
        d_in=d_model,
        training_tokens=n_windows * arguments.context,
        context_size=arguments.context,
        new_cached_activations_path=str(arguments.out),
        shuffle=False,
        dtype="float32",
        device="cpu",
        # half a byte more than the buffer, so that rounding cannot lose a batch
        buffer_size_gb=(windows_per_buffer * arguments.context * d_model * 4 + 0.5) / 1e9,
        streaming=False,
        **(best if arguments.best else usual),
    )


def plan_windows(n_tokens: int, context: int, batch_windows: int, d_model: int) -> tuple[int, int]:
    """(windows in all, windows a buffer): whole buffers of whole batches with at least `n_tokens` rows.

    SAELens always writes whole buffers, so a run shorter than its 2 GB buffer would compute more than was asked.

    >>> plan_windows(10_000, 128, 32, 768)
    (96, 96)
    """
    n_batches = -(-n_tokens // (context * batch_windows))
    n_buffers = -(-n_batches * batch_windows * context * d_model * 4 // BUFFER_BYTES)
    batches_per_buffer = -(-n_batches // n_buffers)
    return n_buffers * batches_per_buffer * batch_windows, batches_per_buffer * batch_windows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cache the activations once and say how long the runner's own `run` took."""
    import sae_lens
    import torch
    from sae_lens import CacheActivationsRunner

    let_local_folders_through()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    d_model = int(json.loads((arguments.model / "config.json").read_text())["n_embd"])
    n_windows, per_buffer = plan_windows(arguments.tokens, arguments.context, arguments.batch_windows, d_model)
    windows = windows_of_text(arguments.model, arguments.text, arguments.context, n_windows + arguments.batch_windows)
    config = runner_config(arguments, d_model, n_windows, per_buffer)
    runner = CacheActivationsRunner(config, override_dataset=windows)
    runner.activations_store.get_raw_llm_batch()
    started = time.perf_counter()
    cached = runner.run()
    seconds = time.perf_counter() - started
    n_rows = len(cached) * arguments.context
    return {
        "rows": n_rows,
        "seconds": seconds,
        "rows_per_s": n_rows / seconds,
        "d_model": d_model,
        "disk_bytes": sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file()),
        "hook_name": config.hook_name,
        "model_class": config.model_class_name,
        "out": str(arguments.out),
        "threads": torch.get_num_threads(),
        "sae_lens": sae_lens.__version__,
        "torch": torch.__version__,
    }


def quietly(measure: Callable[[argparse.Namespace], dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What a script measures, offline, with nothing but its result on stdout."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with redirect_stdout(sys.stderr):  # TransformerLens prints what it has loaded
        return measure(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GPT-2 as a transformers folder, with its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files, taken in this order")
    parser.add_argument("--out", type=Path, required=True, help="where the cache is written; must be free")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32_768, help="rows to write, rounded up to whole batches")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 for torch's own choice")
    parser.add_argument("--best", action="store_true", help="SAELens' fastest options and not its default ones")
    parser.add_argument("--discard", action="store_true", help="delete what was written once it has been measured")
    arguments = parser.parse_args()
    result = quietly(measure, arguments)
    if arguments.discard:
        shutil.rmtree(arguments.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
