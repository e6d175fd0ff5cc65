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
        *_table(fit),
        *_refused(ranking),
    ]
    if best is None:
        smallest = min(rows, key=lambda row: row["memory_bytes"])
        lines += ["", f"no mesh fits; the smallest, {_name(smallest)}, {smallest['reason']}"]
    else:
        lines += ["", *_explained(best, ranking)]
    return "\n".join(lines)


def _options(row: dict[str, Any], ranking: dict[str, Any]) -> list[str]:
    """Return the command-line options that run the mesh as predicted."""
    words = [f"--mesh {row['mesh']}"]
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
        lines = ["without fsdp no mesh fits"]
        if best := ranking["best_replicated"]:
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
    words = {"vendor": "vendor's", "assumed": "assumed, not measured"}
    lines = [f"  {words.get(name, name)}: {', '.join(texts)}" for name, texts in by_origin.items()]
    return [f"{machine['name']}, per rank", *lines]


def _name(row: dict[str, Any]) -> str:
    scheme = f" {row['scheme']}" if row["scheme"] else ""
    return f"{row['mesh']}{scheme} {row['replicas']}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("compute", "exposed", "gradients", "optimiser")
    head = (
        f"  {'mesh':<20} {'ep scheme':<19} {'replicas':<9} {'chunks':>6} {'step ms':>9} "
        f"{' '.join(f'{name:>9}' for name in columns)} {'GB sent':>8} {'GB held':>8} {'MFU':>5}"
    )
    lines = []
    for row in rows:
        ms: dict[str, float] = dict.fromkeys(columns, 0.0)
        for name, seconds in row["seconds"].items():
            ms[_COLUMNS.get(TimePart(name), "compute")] += seconds
        lines.append(
            f"  {row['mesh']:<20} {row['scheme'] or '–':<19} {row['replicas']:<9} "
            f"{row['chunks']:>6} {1e3 * row['step_seconds']:>9,.1f} "
            f"{' '.join(f'{1e3 * ms[name]:>9,.1f}' for name in columns)} "
            f"{row['bytes_sent_total'] / 1e9:>8,.2f} {row['memory_bytes'] / 1e9:>8,.2f} "
            f"{row['mfu']:>5.1%}"
        )
    return [head, *_first(lines)] if rows else []


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


def _refused(ranking: dict[str, Any]) -> list[str]:
    """Return one line per mesh that cannot run or does not fit."""
    too_big = [row for row in ranking["meshes"] if not row["fits"]]
    lines = []
    if too_big:
        lines += ["", f"{len(too_big)} do not fit"]
        lines += _first([f"  {_name(row)}: {row['reason']}" for row in too_big])
    if illegal := ranking["illegal"]:
        lines += ["", f"{len(illegal)} meshes cannot run"]
        lines += [f"  dp={r['dp']},hp={r['hp']},ep={r['ep']}: {r['reason']}" for r in illegal]
    return lines


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - MOST_ROWS
    return lines[:MOST_ROWS] + ([f"  … {more} more: --json has all"] if more > 0 else [])


def _explained(row: dict[str, Any], ranking: dict[str, Any]) -> list[str]:
    """Return every number of a mesh beside its formula."""
    formulas = ranking["formulas"]
    lines = [
        f"fastest: {_name(row)}, {1e3 * row['step_seconds']:,.1f} ms per step, "
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}"
    ]
    sections = {
        "seconds": "milliseconds per step",
        "bytes_sent": "bytes that a rank sends per step",
        "memory": "bytes that a rank holds",
        "flops": "FLOPs of a rank per step",
    }
    for group, heading in sections.items():
        scale, form = (1e3, ",.2f") if group == "seconds" else (1, ",.0f")
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
        links = ", ".join(f"{axis} {place}" for axis, place in row["links"].items())
        lines += [f"chunks: {row['chunks']}, {row['chunks_because']}", f"links: {links}"]
    return lines + _options(row, ranking)
