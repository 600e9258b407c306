"""How fast activations are collected, beside the bare forward pass, the textbook form and SAELens.

    python -m benchmarks.collect_speed [--model FOLDER] [--tokens N] [--layer 6] [--saelens-python PATH] [--json]

Without `--model` it makes a GPT-2 small with random weights and a tokenizer trained on the Python sources of this
machine, so that it needs no network; the text of every variant is those sources. The variants run one after another,
and all again for each repetition, so that noise of the machine meets them alike. All count tokens of text: a window
of 128 positions is a first token, which is not counted, and 127 tokens.

    bare       passes over 32 windows that end after the layer, nothing kept; PyTorch's tanh-GELU as `collect` has it
    collect    the pipeline, from the first row's computing to the finished store, through to the disk
    textbook   one window at a time through the whole model and its head, a hook keeps the rows in a list; the model's
               own composed GELU
    SAELens    its `CacheActivationsRunner` in an environment of its own (see benchmarks/peers), with its default
               options, and with the fastest of its options that give the same rows
    all/deep   the pipeline on all layers at once and on the last one alone

Left out everywhere are imports, loading the model and tokenising; of `collect` also hashing the model, the check that
the hardware gives the same bytes, and laying out the store. `bare`, `all`, `deep` and SAELens run over a part of the
tokens: theirs is a rate. A small store takes more forward passes than its windows need, as it has at least 16 shards
a split: with few `--tokens`, `collect` falls behind `bare`. Stores are written where TMPDIR says, and deleted.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

import torch  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from pipelines.collect.config import CollectConfig  # noqa: E402
from pipelines.collect.stage import collect  # noqa: E402
from pipelines.models.load import load_model, resolve_model  # noqa: E402
from pipelines.shared.progress import Tracker  # noqa: E402
from pipelines.shared.stdlib_sources import stdlib_files  # noqa: E402

CONTEXT, BATCH_WINDOWS = 128, 32
BATCH_TOKENS = BATCH_WINDOWS * (CONTEXT - 1)
TEXTBOOK_WINDOWS = 32
PART_OF_TOKENS = {"bare": 4, "all": 4, "saelens": 8}
"""Variants that run over 1/n of the tokens, which suffices for a rate."""
VOCABULARY, END_OF_TEXT = 8192, "<|endoftext|>"
TEXT_BYTES_PER_TOKEN, MIN_TEXT_BYTES = 16, 2_000_000
"""Ample for any byte-level tokenizer, and for training one."""
SAELENS_SCRIPT = Path(__file__).parent / "peers" / "saelens_collect.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RATIOS: tuple[tuple[str, str, str, str, float | None], ...] = (
    ("collect fp32 / bare fp32", "collect fp32", "bare fp32", ">=", 0.93),
    ("collect bf16 / bare bf16", "collect bf16", "bare bf16", ">=", 0.93),
    ("collect fp32 / textbook fp32", "collect fp32", "textbook fp32", ">=", 3.7),
    ("collect bf16 / textbook fp32", "collect bf16", "textbook fp32", ">=", 7.5),
    ("time of all layers / time of the deepest", "deepest layer fp32", "all layers fp32", "<=", 1.25),
    ("collect fp32 / SAELens fp32, default", "collect fp32", "SAELens fp32, default", "", None),
    ("collect fp32 / SAELens fp32, fastest", "collect fp32", "SAELens fp32, fastest", "", None),
)
"""(name, rate above, rate below, which side of the bound is asked for, bound)."""


@dataclass(frozen=True)
class Run:
    """One measurement of one variant; `whole_s` also has what `seconds` leaves out."""

    n_tokens: int
    seconds: float
    whole_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


@dataclass(frozen=True)
class Setup:
    """The inputs that all variants share."""

    model: str
    text: Path
    scratch: Path
    layer: int
    tokens: int

    def part(self, name: str) -> int:
        """The tokens of a variant that runs over a part of them: whole batches, at least one."""
        return max(self.tokens // PART_OF_TOKENS[name] // BATCH_TOKENS, 1) * BATCH_TOKENS


def write_text(path: Path, n_bytes: int) -> None:
    """About `n_bytes` of the standard library's sources in one file, or all there are."""
    with path.open("w", encoding="utf-8") as out:
        for source in stdlib_files():
            if out.tell() >= n_bytes:
                return
            out.write(source.path.read_text(encoding="utf-8", errors="ignore"))


def build_model(folder: Path, text: Path) -> None:
    """A GPT-2 small with random weights of seed 0, and a byte-level tokenizer trained on the text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text)], vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end)).save_pretrained(folder)


def cut_text(setup: Setup) -> Tensor:
    """(windows, context) token ids for `bare` and `textbook`: a first token and the text's next 127."""
    n_windows = max(setup.part("bare") // (CONTEXT - 1), TEXTBOOK_WINDOWS)
    tokenizer = AutoTokenizer.from_pretrained(setup.model)
    n_tokens = n_windows * (CONTEXT - 1)
    text = setup.text.read_text(encoding="utf-8")[: n_tokens * TEXT_BYTES_PER_TOKEN]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:n_tokens])
    first = torch.full((n_windows, 1), tokenizer.bos_token_id)
    return torch.cat([first, ids.view(n_windows, CONTEXT - 1)], dim=1)


