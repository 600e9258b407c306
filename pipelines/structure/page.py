"""Findings as a page of Markdown: plain answers, each with the numbers behind it and text to check it in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipelines.shared import markdown

SHOWN = 8


def findings_page(record: dict[str, Any]) -> str:
    """The whole page, from what `structure.json` holds and nothing else."""
    sections = (_head, _pairs, _communities, _implications, _attracted, _repelled, _duplicates, _hubs, _cosine, _limits)
    return "\n".join(line for section in sections for line in (*section(record), "")).rstrip() + "\n"


def summary_lines(record: dict[str, Any]) -> list[str]:
    """The answers alone, for a terminal."""
    pairs, arrows = record["pairs"], record["implications"]
    drawn = pairs["called_in_null_draws"]
    return [
        f"pairs         {pairs['called']:,} of {pairs['tested']:,} called at q <= {record['settings']['q']} "
        f"({_of(drawn)} in draws of the null; {pairs['called_under_independence']:,} under independence)",
        *(
            f"  {name:<11} {pairs[name]['called']:,}, of which {pairs[name]['replicated']:,} replicated on the other half"
            for name in ("attracted", "repelled")
        ),
        f"communities   {_verdict(record['communities'])}",
        f"implications  {arrows['called']:,} called, {arrows['replicated']:,} replicated",
        f"duplicates    {record['duplicates']['called']:,} called, {record['duplicates']['replicated']:,} replicated",
    ]


def _of(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.1%})"


def _examples(found: list[dict[str, str]]) -> Iterable[str]:
    for example in found:
        yield f"  - {markdown.code(example['document'])}: {markdown.code(example['text'])}"


def _head(record: dict[str, Any]) -> list[str]:
    settings, (first, second) = record["settings"], record["sample"]
    return [
        "# Do features fire together in a pattern?",
        "",
        f"Codes of {markdown.code(record['site'])} of {markdown.code(record['model'])} on "
        f"{markdown.code(record['corpus'])}, run {markdown.inline(record['run_id'])}. Everything below was chosen on "
        f"{first['rows']:,} rows of {first['documents']} documents and tested on {second['rows']:,} rows of "
        f"{second['documents']} others. The null keeps each feature's firings in each document (in stretches of at most "
        f"{settings['block_rows']:,} rows) and each row's number of features; {settings['draws']} draws on either half, and "
        f"{settings['null_draws_judged']} more that were judged as if observed.",
    ]


def _pairs(record: dict[str, Any]) -> list[str]:
    pairs, settings = record["pairs"], record["settings"]
    lift = settings["min_lift"]
    return [
        "## How many pairs are not chance?",
        "",
        "| | |",
        "|---|---|",
        f"| pairs with an expectation of at least {settings['min_expectation']:g} | {pairs['tested']:,} |",
        f"| called at q ≤ {settings['q']} | {_share(pairs['called'], pairs['tested'])} |",
        f"| the same in {settings['null_draws_judged']} further draws of the null | {_of(pairs['called_in_null_draws'])} |",
        f"| called if features were taken to be independent, the wrong null | "
        f"{_share(pairs['called_under_independence'], pairs['tested_under_independence'])} |",
        f"| of these, not called by the null used here | {pairs['called_under_independence_alone']:,} |",
        f"| together at least {lift:g} times as often as in the null; replicated | {_replicated(pairs['attracted'])} |",
        f"| at most 1/{lift:g} as often; replicated | {_replicated(pairs['repelled'])} |",
    ]


def _replicated(kind: dict[str, Any]) -> str:
    return f"{kind['called']:,}; {_share(kind['replicated'], kind['called'])}"


def _verdict(record: dict[str, Any]) -> str:
    if not record["reported"]:
        reasons = "; ".join(record["levels"][-1]["why_not"])
        return f"no community structure beyond the null, at any level of the table; at the highest, {reasons}"
    level = record["levels"][record["level"]]
    return (
        f"{level['found']:,} communities of features that fire together at least {level['min_lift']:g} times as often as in "
        f"the null, {level['replicated']:,} replicated (modularity z {level['modularity_z']:.1f})"
    )


def _communities(record: dict[str, Any]) -> list[str]:
    communities = record["communities"]
    lines = [
        "## Are there communities?",
        "",
        f"{'Yes' if communities['reported'] else 'No'}: {_verdict(communities)}.",
        "",
        "Graphs of attracted pairs, each edge as heavy as its lift, beside null graphs over the same features with as "
        "many edges. Reported is the first level whose modularity is 3 deviations above theirs, and where 20 seeds and the "
        "two halves of the documents agree by at least 0.6 (adjusted Rand).",
        "",
        "| lift at least | edges | in null draws | modularity | null | z | seeds agree | halves agree | communities |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for level in communities["levels"]:
        figures = [
            f"{level['min_lift']:g}",
            f"{level['edges']:,}",
            _of(level["edges_in_null_draws"]),
            f"{level['modularity']:.3f}",
            f"{level['null_modularity_mean']:.3f} ± {level['null_modularity_deviation']:.3f}",
            f"{level['modularity_z']:.1f}",
            f"{level['seed_agreement']:.2f}",
            f"{level['half_agreement']:.2f}",
            f"{level['found']:,}, {level['replicated']:,} replicated",
        ]
        lines.append(f"| {' | '.join(figures)} |")
    for facts in communities["communities"][:SHOWN]:
        called = facts["edges_called_on_half_2"]
        lines += [
            "",
            f"**Community {facts['community']}**: {len(facts['features']):,} features, "
            f"{_share(facts['edges'], facts['possible_edges'])} of its pairs linked, {called:,} of them called on the other "
            f"half too. There they fire together {facts['lift_2']:.1f} times as often as in the null (95 % "
            f"{facts['lift_2_low']:.1f} to {facts['lift_2_high']:.1f}, q = {facts['q_2']:.1e}). Most linked:",
            "",
            *(f"  - feature {one['feature']}: {markdown.inline(one['name'])}" for one in facts["central"]),
            "",
            "  Where most of its features fire at once:",
            "",
            *_examples(facts["examples"]),
        ]
    if len(communities["communities"]) > SHOWN:
        lines += ["", f"The other {len(communities['communities']) - SHOWN:,} are in `structure.json`."]
    return lines


def _implications(record: dict[str, Any]) -> list[str]:
    implications = record["implications"]
    lines = [
        "## Which features fire only where another does?",
        "",
        f"{implications['called']:,} direct implications were called "
        f"({implications['followed_from_others']:,} more follow from them), "
        f"{implications['replicated']:,} hold on the other half.",
    ]
    for arrow in [arrow for arrow in implications["arrows"] if "names" in arrow]:
        source, target = map(markdown.inline, arrow["names"])
        lines += [
            "",
            f"**{arrow['source']} ⇒ {arrow['target']}**: {source} ⇒ {target}. Of "
            f"{arrow['source_fires_2']:,} firings {arrow['target_given_source_2']:.1%} are with the other "
            f"({arrow['target_given_source_1']:.1%} where it was chosen; in the null {arrow['null_2']:.1%}); the other way "
            f"{arrow['source_given_target_1']:.1%}. q = {arrow['q_2']:.1e}.",
            "",
            *_examples(arrow["examples"]),
        ]
    return lines


def _pair_line(facts: dict[str, Any]) -> list[str]:
    left, right = map(markdown.inline, facts["names"])
    return [
        "",
        f"**{facts['left']} and {facts['right']}**: {left}; {right}. Together in "
        f"{facts['count_2']:,} rows, {facts['expected_2']:,.0f} in the null: {facts['lift_2']:.2f} times as often (95 % "
        f"{facts['lift_2_low']:.2f} to {facts['lift_2_high']:.2f}), q = {facts['q_2']:.1e}; φ {facts['phi']:.3f} against "
        f"{facts['null_phi']:.3f}, NPMI {facts['npmi']:.2f} against {facts['null_npmi']:.2f}.",
        "",
        *_examples(facts["examples"]),
    ]


def _attracted(record: dict[str, Any]) -> list[str]:
    strongest = record["pairs"]["attracted"]["strongest"]
    return [
        "## Which pairs stand out most?",
        "",
        "The most certain ones, no feature twice; figures are of the half that did not choose them.",
        *(line for facts in strongest for line in _pair_line(facts)),
    ]


def _repelled(record: dict[str, Any]) -> list[str]:
    strongest = record["pairs"]["repelled"]["strongest"]
    return [
        "## Which features avoid each other?",
        "",
        "The most certain ones, no feature twice.",
        *(line for facts in strongest for line in _pair_line(facts)),
    ]


def _duplicates(record: dict[str, Any]) -> list[str]:
    duplicates = record["duplicates"]
    by = "a Jaccard index of at least 0.5" + (" and a decoder cosine of at least 0.7" if duplicates["by_cosine"] else "")
    lines = [
        "## Are there near-duplicates?",
        "",
        f"{duplicates['called']:,} pairs with {by}, {duplicates['replicated']:,} replicated.",
    ]
    for facts in duplicates["pairs"][:10]:
        cosine = "" if facts["decoder_cosine"] is None else f", cosine {facts['decoder_cosine']:.2f}"
        left, right = map(markdown.inline, facts["names"])
        lines.append(
            f"- {facts['features'][0]} and {facts['features'][1]}: Jaccard {facts['jaccard_1']:.2f}, "
            f"{facts['jaccard_2']:.2f} on the other half{cosine}; {left}; {right}"
        )
    return lines


def _hubs(record: dict[str, Any]) -> list[str]:
    lines = [
        "## Which features are linked with most others?",
        "",
        "| feature | edges | on the other half | |",
        "|---|---|---|---|",
    ]
    rows = [
        f"| {hub['feature']} | {hub['edges_1']:,} | {hub['edges_2']:,} | {markdown.cell(hub['name'])} |"
        for hub in record["hubs"]
    ]
    return lines + rows


def _cosine(record: dict[str, Any]) -> list[str]:
    lines = ["## Do features with similar decoder directions fire together?", ""]
    cosine = record["cosine"]
    if cosine is None:
        return [*lines, "Not asked: `--run RUN` gives the directions."]
    strength = abs(cosine["spearman_2"])
    answer = "Hardly" if strength < 0.1 else "Somewhat" if strength < 0.4 else "Strongly"
    direction = "" if cosine["spearman_2"] >= 0 else ", but the other way round: similar directions avoid each other"
    return [
        *lines,
        f"{answer}{direction}: the rank correlation of lift and cosine is {cosine['spearman_1']:.3f}, "
        f"{cosine['spearman_2']:.3f} on the other half; in draws of the null {cosine['null_mean']:.3f} on average, at most "
        f"{cosine['null_largest']:.3f} either way.",
    ]


def _limits(record: dict[str, Any]) -> list[str]:
    return [
        "## What this does not say",
        "",
        "The null forgets the order of rows inside a document, their tokens and their positions. So two features that fire "
        "on the same token are called, and rightly so: they do fire together. Firing together is no cause. An implication "
        "is no absorption either: a feature that fires *instead* of another is among those that avoid each other.",
    ]
