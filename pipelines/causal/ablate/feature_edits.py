"""In: a run, the model, a prompt, features. Out: what the model predicts once a feature is set to another value.

Only the feature changes: a row x becomes x + (value − code) · W_dec[feature], so that what the SAE does not explain of
the row stays (`error="keep"`). With `error="drop"` the reconstruction x̂ takes the row's place first, as teaching code
does; then the SAE's own error is told apart from the feature's effect by KL(normal ‖ reconstruction) and
KL(reconstruction ‖ ablated). Positions that are no rows pass through.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from actstore.errors import InputError
from pipelines.causal.engine.cut import Cut, cut_at, finish
from pipelines.causal.engine.feature_values import feature_values
from pipelines.causal.engine.language_model import Prompt, Spliced
from pipelines.metrics.divergence import ROWS, kl
from pipelines.models.forward import logits

ERRORS = ("keep", "drop")
BATCH_POSITIONS = 4096
"""Most positions in one forward pass; a pass runs as many edits as fit."""


@dataclass(frozen=True)
class Edit:
    """A feature set to values at positions of a prompt."""

    feature: int
    positions: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, feature: int, positions: list[int], value: float = 0.0) -> Edit:
        """The same value at every position."""
        return cls(feature, tuple(positions), (value,) * len(positions))


@dataclass(frozen=True)
class Read:
    """A prompt run up to the SAE's site: `rows` there (position, d_model), and what the SAE makes of them.

    `features` (n,) are those asked for, `codes` (position, n) their values, 0 at positions that are no rows;
    `reconstruction` (position, d_model) is x̂ at rows and x at the other positions.
    """

    spliced: Spliced
    prompt: Prompt
    cut: Cut
    features: Tensor
    codes: Tensor
    reconstruction: Tensor

    @property
    def rows(self) -> Tensor:
        return self.cut.x[0]

    def code(self, feature: int) -> Tensor:
        """(position,) the values of one of the features. Raises InputError for another one."""
        place = (self.features == feature).nonzero()
        if not len(place):
            raise InputError(f"feature {feature}: is not among those the prompt was read for; name it to `read_prompt`.")
        return self.codes[:, int(place[0, 0])]

    def fires_at(self, feature: int) -> list[int]:
        """The positions where one of the features fires."""
        return self.code(feature).nonzero()[:, 0].tolist()

    @cached_property
    def normal(self) -> Tensor:
        """(position, d_model) after the last block, nothing edited."""
        with torch.no_grad():
            return finish(self.spliced.lm.model, self.cut, self.cut.x)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, vocabulary) of (…, d_model) after the last block."""
        with torch.no_grad():
            return logits(self.spliced.lm.model, hidden)


@dataclass(frozen=True)
class Ablations:
    """What n edits of one prompt do. Divergences are (n, position) or (position,), in nats, float64.

    `hidden` (n, d_model) is the edited stream after the last block at the prompt's last position: `Read.logits` gives
    its predictions. Where error was kept, the reconstruction is nowhere spliced in and its divergences are None.
    """

    edits: list[Edit]
    hidden: Tensor
    normal_ablated: Tensor
    normal_reconstruction: Tensor | None = None
    reconstruction_ablated: Tensor | None = None
    reconstruction_hidden: Tensor | None = None


@torch.no_grad()
def read_prompt(spliced: Spliced, prompt: Prompt, features: list[int] | None = None) -> Read:
    """Run a prompt up to the SAE's site and encode its rows; by default the result names all features that fire in the
    prompt.

    Raises InputError for a feature that the SAE has not, and for a prompt of which no position is a row.
    """
    if features is not None:
        for feature in features:
            spliced.require_feature(feature)
    if not bool(prompt.kept.any()):
        raise InputError("prompt: none of its positions is a row (start token and separators are none); give some text.")
    cut = cut_at(spliced.lm.model, spliced.site, prompt.ids[None])
    rows = cut.x[0]
    codes_at_rows = spliced.sae.codes(rows[prompt.kept])
    chosen = (
        codes_at_rows.active.features[codes_at_rows.values > 0].unique()
        if features is None
        else torch.tensor(features).unique()
    )
    chosen = chosen.to(rows.device)
    codes = rows.new_zeros(len(rows), len(chosen))
    codes[prompt.kept] = feature_values(codes_at_rows, chosen)
    reconstruction = rows.clone()
    reconstruction[prompt.kept] = spliced.sae.reconstruct(codes_at_rows)
    return Read(spliced, prompt, cut, chosen, codes, reconstruction)


