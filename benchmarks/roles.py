"""Do features have the effect that their role predicts? Roles and target tokens from one half of the corpus, effects on the
other.

    python -m benchmarks.roles demo-out [--live 40] [--firings 200] [--directions 100] [--json]

takes a finished demo. All choices are made on the choosing half of the documents, before anything is ablated:

- The roles are all rules about a place in the text that some feature follows there with F1 of at least 0.6
  (`pipelines.concepts.stage`), each with its best feature and that feature's threshold.
- The target tokens of a role are the five whose probability as the next token is raised most where the rule holds, over
  all rows: P(t | rule) − P(t).

On the other half, at firings above the threshold, one in a window, the feature is set to 0 at that row alone, the error
term kept, and the fall of log P(targets) at the next token is averaged. Beside it are 100 random directions, each in
place of the feature's own with the same norm at every row, and every other feature active in the row, ablated the same
way. A feature passes when its fall exceeds the random ones at a false discovery rate of 5 % (Benjamini–Hochberg over the
features of its group, p = (1 + random falls as large) / (1 + directions)), their 95th percentile, and the median of the
co-active features' mean falls.

Printed beside: which share of live features passes the same test, of a random sample of them (at least as many firings
on both halves); their targets come from the rows where they fire on the choosing half.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

import torch  # noqa: E402

from actstore.files import read_json  # noqa: E402
from actstore.plan import permutation  # noqa: E402
from pipelines.causal.effects.measure import branch_layout, firing_texts, predicted, window_passes  # noqa: E402
from pipelines.causal.engine.cut import cut_at  # noqa: E402
from pipelines.causal.engine.drawn_firings import PART, DrawnFirings, draw_firings, next_tokens  # noqa: E402
from pipelines.causal.engine.language_model import Spliced, open_spliced  # noqa: E402
from pipelines.codes.code_store import CodeStore, read_codes  # noqa: E402
from pipelines.concepts.labels import read_labels, shard_labels  # noqa: E402
from pipelines.models.forward import logits  # noqa: E402
from pipelines.shared.progress import track  # noqa: E402
from pipelines.shared.visible_text import visible  # noqa: E402
from pipelines.text.tokenizer_files import store_tokenizer  # noqa: E402

MIN_F1 = 0.6
"""Least F1 on the choosing half of a feature that follows a rule, for the rule to be a role."""
N_TARGETS = 5
N_TEXTS = 8
"""Windows in one pass: each has some hundred branches."""
MIN_TOGETHER = 5
"""Least number of a feature's firings in which another feature is active, for that feature to count as co-active."""
FALSE_DISCOVERIES = 0.05
SEED = 0


@dataclass(frozen=True)
class Role:
    """What is tested: a feature, when it counts as firing, its targets, and where those come from."""

    feature: int
    name: str
    f1: float | None
    threshold: float
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What ablation did to the targets' log-probability, in nats: means over the firings."""

    role: Role
    target_texts: tuple[str, ...]
    firings: int
    fall: float
    random_mean: float
    random_95: float
    coactive_median: float
    p: float
    passes: bool


class TargetCounts:
    """How often each token follows, over the choosing half: where a rule holds, where a feature fires, and anywhere."""

    def __init__(self, n_rules: int, n_features: int, n_vocabulary: int):
        self.rules = np.zeros((n_rules, n_vocabulary), np.int64)
        self.features = np.zeros((n_features, n_vocabulary), np.int64)
        self.all = np.zeros(n_vocabulary, np.int64)

    def raised_most(self, counts: NDArray[np.int64]) -> tuple[int, ...]:
        """The tokens whose share is furthest above their share anywhere."""
        raised = counts / max(counts.sum(), 1) - self.all / max(self.all.sum(), 1)
        return tuple(np.argsort(-raised, kind="stable")[:N_TARGETS].tolist())


def best_of_each_rule(findings: list[dict[str, Any]], fires: NDArray[np.int64], minimum: int) -> list[dict[str, Any]]:
    """For the rules of place, best first, the finding with the largest F1 on the choosing half."""
    found: dict[str, dict[str, Any]] = {}
    for finding in sorted(findings, key=lambda own: (-own["f1_chosen"], own["feature"])):
        if finding["kind"] == "place" and finding["f1_chosen"] >= MIN_F1 and fires[finding["feature"]] >= minimum:
            found.setdefault(finding["rule"], finding)
    return list(found.values())


def count_targets(
    codes: CodeStore, rules: list[str], features: NDArray[np.int64], thresholds: NDArray[np.float64]
) -> TargetCounts:
    """One pass over the choosing half's rows that have a next token in their window."""
    codec = store_tokenizer(codes)
    labels = read_labels(codes, codec, None)
    columns = [labels.names.index(rule) for rule in rules]
    counts = TargetCounts(len(rules), len(features), codec.n_vocabulary)
    column = np.full(codes.n_features, -1)
    column[features] = np.arange(len(features))
    for shard in codes.shards(PART):
        indices, values = read_codes(codes, shard)
        (holds, is_scoring), following = (
            shard_labels(codes, shard, labels.segments[shard.segment]),
            next_tokens(codes, shard),
        )
        mine, by_rule = ~is_scoring & (following >= 0), holds[:, columns].toarray() != 0
        np.add.at(counts.all, following[mine], 1)
        for i in range(len(rules)):
            np.add.at(counts.rules[i], following[mine & by_rule[:, i]], 1)
        row, slot = np.nonzero((values > thresholds[indices]) & (column[indices] >= 0) & mine[:, None])
        np.add.at(counts.features, (column[indices[row, slot]], following[row]), 1)
    return counts


