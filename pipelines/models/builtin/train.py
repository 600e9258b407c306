"""Trains the built-in model from nothing but the running Python's standard library.

`python -m pipelines.models.builtin.train --out DIR` trains the tokenizer and the GPT-2 on the training modules and prints a
line every few seconds. A loadable early model is kept at `DIR/partial`, the state for `--resume` at `DIR/state.pt`. The
finished fp16 model, its pinned data lists and its card are written to `DIR/model`. The same seed, Python and thread count
give the same windows and the same masks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipelines.models.builtin.data import END_OF_TEXT, data_record, encode_documents, read_documents
from pipelines.models.builtin.fast import ATTENTION_NAME, CheapDropout, LinearCrossEntropy, attention_forward
from pipelines.models.builtin.score import document_bits


@dataclass(frozen=True)
class BuiltinTraining:
    """Everything besides the data on which the result depends. `seed` draws weights, windows and masks."""

    steps: int = 7000
    seed: int = 20240
    batch_windows: int = 16
    window_tokens: int = 256
    n_vocab: int = 4096
    n_embd: int = 192
    n_layer: int = 6
    n_head: int = 6
    muon_lr: float = 0.006
    adam_lr: float = 0.003
    weight_decay: float = 0.1
    dropout: float = 0.1
    warmup_steps: int = 150
    clip_norm: float = 1.0
    threads: int = 2


@dataclass(frozen=True)
class Schedule:
    """Intervals of reports, dev measurements and saved states, in seconds of wall time."""

    report_seconds: float = 15.0
    dev_seconds: float = 150.0
    save_seconds: float = 150.0


def train_tokenizer(texts: list[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE of `n_vocab` tokens with GPT-2's pre-tokenizer and no prefix space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(config: BuiltinTraining, end_of_text: int | None) -> GPT2LMHeadModel:
    """A new GPT-2 with `CheapDropout` and `CausalAttention` in place of its dropouts and attention."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.n_vocab,
            n_positions=config.window_tokens,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu_pytorch_tanh",
            attn_pdrop=0.0,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            attn_implementation=ATTENTION_NAME,
        )
    )
    model.transformer.drop = CheapDropout(config.dropout)
    for block in model.transformer.h:
        block.attn.resid_dropout = CheapDropout(config.dropout)
        block.mlp.dropout = CheapDropout(config.dropout)
    return model


