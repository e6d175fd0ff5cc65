"""The summary at the end of a run: result, balance, traffic, and what to run next."""

from pathlib import Path
from typing import Any

from headway.checkpoint.run_folder import resume_command
from headway.config import Config
from headway.plan.describe import with_vocab
from headway.plan.traffic import TokenExchange, traffic_per_token
from headway.report.sinks import read_metrics

MOST_RANKS = 8
"""Ranks for which traffic is predicted: a node, or the heads where they are fewer."""


def train_summary(config: Config, result: dict[str, Any], run_dir: str) -> str:
    """Format the result of `train` as aligned lines of text."""
    total, active = result["parameters_total"], result["parameters_active"]
    done = (
        f"{result['steps']:,} steps, {result['tokens']:,} tokens, "
        f"{result['seconds']:.0f} s of training, {result['tokens_per_second']:,.0f} tokens/s"
    )
    if result["skipped"]:
        done += f", {result['skipped']} steps skipped"
    rows = [
        ("interrupted" if result["interrupted"] else "done", done),
        ("parameters", f"{total:,} total, {active:,} active per token"),
    ]
    first, last = result["first_val_bits_per_byte"], result["val_bits_per_byte"]
    if last is not None:  # equal in a run that ended before its first interval did
        text = f"{first:.3f} → {last:.3f} on validation text"
        if first == last:
            text = f"{first:.3f} on validation text before the first step, not evaluated since"
        rows.append(("bits/byte", text))
    if config.model.n_sparse:
        rows += [("balance", _balance(Path(run_dir))), ("traffic", _traffic(config))]
    if result["sample"]:
        text = config.run.sample_prompt + result["sample"]
        rows.append(("sample", text.rstrip().replace("\n", "\n" + " " * 13)))
    rows += [(name, result[name] or "none") for name in ("checkpoint", "report")]
    if result["interrupted"]:
        rows.append(("resume", resume_command(config.mesh, run_dir)))
    elif result["checkpoint"]:
        verb = "eval RUN --suite worlds" if config.data.worlds else "sample RUN --prompt 'import '"
        rows.append(("try", "headway " + verb.replace("RUN", run_dir)))
    return "\n" + "\n".join(f"{name:<12} {text}" for name, text in rows)


def _balance(run_dir: Path) -> str:
    """Format the load of the last interval; a full disk may have left no file."""
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    last = next((r for r in reversed(records) if r.get("load_max") is not None), None)
    if last is None:
        return "not recorded"
    return (
        f"load / fair share: min {last['load_min']:.2f}, p95 {last['load_p95']:.2f}, "
        f"max {last['load_max']:.2f}; {last['dead']} dead experts"
    )


def _traffic(config: Config) -> str:
    model = with_vocab(config).model
    heads = model.moe.n_heads
    ranks = min(MOST_RANKS, heads) if heads > 1 else MOST_RANKS
    sent = {i.part: i.value * model.n_sparse for i in traffic_per_token(model, ranks)}
    per_slot, per_rank = sent[TokenExchange.PER_SLOT], sent[TokenExchange.PER_RANK]
    text = f"Expert Parallel {per_slot:,.0f} bytes ({per_rank:,.0f} with one copy per rank)"
    if TokenExchange.HEADS in sent:
        text = f"Head Parallel {sent[TokenExchange.HEADS]:,.0f} bytes, {text}"
    return f"per token in training, if {ranks} ranks shared the experts: {text}"