class Falls:
    """Sums over the firings of each of n roles of the fall of log P(targets)."""

    def __init__(self, n_roles: int, n_directions: int, n_features: int):
        self.n = np.zeros(n_roles, np.int64)
        self.own = np.zeros(n_roles)
        self.random = np.zeros((n_roles, n_directions))
        self.other = np.zeros((n_roles, n_features))
        self.together = np.zeros((n_roles, n_features), np.int64)

    def coactive_median(self, role: int) -> float:
        """Median over features, active together with the role's often enough, of their mean fall."""
        enough = self.together[role] >= MIN_TOGETHER
        return float(np.median(self.other[role, enough] / self.together[role, enough])) if enough.any() else float("nan")


@torch.no_grad()
def measure(spliced: Spliced, codes: CodeStore, firings: DrawnFirings, roles: list[Role], n_directions: int) -> Falls:
    """Ablate at every firing: the role's feature, random directions of the same norm, and the other active features."""
    falls = Falls(len(roles), n_directions, spliced.record.n_features)
    of_feature = {role.feature: i for i, role in enumerate(roles)}
    directions = torch.randn(n_directions, spliced.sae.d_model, generator=torch.Generator().manual_seed(SEED))
    directions /= directions.norm(dim=1, keepdim=True)
    order = np.lexsort((firings.position, firings.window, firings.segment))
    with track("roles", len(firings), "firings") as progress:
        for chosen in window_passes(firings, order, N_TEXTS):
            own = firings.take(chosen)
            _measure_pass(spliced, codes, own, roles, of_feature, directions, falls)
            progress.advance(len(chosen))
    return falls


def _measure_pass(
    spliced: Spliced,
    codes: CodeStore,
    own: DrawnFirings,
    roles: list[Role],
    of_feature: dict[int, int],
    directions: torch.Tensor,
    falls: Falls,
) -> None:
    ids, text = firing_texts(codes, own)
    reading = cut_at(spliced.lm.model, spliced.site, torch.from_numpy(ids))
    values, features = spliced.sae.encode(reading.x[torch.from_numpy(text), torch.from_numpy(own.position)])
    mine = values.where(features == torch.from_numpy(own.feature)[:, None], torch.zeros(())).sum(dim=1)
    n, k, n_directions = len(own), values.shape[1], len(directions)
    # of each firing: its own feature, the random directions, the k active features (its own among them)
    changes = torch.cat(
        [
            mine[:, None, None] * spliced.sae.W_dec[torch.from_numpy(own.feature)][:, None],
            mine[:, None, None] * directions,
            values[..., None] * spliced.sae.W_dec[features],
        ],
        dim=1,
    )
    width = 1 + n_directions + k
    layout = branch_layout(np.repeat(text, width), np.repeat(own.position, width), "cpu")
    clean, ablated = predicted(spliced, reading, -changes.flatten(0, 1), layout)
    targets = torch.tensor([roles[of_feature[f]].targets for f in own.feature.tolist()])
    before = _log_share(spliced, clean[::width], targets)
    after = torch.cat(
        [
            _log_share(spliced, *part)
            for part in zip(ablated.split(2048), targets.repeat_interleave(width, 0).split(2048), strict=True)
        ]
    )
    fall = (before[:, None] - after.view(n, width)).double().numpy()
    role = np.array([of_feature[f] for f in own.feature.tolist()])
    fired = features.numpy()
    counted = (values.numpy() > 0) & (fired != own.feature[:, None])
    np.add.at(falls.n, role, 1)
    np.add.at(falls.own, role, fall[:, 0])
    np.add.at(falls.random, role, fall[:, 1 : 1 + n_directions])
    row, slot = np.nonzero(counted)
    np.add.at(falls.other, (role[row], fired[row, slot]), fall[row, 1 + n_directions + slot])
    np.add.at(falls.together, (role[row], fired[row, slot]), 1)


