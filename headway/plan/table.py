"""The text of `headway plan`: the best meshes in a table, then the winner line by line."""

from typing import Any

from headway.plan.time import TimePart

MOST_ROWS = 12
"""Most rows of the table; `--json` has all."""
_UNITS = {
    "peak": ("TFLOP/s", 1e12),
    "peak_float32": ("TFLOP/s", 1e12),
    "memory": ("GB", 1e9),
    "memory_bandwidth": ("GB/s", 1e9),
    "intra_node": ("GB/s", 1e9),
    "inter_node": ("GB/s", 1e9),
    "latency": ("µs", 1e-6),
}


def format_plan(ranking: dict[str, Any]) -> str:
    """Format the result of `choose.rank_meshes` as text for people."""
    rows, best = ranking["meshes"], ranking["best"]
    fit = [row for row in rows if row["fits"]]
    lines = [
        f"{ranking['recipe'] or 'config'}: {ranking['model']}",
        f"{ranking['gpus']} ranks, {ranking['gpus_per_node']} per node, {ranking['dtype']}; "
        f"{ranking['tokens_per_step']:,} tokens per step, of one rank {ranking['passes']} × "
        f"{ranking['micro_batch_size']} sequences",
        "",
        *_machine(ranking["machine"]),
        "",
        f"{len(rows)} ways on {len({r['mesh'] for r in rows})} meshes, {len(fit)} fit; "
        "fastest first",
        *_table(fit[:MOST_ROWS]),
    ]
    if len(fit) > MOST_ROWS:
        lines.append(f"  … {len(fit) - MOST_ROWS} more: --json has all")
    lines += _refused(ranking)
    if best is None:
        smallest = min(rows, key=lambda row: row["memory_bytes"])
        lines += ["", f"no mesh fits; the smallest, {_name(smallest)}, {smallest['reason']}"]
    else:
        lines += ["", *_explained(best, ranking)]
    return "\n".join(lines)


def _options(row: dict[str, Any], ranking: dict[str, Any]) -> list[str]:
    """Return the command-line options that run the mesh as predicted."""
    words = [f"--mesh dp={row['dp']},hp={row['hp']},ep={row['ep']}"]
    if row["scheme"] == "all_to_all_per_slot":
        words.append("--mesh.ep-scheme all_to_all --mesh.dedup False")
    elif row["scheme"]:
        words.append(f"--mesh.ep-scheme {row['scheme']}")
    if ranking["chunks"] != "auto":
        words.append(f"--mesh.chunks {ranking['chunks']}")
    if ranking["payload"] != "matmul":
        words.append(f"--mesh.payload {ranking['payload']}")
    lines = []
    if row["replicas"] == "fsdp":
        words.append("--mesh.shard fsdp")
        best = ranking["best_replicated"]
        lines = ["without fsdp no mesh fits"]
        if best is not None:
            lines = [f"fastest without fsdp: {_name(best)}, {1e3 * best['step_seconds']:,.1f} ms"]
    words.append(f"--data.micro-batch-size {ranking['micro_batch_size']}")
    return [*lines, f"options: {' '.join(words)}"]


def _machine(machine: dict[str, Any]) -> list[str]:
    by_origin: dict[str, list[str]] = {}
    for name, entry in machine.items():
        if name != "name":
            unit, scale = _UNITS.get(name, ("", 1.0))
            text = f"{name} {entry['value'] / scale:,.4g} {unit}".rstrip()
            by_origin.setdefault(entry["origin"], []).append(text)
    words = {
        "vendor": "vendor's",
        "assumed": "assumed, not measured",
        "measured": "measured",
        "given": "given",
    }
    return [
        f"{machine['name']}, per rank",
        *(f"  {words[origin]}: {', '.join(texts)}" for origin, texts in by_origin.items()),
    ]