def cut_model(model: str, layer: int, dtype: str) -> nn.Module:
    """The model's body that ends after a layer, as `collect` loads it."""
    whole: Any = load_model(model, "cpu", dtype)
    body: nn.Module = whole.transformer
    body.h = whole.transformer.h[: layer + 1]
    body.ln_f = nn.Identity()
    return body


def run_bare(body: nn.Module, windows: Tensor, n_tokens: int) -> Run:
    """Batched passes over windows, nothing kept. A first batch is not measured."""
    n_windows = n_tokens // (CONTEXT - 1)
    batches = [windows[start : start + BATCH_WINDOWS] for start in range(0, n_windows, BATCH_WINDOWS)]
    with torch.inference_mode():
        body(input_ids=batches[0], use_cache=False)
        started = time.perf_counter()
        for batch in batches:
            body(input_ids=batch, use_cache=False)
        seconds = time.perf_counter() - started
    return Run(n_tokens, seconds, seconds)


def run_textbook(model: Any, windows: Tensor, layer: int) -> Run:
    """One window at a time through the whole model, rows kept by a hook. A first window is not measured."""
    rows: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        rows.append((output[0] if isinstance(output, tuple) else output)[0].cpu())

    handle = model.transformer.h[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(windows[:1])
        started = time.perf_counter()
        for window in windows[:TEXTBOOK_WINDOWS]:
            model(window[None])
        seconds = time.perf_counter() - started
    handle.remove()
    return Run(TEXTBOOK_WINDOWS * (CONTEXT - 1), seconds, seconds)


@contextmanager
def fill_begins() -> Iterator[list[float]]:
    """Notes when the progress of `collect` is first shown: tables are published, the first row is about to be computed."""
    begun: list[float] = []
    prepare = Tracker.__init__

    def note(tracker: Tracker, label: str, *arguments: Any, **named: Any) -> None:
        if label == "collect":
            begun.append(time.perf_counter())
        prepare(tracker, label, *arguments, **named)

    with patch.object(Tracker, "__init__", note):
        yield begun


def run_collect(setup: Setup, layers: tuple[int, ...], tokens: int, compute_dtype: str) -> Run:
    """The pipeline into a fresh store, which is deleted; `seconds` runs from the first row to the finished store."""
    out = setup.scratch / "store"
    config = CollectConfig(
        out=out,
        model=setup.model,
        corpus=str(setup.text),
        layer=layers,
        tokens=tokens,
        context=CONTEXT,
        compute_dtype=compute_dtype,
        device="cpu",
        batch_windows=BATCH_WINDOWS,
    )
    with fill_begins() as begun:
        started = time.perf_counter()
        result = collect(config)
        ended = time.perf_counter()
    shutil.rmtree(out)
    if not begun:
        raise RuntimeError("collect showed no progress under the label `collect`: when its rows began is unknown")
    return Run(int(result["tokens"]), ended - begun[0], ended - started)


def run_saelens(setup: Setup, python: Path, fastest: bool) -> Run:
    """SAELens' runner in a process of its own environment, over the same text file."""
    out = setup.scratch / "saelens"
    command = [python, SAELENS_SCRIPT, "--model", setup.model, "--text", setup.text, "--out", out, "--discard"]
    sizes = {"layer": setup.layer, "context": CONTEXT, "batch-windows": BATCH_WINDOWS, "threads": torch.get_num_threads()}
    sizes["tokens"] = setup.part("saelens") * CONTEXT // (CONTEXT - 1)
    command += [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    started = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)) + ["--best"] * fastest, capture_output=True, text=True, cwd=setup.scratch, check=False
    )
    if done.returncode:
        raise click.ClickException(f"{python} {SAELENS_SCRIPT.name} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    n_tokens = result["rows"] * (CONTEXT - 1) // CONTEXT
    return Run(n_tokens, result["seconds"], time.perf_counter() - started)


def variants(setup: Setup, saelens_python: Path | None) -> dict[str, Callable[[], Run]]:
    """What is measured, by name, in the order of one repetition. Loads the models of `bare` and `textbook`."""
    windows = cut_text(setup)
    textbook: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32).eval()
    n_layers = int(textbook.config.n_layer)
    if not 0 <= setup.layer < n_layers:
        raise click.BadParameter(f"--layer {setup.layer}: the model has layers 0 to {n_layers - 1}")
    bodies = {dtype: cut_model(setup.model, setup.layer, dtype) for dtype in DTYPES}
    bare, part = setup.part("bare"), setup.part("all")
    found: dict[str, Callable[[], Run]] = {
        "bare fp32": lambda: run_bare(bodies["fp32"], windows, bare),
        "collect fp32": lambda: run_collect(setup, (setup.layer,), setup.tokens, "fp32"),
        "textbook fp32": lambda: run_textbook(textbook, windows, setup.layer),
        "bare bf16": lambda: run_bare(bodies["bf16"], windows, bare),
        "collect bf16": lambda: run_collect(setup, (setup.layer,), setup.tokens, "bf16"),
        "deepest layer fp32": lambda: run_collect(setup, (n_layers - 1,), part, "fp32"),
        "all layers fp32": lambda: run_collect(setup, tuple(range(n_layers)), part, "fp32"),
    }
    if saelens_python is not None:
        found["SAELens fp32, default"] = lambda: run_saelens(setup, saelens_python, fastest=False)
        found["SAELens fp32, fastest"] = lambda: run_saelens(setup, saelens_python, fastest=True)
    return found


