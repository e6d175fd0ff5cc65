"""docs/studies.md: for each claim whether it holds, how sure that is, and what it cost."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.config import cannot_write
from headway.lab import svg
from headway.lab.measurement import Measurement, read_result
from headway.lab.registered import ids
from headway.lab.registered import read as read_registration
from headway.lab.rows import Row, read_rows, spent_seconds
from headway.lab.study import Study, load, names, tables
from headway.lab.verdict import Judged, JudgedRule, judge, judge_rules, statistic

HEAD = """# Studies

What the laboratory found, negatives included. Made by `headway study list --page` from
`docs/numbers/studies/`; a verdict is computed from the rows, never typed. Differences are arm minus
baseline in bits per byte: below 0 the arm is better. A claim on differences `holds` when its whole
interval (Student's t over seeds, Holm's rule over such claims of a study, 5% for all of them
together) lies in its region, is `refuted` when all of it lies outside, and else `cannot_tell`;
`open` has fewer seeds than it asks for. Other claims have a rule of their own, beside the verdict:
read it, `refuted` means what it says there. They are `open` while runs are missing. `exploratory`
was not registered before its runs.
"""
STYLE = (
    "<style>.chart{background:#fff}text{font:11.5px sans-serif;fill:#555}.grid{stroke:#e5e5e5}"
    ".zero{stroke:#222;stroke-dasharray:3 3}.thick{stroke:#2563a8;stroke-width:2.5}"
    ".seed{fill:#999}.dot{fill:#2563a8}</style>"
)


def write_page(studies: Path, numbers: Path, page: Path) -> None:
    """Write the page, and beside it the forest plot of each study with judged claims and what a
    study draws. Raises UsageError where they cannot be written."""
    sections, head = [], ["| study | claim | verdict |", "|---|---|---|"]
    plots = dict[str, str]()
    for name in names(studies):
        study = load(name, studies)
        if isinstance(study, Measurement):
            if (result := read_result(numbers / f"{name}.json")) is not None:
                head.append(f"| [{name}](#{name}) | {study.claim} | {result['answer']} |")
                sections.append(_measurement(result))
            continue
        rows = read_rows(numbers / f"{name}.json")
        registration = read_registration(study, studies)
        judged = judge(study, rows, ids(registration))
        ruled = judge_rules(study, rows, ids(registration))
        for one in judged:
            said = one.answer if one.registered else f"{one.answer}, exploratory"
            head.append(f"| [{name}](#{name}) | {one.claim.id}: {one.claim.text} | {said} |")
        for one in ruled:
            said = one.said.answer if one.registered else f"{one.said.answer}, exploratory"
            head.append(f"| [{name}](#{name}) | {one.rule.id}: {one.rule.text} | {said} |")
        if not (judged or ruled):
            head.append(f"| [{name}](#{name}) | {study.title} | no claim |")
        shown, images = tables(study, rows, numbers), []
        drawn = study.picture(rows) if study.picture is not None else ""
        for file, plot, alt in (
            (name, forest(judged), "intervals of the claims"),
            (f"{name}-results", _alone(drawn), study.title),
        ):
            if plot:
                plots[file] = plot
                images.append(f"![{alt}](studies/{file}.svg)\n")
        sections.append(_study(study, rows, shown, judged, ruled, registration, images))
    text = HEAD + "\n" + "\n".join(head) + "\n" + "\n".join(sections)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, "utf-8")
        for name, plot in plots.items():
            (page.parent / "studies").mkdir(exist_ok=True)
            (page.parent / "studies" / f"{name}.svg").write_text(plot, "utf-8")
    except OSError as error:
        raise cannot_write(page.parent, error) from None


def forest(judged: Sequence[Judged]) -> str:
    """Return the intervals of judged claims on differences in bits per byte as a picture of its
    own; "" where there is none. Slopes and scores, of other units, are in the table alone."""
    rows = [
        (one.claim.id, one.estimate, [(one.ci.low, one.ci.high)], list[float]())
        for one in judged
        if one.estimate is not None and one.ci is not None
        if one.claim.region != "slope" and one.claim.metric.startswith("bits_per_byte")
    ]
    return _alone(svg.forest(rows, "arm − baseline, bits/byte"))


def _alone(picture: str) -> str:
    """Return a picture as a file of its own."""
    return picture.replace(
        '<svg class="chart"', '<svg xmlns="http://www.w3.org/2000/svg" class="chart"'
    ).replace("</svg>", STYLE + "</svg>")


def _study(
    study: Study,
    rows: Sequence[Row],
    shown: Mapping[str, Sequence[Row]],
    judged: Sequence[Judged],
    ruled: Sequence[JudgedRule],
    registration: Mapping[str, Any] | None,
    images: Sequence[str],
) -> str:
    parts = [f"\n## {study.name}\n", f"**{study.title}** {study.notes}".strip() + "\n"]
    if registration:
        parts.append(
            f"Registered in `studies/registered/{study.name}.json` "
            f"(sha256 {registration['sha256'][:12]}…) before the first row.\n"
        )
    if judged:
        parts += [*_table(map(_claim, judged)), ""]
    parts += images
    for one in ruled:
        said = one.said.answer + ("" if one.registered else " (exploratory)")
        parts.append(
            f"**{one.rule.id}.** {one.rule.text} *Rule:* {one.rule.rule} "
            f"**Verdict: {said}.** {one.said.why}\n"
        )
    for name, table in shown.items():
        parts += [f"{name}:\n", *_table(table), ""] if table else []
    if rows:
        parts += [*_table(_means(rows, scored=not (study.tables or study.picture))), ""]
        seconds = spent_seconds(rows)
        diverged = [f"{r['arm']}, seed {r['seed']}" for r in rows if r["bits_per_byte"] is None]
        cpus, commits = ({r[key] for r in rows} for key in ("cpu", "commit"))
        # "": older rows do not say it; None: their arms do
        dtypes = {r.get("auto_dtype", "") for r in rows} - {None}
        parts.append(
            f"{len(rows)} runs, about {seconds / 60:,.0f} CPU minutes of training (steps that runs "
            f"share are counted once), on {', '.join(sorted(cpus))}"
            f"{'' if '' in dtypes or not dtypes else ' in ' + ' and '.join(dtypes)}, commits "
            f"{', '.join(sorted(c[:7] for c in commits))}"
            + (f"; diverged: {'; '.join(diverged)}" if diverged else "")
            + f". Again: `headway study {study.name} --run`, one row with `--only ARM --seed S`."
        )
    else:
        parts.append(f"No run yet: `headway study {study.name} --run`.")
    return "\n".join(parts)


def _claim(one: Judged) -> dict[str, Any]:
    claim = one.claim
    expected = claim.prediction
    return {
        "claim": claim.id,
        "what is measured": statistic(claim),
        "text": claim.corpus,
        "region": _region(claim.region, claim.margin),
        "seeds": len(one.seeds),
        "estimate": None if one.estimate is None else f"{one.estimate:+.4f}",
        "interval": None if one.ci is None else f"{one.ci.low:+.4f} … {one.ci.high:+.4f}",
        "verdict": one.answer + ("" if one.registered else " (exploratory)"),
        "predicted": expected
        and f"{expected.value:+.3f} ({expected.low:+.3f} … {expected.high:+.3f})",
        "hit": {True: "yes", False: "no", None: None}[one.prediction_hit],
        "to settle": one.settling
        and f"{one.settling[0]:,} seeds, {one.settling[1]:,.0f} CPU minutes",
    }


def _region(region: str, margin: float) -> str:
    return {
        "better": f"< {-margin:g}",
        "not_worse": f"< {margin:g}",
        "equal": f"within ± {margin:g}",
        "ordered": f"all < {-margin:g}",
        "slope": f"slope > {margin:g}",
    }[region].replace("-0", "0" if not margin else "-0")


def _means(rows: Sequence[Row], scored: bool) -> list[dict[str, Any]]:
    """Return the mean of each arm at each budget, over the seeds that did not diverge.

    Args:
        scored: with a column per score; tables and a picture of the study show what they say."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = row["stage"], row["corpus"], row["arm"], row["budget"]
        groups.setdefault(key, []).append(row)
    scores = sorted({name for row in rows if scored for name in row.get("scores", {})})
    table = []
    for (stage, corpus, arm, budget), group in sorted(groups.items()):
        bits = [r["bits_per_byte"] for r in group if r["bits_per_byte"] is not None]
        table.append(
            {
                "stage": stage,
                "text": corpus,
                "arm": arm,
                "steps": budget,
                "seeds": len(bits),
                "bits/byte": f"{statistics.mean(bits):.4f}" if bits else None,
                "sd": f"{statistics.stdev(bits):.4f}" if len(bits) > 1 else None,
                **{name: _mean_score(group, name) for name in scores},
                "CPU s of a run": f"{statistics.mean(r['cpu_seconds'] for r in group):.0f}",
            }
        )
    return table


def _mean_score(group: Sequence[Row], name: str) -> str | None:
    values = [row["scores"][name] for row in group if name in row.get("scores", {})]
    return f"{statistics.mean(values):.4g}" if values else None


def _measurement(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    parts = [
        f"\n## {result['study']}\n\n**Claim.** {result['claim']}\n\n**Rule.** {result['rule']}\n",
        f"**Verdict: {result['answer']}.** {result['why']}\n",
        *_table(result["rows"]),
        f"\n{machine['gpu'] or machine['cpu']}, torch {result['versions']['torch']}, "
        f"{result['cpu_seconds']:.0f} CPU seconds, commit {result['commit'][:10]}"
        f"{' with changes' if result['dirty'] else ''}.",
    ]
    return "\n".join(parts)


def _table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return rows of equal fields as a Markdown table."""
    rows = list(rows)
    if not rows:
        return []
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(_cell(row[key]) for key in head)} |" for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
