"""In: a model, or a run and its store. Out: what an intervention works on: model, tokenizer, rules of text, and the SAE.

Whether text begins with a start token, and which positions are rows, follows the manifest of the store that the SAE was
trained on: a position that is no row passes through every intervention as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from actstore.errors import IdentityMismatch, InputError, StoreError
from actstore.reader import ActivationStore
from pipelines.models.families.registry import family_of
from pipelines.models.load import choose_device, load_model, model_identity, require_own_tokenizer, resolve_model
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, load_run, require_match
from pipelines.text.codec import TextCodec
from pipelines.text.tokenizer_files import load_tokenizer, store_tokenizer

DEFAULT_MODEL = "gpt2"


@dataclass(frozen=True)
class Prompt:
    """A text as the model gets it: `ids` (positions,) int64; `kept` (positions,) which of them are rows; each as text."""

    ids: Tensor
    kept: Tensor
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class LanguageModel:
    """A language model in evaluation mode, without gradients, and how text is put to it."""

    name: str
    model: nn.Module
    codec: TextCodec
    bos: bool = True
    keep_special: bool = False
    device: str = "cpu"

    @property
    def n_positions(self) -> int:
        """The longest text the model takes, in tokens."""
        return family_of(self.model).n_positions(self.model)

    def prompt(self, text: str) -> Prompt:
        """Tokenise a text. Raises InputError when it has no token, or more than the model has positions."""
        return self.prompt_of_ids(self.codec.ids([text])[0], repr(text[:40]))

    def prompt_of_ids(self, ids: list[int], name: str = "prompt") -> Prompt:
        """The same of token ids, without start token; `name` is for the message."""
        if not ids:
            raise InputError(f"prompt {name}: has no token; give some text.")
        all_ids = [self.codec.bos_token_id, *ids] if self.bos else list(ids)
        if len(all_ids) > self.n_positions:
            raise InputError(
                f"prompt {name}: {len(all_ids):,} tokens with the start token, the model has {self.n_positions:,} "
                "positions; shorten it."
            )
        tokens = torch.tensor(all_ids, device=self.device)
        kept = torch.ones(len(all_ids), dtype=torch.bool, device=self.device)
        if not self.keep_special:
            kept &= tokens != self.codec.separator_token_id
            kept[0] = False
        return Prompt(tokens, kept, tuple(self.codec.split_text(all_ids)))

    def token(self, text: str) -> int:
        """The id of a text that is one token. Raises InputError, with the tokens it has, when it is not."""
        ids = self.codec.ids([text])[0]
        if len(ids) != 1:
            parts = " ".join(repr(text) for text in self.codec.split_text(ids)) or "none"
            raise InputError(f"token {text!r}: is {len(ids)} tokens here ({parts}), needs to be one; mind a leading space.")
        return ids[0]


@dataclass(frozen=True)
class Spliced:
    """A language model and an SAE that reads one of its sites."""

    lm: LanguageModel
    sae: Sae
    site: Site
    record: RunRecord

    def require_feature(self, feature: int) -> int:
        """Raises InputError for an id that is not a feature's."""
        if not 0 <= feature < self.record.n_features:
            raise InputError(
                f"feature {feature}: the SAE has {self.record.n_features:,} features; choose 0 to "
                f"{self.record.n_features - 1:,}."
            )
        return feature


def open_language_model(model: str, device: str = "auto", *, bos: bool = True, keep_special: bool = False) -> LanguageModel:
    """A model and the tokenizer that lies beside it. Raises InputError when either cannot be loaded."""
    chosen = choose_device(device)
    loaded = frozen(load_model(model, chosen, "fp32"))  # first: without network it is soon refused, and its reason is clear
    codec, _ = load_tokenizer(resolve_model(model))
    require_own_tokenizer(model, loaded, codec.n_vocabulary)
    return LanguageModel(model, loaded, codec, bos, keep_special, chosen)


def open_spliced(
    run: str | Path, store: str | Path | None = None, model: str | None = None, device: str = "auto"
) -> Spliced:
    """The SAE of a run in its model; text is put to it as the store's manifest says.

    `store` is by default the one the run was trained on. Raises NotAStore or InputError when run, store or model is
    not there, IdentityMismatch when store or model is another one than the SAE was trained on.
    """
    sae, record = load_run(run)
    opened = open_store(run, record, store)
    require_match(run, record, opened)
    chosen = choose_device(device)
    name = model or record.model
    loaded = load_model(name, chosen, "fp32")
    if model_identity(loaded).weights_sha256 != record.weights_sha256:
        raise IdentityMismatch(f"model {name}: is not the one {run} was trained on; name the right one with --model.")
    policy = opened.manifest.policy
    lm = LanguageModel(name, frozen(loaded), store_tokenizer(opened), policy.bos, policy.keep_special, chosen)
    return Spliced(lm, sae.to(chosen), Site.parse(record.site), record)


def open_store(run: str | Path, record: RunRecord, store: str | Path | None = None) -> ActivationStore:
    """The store at `store`, by default the one the run was trained on: where it was then, or near the run.

    Raises StoreError; InputError where the default is nowhere.
    """
    if store is not None:
        return ActivationStore(store)
    recorded = str(record.option("store"))
    try:
        return ActivationStore(recorded)
    except StoreError as error:
        for place in () if "://" in recorded else _near(Path(run), Path(recorded)):
            with suppress(StoreError):
                if (opened := ActivationStore(place)).store_id == record.store_id:
                    return opened
        raise InputError(f"{run}: its store is not at {recorded} ({error}); name it with --store.") from error


def _near(run: Path, recorded: Path) -> Iterator[Path]:
    """Where a store lies that was moved together with its run, or named from another working folder."""
    for folder in islice(run.absolute().parents, 3):
        yield folder / recorded
        yield folder / recorded.name


def frozen(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its weights without gradients."""
    return model.eval().requires_grad_(False)


def open_either(
    run: Path | None, store: str | Path | None, model: str | None, device: str
) -> tuple[LanguageModel, Spliced | None]:
    """A run's SAE in its model, or without a run a model alone (`DEFAULT_MODEL` where none is named)."""
    if run is None:
        if store is not None:
            raise InputError(f"store {store}: is of use with a run only; name its run with --run.")
        if model is not None:
            return open_language_model(model, device), None
        try:
            return open_language_model(DEFAULT_MODEL, device), None
        except InputError as error:
            raise InputError(
                f"{str(error).rstrip('.')}; {DEFAULT_MODEL} is the default, --model builtin needs no network."
            ) from error
    spliced = open_spliced(run, store, model, device)
    return spliced.lm, spliced