def _log_share(spliced: Spliced, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(n,) log of the summed probability of targets (n, t) of the next token."""
    found = logits(spliced.lm.model, hidden)
    return found.gather(1, targets).logsumexp(dim=1) - found.logsumexp(dim=1)


def judge(falls: Falls, roles: list[Role], texts: list[str]) -> list[Verdict]:
    """Which of a group of roles pass."""
    own, random = falls.own / falls.n, falls.random / falls.n[:, None]
    p = (1 + (random >= own[:, None]).sum(axis=1)) / (1 + random.shape[1])
    found = benjamini_hochberg(p, FALSE_DISCOVERIES)
    verdicts = []
    for i, role in enumerate(roles):
        bound, median = float(np.quantile(random[i], 0.95)), falls.coactive_median(i)
        verdicts.append(
            Verdict(
                role=role,
                target_texts=tuple(texts[t] for t in role.targets),
                firings=int(falls.n[i]),
                fall=float(own[i]),
                random_mean=float(random[i].mean()),
                random_95=bound,
                coactive_median=median,
                p=float(p[i]),
                passes=bool(found[i] and own[i] > bound and own[i] > median),
            )
        )
    return verdicts


def benjamini_hochberg(p: NDArray[np.float64], q: float) -> NDArray[np.bool_]:
    """(n,) which of n hypotheses are rejected at a false discovery rate q. Benjamini and Hochberg 1995.

    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5]), 0.05).tolist()
    [True, False, False, False]
    """
    n = len(p)
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= q * np.arange(1, n + 1) / n)
    rejected = np.zeros(n, bool)
    rejected[order[: below[-1] + 1 if len(below) else 0]] = True
    return rejected


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of k in n. Wilson 1927."""
    z = 1.959964
    centre, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
    return centre - spread, centre + spread


def run(demo: Path, n_live: int, n_firings: int, n_directions: int) -> Iterator[dict[str, Any]]:
    """Choose on one half, measure on the other; each part as soon as it is known."""
    spliced = open_spliced(demo / "run", demo / "store", device="cpu")
    codes = CodeStore(demo / "codes")
    findings = read_json(demo / "analysis" / "findings.json")["findings"]
    thresholds = np.zeros(codes.n_features)
    for finding in findings:
        thresholds[finding["feature"]] = finding["threshold"]
    choosing = draw_firings(codes, None, 0, SEED, half=0, above=thresholds).total
    rules = best_of_each_rule(findings, choosing, n_firings)
    scoring = draw_firings(codes, None, n_firings, SEED, half=1, above=thresholds)
    drawn = np.bincount(scoring.feature, minlength=codes.n_features)
    live = np.flatnonzero((choosing >= n_firings) & (drawn >= n_firings))
    sample = np.sort(live[permutation(len(live), SEED, 64)[:n_live]])
    counts = count_targets(codes, [rule["rule"] for rule in rules], sample, thresholds)
    named = [
        Role(rule["feature"], rule["rule"], rule["f1"], rule["threshold"], counts.raised_most(counts.rules[i]))
        for i, rule in enumerate(rules)
    ]
    others = [
        Role(feature, "its own firings", None, float(thresholds[feature]), counts.raised_most(counts.features[i]))
        for i, feature in enumerate(sample.tolist())
    ]
    texts = store_tokenizer(codes).token_texts()
    yield {"live": len(live), "features": codes.n_features, "directions": n_directions}
    for name, roles in (("roles", named), ("sample", others)):
        if roles:
            mine = scoring.take(np.isin(scoring.feature, [role.feature for role in roles]))
            falls = measure(spliced, codes, mine, roles, n_directions)
            yield {name: [asdict(verdict) for verdict in judge(falls, roles, texts)]}


def role_lines(found: dict[str, Any]) -> list[str]:
    """The roles, and how many pass."""
    out = [
        f"fall of log P(targets) in nats when the feature is ablated, mean over firings of the scoring half; "
        f"{found['directions']} random directions",
        f"{'feature':>7}  {'role':<34}{'firings':>8}{'fall':>8}{'random 95 %':>13}{'co-active':>11}{'p':>7}  pass  targets",
    ]
    for own in found["roles"]:
        role = own["role"]
        targets = "  ".join(repr(visible(text)) for text in own["target_texts"])
        out.append(
            f"{role['feature']:>7}  {role['name']:<34}{own['firings']:>8}{own['fall']:>8.3f}{own['random_95']:>13.3f}"
            f"{own['coactive_median']:>11.3f}{own['p']:>7.3f}  {'yes' if own['passes'] else 'no':<4}  {targets}"
        )
    out.append(f"{sum(own['passes'] for own in found['roles'])} of {len(found['roles'])} roles pass")
    return out


def sample_line(found: dict[str, Any]) -> str:
    """The share of live features that passes."""
    k, n = sum(own["passes"] for own in found["sample"]), len(found["sample"])
    low, high = wilson(k, n)
    return (
        f"of {found['live']:,} live features (of {found['features']:,}), by a random sample of {n}: {k / n:.0%} pass "
        f"(95 % interval {low:.0%} to {high:.0%})"
    )


@click.command(help=__doc__)
@click.argument("demo", type=click.Path(path_type=Path))
@click.option("--live", default=40, show_default=True, help="Live features in the sample.")
@click.option("--firings", default=200, show_default=True, help="Of each feature on the scoring half.")
@click.option("--directions", default=100, show_default=True, help="Random directions.")
@click.option("--json", "as_json", is_flag=True)
def main(demo: Path, live: int, firings: int, directions: int, as_json: bool) -> None:
    found: dict[str, Any] = {}
    for part in run(demo, live, firings, directions):
        found |= part
        if as_json:
            continue
        if "roles" in part:
            print("\n".join(role_lines(found)), flush=True)
        if "sample" in part:
            print(sample_line(found))
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