def build_optimizers(model: GPT2LMHeadModel, config: BuiltinTraining) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, norms and biases. Norms and biases have no weight decay."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if ".h." in name and p.ndim == 2]
    embeddings = [p for name, p in named.items() if ".h." not in name and p.ndim == 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.adam_lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    muon = torch.optim.Muon(
        matrices,
        lr=config.muon_lr,
        weight_decay=config.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adam]


def lr_factor(step: int, config: BuiltinTraining) -> float:
    """Linear warm-up to 1, then linear decay to 0 at `config.steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return max(0.0, (config.steps - step) / max(1, config.steps - config.warmup_steps))


def pass_windows(documents: list[np.ndarray], config: BuiltinTraining, n_pass: int) -> np.ndarray:
    """The first token of each window of one pass over the joined documents, shuffled, int64 (n_windows,).

    The pass cuts the joined text into windows from a random offset on. It adds one window at the start of every document,
    because scoring always begins there.
    """
    generator = np.random.default_rng([config.seed, 1, n_pass])
    lengths = np.array([len(ids) for ids in documents])
    last = int(lengths.sum()) - config.window_tokens - 1
    cuts = np.arange(generator.integers(config.window_tokens), last + 1, config.window_tokens)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    windows = np.concatenate([cuts, starts[starts <= last]])
    return generator.permutation(windows)


class WindowStream:
    """Batches of windows, pass after pass, addressed by step: a resumed run continues exactly."""

    def __init__(self, documents: list[np.ndarray], config: BuiltinTraining) -> None:
        self.documents = documents
        self.tokens = torch.from_numpy(np.concatenate(documents))
        self.config = config
        self.ends = [0]
        self.windows: np.ndarray = np.zeros(0, dtype=np.int64)
        self.n_pass = -1

    def _window(self, index: int) -> int:
        while self.n_pass < 0 or index >= self.ends[self.n_pass + 1]:
            self.n_pass += 1
            self.windows = pass_windows(self.documents, self.config, self.n_pass)
            self.ends.append(self.ends[self.n_pass] + len(self.windows))
        return int(self.windows[index - self.ends[self.n_pass]])

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, int64 (batch_windows, window_tokens). Steps must not decrease."""
        n_windows, n_tokens = self.config.batch_windows, self.config.window_tokens
        starts = [self._window(step * n_windows + row) for row in range(n_windows)]
        rows = torch.stack([self.tokens[start : start + n_tokens + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]


def save_model(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `AutoTokenizer` and `AutoModelForCausalLM` load, with fp16 weights."""
    plain = GPT2LMHeadModel(GPT2Config(**model.config.to_dict()))
    plain.load_state_dict(model.state_dict())
    plain.half().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model.config.n_positions,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def publish_partial(model: GPT2LMHeadModel, tokenizer: Tokenizer, record: dict, out: Path, step: int) -> None:
    """Point `out/partial` atomically at a new complete folder, then remove the former one."""
    folder = out / f"partial-{step:06d}"
    save_model(model, tokenizer, folder)
    write_json(folder / "data.json", record)
    link, new_link = out / "partial", out / "partial.new"
    new_link.unlink(missing_ok=True)
    new_link.symlink_to(folder.name)
    os.replace(new_link, link)
    for old in out.glob("partial-*"):
        if old != folder:
            shutil.rmtree(old)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save_state(
    out: Path,
    step: int,
    seconds: float,
    segments: list[list[int]],
    config: BuiltinTraining,
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Write all that `--resume` needs to `out/state.pt`, replacing the former file atomically.

    `segments` lists `[first step, steps of the schedule]`: one pair, and one more for each time that the training was
    resumed with another number of steps.
    """
    state = {
        "step": step,
        "seconds": seconds,
        "segments": segments,
        "config": asdict(config),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, out / "state.new")
    os.replace(out / "state.new", out / "state.pt")


def train_step(
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    config: BuiltinTraining,
    step: int,
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> float:
    """One update. Returns the batch's mean training loss in nats per token."""
    masks = np.random.default_rng([config.seed, 2, step])
    for module in model.modules():
        if isinstance(module, CheapDropout):
            module.generator = masks
    for optimizer, lr in zip(optimizers, (config.muon_lr, config.adam_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, config)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(inputs, use_cache=False).last_hidden_state
    low_hidden = hidden.reshape(-1, config.n_embd).bfloat16()
    loss = LinearCrossEntropy.apply(low_hidden, model.lm_head.weight, targets.reshape(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def train(
    out: Path, config: BuiltinTraining, schedule: Schedule, resume: bool = False, stop_step: int | None = None
) -> None:
    """Train to `config.steps`, then write `out/model` with its card. A trial may end at `stop_step`, without a model."""
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    documents = read_documents()
    record = data_record(documents)
    tokenizer = train_tokenizer([document.text for document in documents["train"]], config.n_vocab)
    train_ids = encode_documents(tokenizer, documents["train"])
    dev_ids = encode_documents(tokenizer, documents["dev"])
    n_dev_bytes = sum(document.n_bytes for document in documents["dev"])
    n_train_tokens = sum(map(len, train_ids))
    model = build_model(config, tokenizer.token_to_id(END_OF_TEXT))
    optimizers = build_optimizers(model, config)
    step, seconds_before, segments = 0, 0.0, [[0, config.steps]]
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds_before = state["step"], state["seconds"]
        segments = state["segments"]
        if segments[-1][1] != config.steps:
            segments.append([step, config.steps])
    stream = WindowStream(train_ids, config)
    tokens_per_step = config.batch_windows * config.window_tokens
    print(
        f"{config}\n{n_train_tokens} training tokens, {model.num_parameters()} parameters, "
        f"{config.steps * tokens_per_step / n_train_tokens:.1f} passes, from step {step}",
        flush=True,
    )

    def dev_bits_per_byte() -> float:
        return float(document_bits(model, dev_ids).sum()) / n_dev_bytes

    model.train()
    begun = last_report = last_dev = last_save = time.monotonic()
    losses: list[float] = []
    n_steps_to_run = min(config.steps, stop_step or config.steps)
    while step < n_steps_to_run:
        losses.append(train_step(model, optimizers, config, step, *stream.batch(step)))
        step += 1
        now = time.monotonic()
        if now - last_report >= schedule.report_seconds:
            rate = len(losses) * tokens_per_step / (now - last_report)
            left = (n_steps_to_run - step) * tokens_per_step / rate / 60
            print(
                f"step {step}/{config.steps} {rate:.0f} tokens/s train {np.mean(losses):.4f} nats/token "
                f"lr x{lr_factor(step, config):.3f} {left:.0f} min left",
                flush=True,
            )
            losses, last_report = [], time.monotonic()
        if now - last_dev >= schedule.dev_seconds:
            print(f"step {step} dev {dev_bits_per_byte():.4f} bits/byte", flush=True)
            last_dev = last_report = time.monotonic()
            losses = []
        if now - last_save >= schedule.save_seconds:
            publish_partial(model, tokenizer, record, out, step)
            save_state(out, step, seconds_before + now - begun, segments, config, model, optimizers)
            last_save = time.monotonic()
    seconds = seconds_before + time.monotonic() - begun
    print(f"step {step} dev {dev_bits_per_byte():.4f} bits/byte after {seconds:.0f} s", flush=True)
    if step < config.steps:
        return
    save_state(out, step, seconds, segments, config, model, optimizers)
    folder = out / "model"
    save_model(model, tokenizer, folder)
    write_json(folder / "data.json", record)
    write_json(
        out / "run.json",
        {
            "config": asdict(config),
            "segments": segments,
            "train_tokens": n_train_tokens,
            "tokens_seen": step * tokens_per_step,
            "seconds": round(seconds),
            "dev_bits_per_byte": dev_bits_per_byte(),
        },
    )
    from pipelines.models.builtin.card import write_card

    write_card(folder, json.loads((out / "run.json").read_text(encoding="utf-8")))


def main() -> None:
    """Read the command line and train."""
    defaults = BuiltinTraining()
    parser = argparse.ArgumentParser(prog="python -m pipelines.models.builtin.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("builtin_out"), help="folder for all results")
    parser.add_argument("--resume", action="store_true", help="resume from OUT/state.pt")
    parser.add_argument("--stop-step", type=int, help="end a trial early, without a final model")
    for name in ("steps", "seed", "batch_windows", "threads", "warmup_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("muon_lr", "adam_lr", "weight_decay", "dropout"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    options = vars(parser.parse_args())
    out, resume, stop_step = options.pop("out"), options.pop("resume"), options.pop("stop_step")
    train(out, replace(defaults, **options), Schedule(), resume, stop_step)


if __name__ == "__main__":
    main()