@torch.no_grad()
def ablate(read: Read, edits: list[Edit], error: str = "keep") -> Ablations:
    """Run every edit, many in a batch, each against a clean run in the same batch shape.

    A row that an edit leaves as it is (the feature does not fire there, and is set to 0) keeps all its bits, and so does
    every prediction made from such rows alone: their divergence is exactly 0. Source of the error term's place: Marks et
    al. 2024, Sparse Feature Circuits, section 2. Raises InputError for an unknown `error` or a position that is no row.
    """
    if error not in ERRORS:
        raise InputError(f"error {error!r}: choose one of {', '.join(ERRORS)}.")
    if not edits:
        raise InputError("ablate: no feature to ablate; none fires in this prompt.")
    for edit in edits:
        _require_rows(read.prompt, edit)
    if error == "keep":
        hidden, changed, _ = _run_all(read, read.rows, edits, read.normal)
        return Ablations(edits, hidden, changed)
    spliced_in = finish(read.spliced.lm.model, read.cut, read.reconstruction[None])
    hidden, changed, from_normal = _run_all(read, read.reconstruction, edits, spliced_in[0], against=read.normal)
    own = _divergences(read, read.normal[None], spliced_in, 1)[0]
    return Ablations(edits, hidden, from_normal, own, changed, spliced_in[0, -1])


def set_everywhere(read: Read, feature: int, value: float = 0.0, at: str = "fired") -> Edit:
    """A feature set to one value where it fires (`fired`), at every row (`all`), or at the last row (`last`)."""
    places = {"fired": read.fires_at(feature), "all": read.prompt.kept.nonzero()[:, 0].tolist()}
    places["last"] = places["all"][-1:]
    if at not in places:
        raise InputError(f"at {at!r}: choose one of {', '.join(places)}.")
    return Edit.of(feature, places[at], value)


def one_by_one(edit: Edit) -> list[Edit]:
    """The same edit at each of its positions alone."""
    return [Edit(edit.feature, (position,), (value,)) for position, value in zip(edit.positions, edit.values, strict=True)]


def _run_all(
    read: Read, base: Tensor, edits: list[Edit], unedited: Tensor, against: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Edits of `base` (position, d_model): the stream after the last block at the last position (n, d_model), and
    divergences (n, position) from the unedited predictions and, if given, from those of the stream `against`.

    Every batch has one shape; unedited rows fill its end. Where an edited row ends with the bits of the unedited run of that
    shape, its result is `unedited` (position, d_model)."""
    n = min(len(edits), max(1, BATCH_POSITIONS // len(base)))
    model = read.spliced.lm.model
    clean = finish(model, read.cut, base.repeat(n, 1, 1))
    hidden, changed, from_other = [], [], []
    for start in range(0, len(edits), n):
        part = edits[start : start + n]
        rows = base.repeat(n, 1, 1)
        for i, edit in enumerate(part):
            at = torch.tensor(edit.positions, dtype=torch.int64, device=rows.device)
            change = rows.new_tensor(edit.values) - read.code(edit.feature)[at]
            moved = at[change != 0]
            rows[i, moved] += change[change != 0, None] * read.spliced.sae.W_dec[edit.feature]
        ended = finish(model, read.cut, rows)
        same = (ended == clean).all(dim=-1, keepdim=True)
        ended = torch.where(same, unedited, ended)[: len(part)]
        hidden.append(ended[:, -1])
        changed.append(_divergences(read, unedited.expand_as(ended), ended, len(part)))
        if against is not None:
            from_other.append(_divergences(read, against.expand_as(ended), ended, len(part)))
    return torch.cat(hidden), torch.cat(changed), torch.cat(from_other or changed)


def _divergences(read: Read, before: Tensor, after: Tensor, n: int) -> Tensor:
    """(n, position) KL of the predictions of the first n of two streams; only rows that differ are unembedded."""
    divergences = torch.zeros(n, before.shape[1], dtype=torch.float64, device=before.device)
    places = (before[:n] != after[:n]).any(dim=-1).nonzero()
    for own in places.split(ROWS):
        item, position = own.T
        divergences[item, position] = kl(read.logits(before[item, position]), read.logits(after[item, position]))
    return divergences


def _require_rows(prompt: Prompt, edit: Edit) -> None:
    for position in edit.positions:
        if not 0 <= position < len(prompt) or not bool(prompt.kept[position]):
            rows = prompt.kept.nonzero()[:, 0].tolist()
            raise InputError(f"position {position}: is no row of this prompt; rows are {_spans(rows)}.")


def _spans(positions: list[int]) -> str:
    """Positions in short: [1, 2, 3, 5] as `1 to 3, 5`."""
    spans: list[list[int]] = []
    for position in positions:
        if spans and position == spans[-1][1] + 1:
            spans[-1][1] = position
        else:
            spans.append([position, position])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