def measure(found: dict[str, Callable[[], Run]], repetitions: int) -> dict[str, list[Run]]:
    """Every variant once, then every variant again, …: {name: its runs}."""
    runs: dict[str, list[Run]] = {name: [] for name in found}
    for _ in range(repetitions):
        for name, run in found.items():
            runs[name].append(run())
    return runs


def ratios(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Each ratio of two rates, taken within a repetition: median, all of them, and the bound where there is one."""
    found = {}
    for name, above, below, side, bound in RATIOS:
        if above in runs and below in runs:
            each = [a.tokens_per_s / b.tokens_per_s for a, b in zip(runs[above], runs[below], strict=True)]
            median = statistics.median(each)
            met = None if bound is None else (median >= bound if side == ">=" else median <= bound)
            found[name] = {"median": median, "each": each, "asked": None if bound is None else f"{side} {bound}", "met": met}
    return found


def print_tables(runs: dict[str, list[Run]], found: dict[str, dict[str, Any]]) -> None:
    """Tokens a second, then the ratios with their bounds."""
    click.echo(f"{'tokens/s':<42}{'median':>9}{'lowest':>9}{'highest':>9}{'tokens':>10}{'with start-up':>15}")
    for name, each in runs.items():
        rates = [run.tokens_per_s for run in each]
        whole = statistics.median(run.n_tokens / run.whole_s for run in each)
        click.echo(
            f"{name:<42}{statistics.median(rates):>9,.0f}{min(rates):>9,.0f}{max(rates):>9,.0f}"
            f"{each[0].n_tokens:>10,}{whole:>15,.0f}"
        )
    click.echo(f"\n{'ratio, within a repetition':<42}{'median':>9}{'lowest':>9}{'highest':>9}{'asked':>10}")
    for name, ratio in found.items():
        verdict = {None: "", True: "  met", False: "  missed"}[ratio["met"]]
        click.echo(
            f"{name:<42}{ratio['median']:>9.2f}{min(ratio['each']):>9.2f}{max(ratio['each']):>9.2f}"
            f"{ratio['asked'] or '':>10}{verdict}"
        )


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", help="A GPT-2 as a local folder; by default one with random weights is made.")
@click.option("--tokens", default=131_072, show_default=True, help="Tokens that `collect` takes.")
@click.option("--layer", default=6, show_default=True)
@click.option("--repetitions", default=2, show_default=True, type=click.IntRange(1))
@click.option("--saelens-python", type=click.Path(path_type=Path), help="Python of an environment that has SAELens.")
@click.option("--json", "as_json", is_flag=True)
def main(model: str | None, tokens: int, layer: int, repetitions: int, saelens_python: Path | None, as_json: bool) -> None:
    """Measure collecting beside its bounds and its peers."""
    with tempfile.TemporaryDirectory(prefix="collect-speed-") as name:
        scratch = Path(name)
        text = scratch / "text.txt"
        write_text(text, max(tokens * TEXT_BYTES_PER_TOKEN, MIN_TEXT_BYTES))
        folder = Path(resolve_model(model)).absolute() if model else scratch / "gpt2-small-shape"
        if model is None:
            build_model(folder, text)
        elif not folder.is_dir():
            raise click.BadParameter(f"--model {model}: no such folder")
        setup = Setup(str(folder), text, scratch, layer, tokens)
        runs = measure(variants(setup, saelens_python and saelens_python.absolute()), repetitions)
    found = ratios(runs)
    if as_json:
        each = {name: [asdict(run) | {"tokens_per_s": run.tokens_per_s} for run in mine] for name, mine in runs.items()}
        machine = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
        settings = {"model": model, "tokens": tokens, "layer": layer, "torch": torch.__version__} | machine
        click.echo(json.dumps({"settings": settings, "runs": each, "ratios": found}, indent=1))
    else:
        print_tables(runs, found)


if __name__ == "__main__":
    main()