def _name(row: dict[str, Any]) -> str:
    scheme = f" {row['scheme']}" if row["scheme"] else ""
    return f"{row['mesh']}{scheme} {row['replicas']}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = (
        f"  {'mesh':<20} {'ep scheme':<19} {'replicas':<9} {'chunks':>6} {'step ms':>9} "
        f"{'compute':>9} {'exposed':>9} {'gradients':>9} {'optimiser':>9} {'GB sent':>8} "
        f"{'GB held':>8} {'MFU':>5}"
    )
    return [head, *(_line(row) for row in rows)]


def _line(row: dict[str, Any]) -> str:
    ms = {name: 1e3 * value for name, value in _groups(row["seconds"]).items()}
    return (
        f"  {row['mesh']:<20} {row['scheme'] or '–':<19} {row['replicas']:<9} "
        f"{row['chunks']:>6} "
        f"{1e3 * row['step_seconds']:>9,.1f} {ms['compute']:>9,.1f} {ms['exposed']:>9,.1f} "
        f"{ms['gradients']:>9,.1f} {ms['optimiser']:>9,.1f} {row['bytes_sent_total'] / 1e9:>8,.2f} "
        f"{row['memory_bytes'] / 1e9:>8,.2f} {row['mfu']:>5.1%}"
    )


_COLUMNS = {
    TimePart.HEAD_PARALLEL: "exposed",
    TimePart.EXPERT_PARALLEL: "exposed",
    TimePart.WEIGHTS: "exposed",
    TimePart.GRADIENTS: "gradients",
    TimePart.SMALL_SUMS: "gradients",
    TimePart.OPTIMISER: "optimiser",
    TimePart.NEWTON_SCHULZ: "optimiser",
}
"""The column of a part that is not `compute`."""


def _groups(seconds: dict[str, float]) -> dict[str, float]:
    groups: dict[str, float] = dict.fromkeys(("compute", "exposed", "gradients", "optimiser"), 0.0)
    for name, value in seconds.items():
        groups[_COLUMNS.get(TimePart(name), "compute")] += value
    return groups


def _refused(ranking: dict[str, Any]) -> list[str]:
    """Return one line per mesh that cannot run or does not fit."""
    too_big = [row for row in ranking["meshes"] if not row["fits"]]
    lines = []
    if too_big:
        lines += ["", f"{len(too_big)} do not fit"]
        lines += [f"  {_name(row)}: {row['reason']}" for row in too_big[:MOST_ROWS]]
        if len(too_big) > MOST_ROWS:
            lines.append(f"  … {len(too_big) - MOST_ROWS} more: --json has all")
    if ranking["illegal"]:
        lines += ["", f"{len(ranking['illegal'])} meshes cannot run"]
        lines += [
            f"  dp={row['dp']},hp={row['hp']},ep={row['ep']}: {row['reason']}"
            for row in ranking["illegal"]
        ]
    return lines


def _explained(row: dict[str, Any], ranking: dict[str, Any]) -> list[str]:
    """Return every number of a mesh beside its formula."""
    formulas = ranking["formulas"]
    lines = [
        f"fastest: {_name(row)}, {1e3 * row['step_seconds']:,.1f} ms per step, "
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}",
    ]
    sections: tuple[tuple[str, str, float, str], ...] = (
        ("seconds", "milliseconds per step", 1e3, ",.2f"),
        ("bytes_sent", "bytes that a rank sends per step", 1, ",.0f"),
        ("memory", "bytes that a rank holds", 1, ",.0f"),
        ("flops", "FLOPs of a rank per step", 1, ",.0f"),
    )
    for group, heading, scale, form in sections:
        lines += ["", f"{heading}: {sum(row[group].values()) * scale:{form}}"]
        lines += [
            f"  {name:<38} {value * scale:>26{form}}  {formulas[group][name]}"
            for name, value in row[group].items()
        ]
    lines += [
        "",
        f"parameters that a rank computes with: {row['parameters']:,}, "
        f"holds: {row['parameters_held']:,} of its own",
        f"  {formulas['parameters']}",
    ]
    if row["links"]:
        lines.append(f"chunks: {row['chunks']}, {row['chunks_because']}")
        lines.append(
            f"links: {', '.join(f'{axis} {place}' for axis, place in row['links'].items())}"
        )
    return lines + _options(row, ranking)
