"""From the answers of the hosts to rows and targets of `bench/cluster.py`; nothing here runs
anything.

Bytes are per host and step. *Wire* is what the interface counted, headers and acknowledgements
included; *ledger* what Headway's own count says; *exchange* the part that travels for the sparse
layers (the ledger's axes hp and ep), the rest being sums of gradients and statistics.
"""

import dataclasses
import statistics

from bench import common
from bench.cluster_host import Size
from bench.common import parameters
from headway.config import MeshConfig, ModelConfig
from headway.plan.traffic import TokenExchange, traffic_per_token

BEST = "the best EP"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh."""

    name: str
    k: int
    mesh: MeshConfig
    model: ModelConfig

    @property
    def key(self) -> str:
        """Its name among the hosts' models."""
        return f"{self.name}, k = {self.k}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One step: an answer per host."""

    answers: list[dict]

    @property
    def ms(self) -> float:
        """Of the slowest host."""
        return 1000 * max(a["seconds"] for a in self.answers)

    def mean(self, key: str) -> float:
        """Of a number that every host gave."""
        return statistics.mean(a[key] for a in self.answers)

    def ledger(self, *axes: str) -> list[float]:
        """Bytes on these axes, per host; of all without axes."""
        return [_sum(a["ledger"], "bytes", axes) for a in self.answers]

    def wait_ms(self) -> float:
        """Time that a host stood still for the exchange, mean over hosts."""
        return 1000 * statistics.mean(_sum(a["ledger"], "wait", ()) for a in self.answers)


def _sum(ledger: dict[str, dict[str, float]], what: str, axes: tuple[str, ...]) -> float:
    return sum(v[what] for key, v in ledger.items() if not axes or key.split()[0] in axes)


def busiest_bytes(sample: Sample) -> float:
    """What the busiest link carries, one exchange of one layer after the other.

    A host that gets more rows than others in a dispatch sends as many more back in the combine, so
    in both the link of the fullest host, in one of its directions, is what all wait for.
    """
    total = 0.0
    for key in {key for a in sample.answers for key in a["ledger"]}:
        axis, purpose = key.split(maxsplit=1)
        if axis not in ("hp", "ep"):
            continue
        back = purpose.replace("dispatch", "?").replace("combine", "dispatch")
        pair = {key, f"{axis} {back.replace('?', 'combine')}"}
        total += max(
            a["ledger"].get(k, {"bytes": 0})["bytes"] for a in sample.answers for k in pair
        )
    return total


def imbalance(sample: Sample) -> float:
    """What the busiest link of the ep axis carries over what a host sends on it on average."""
    ledgers = [{k: v for k, v in a["ledger"].items() if k[:3] == "ep "} for a in sample.answers]
    only = Sample(
        [a | {"ledger": ledger} for a, ledger in zip(sample.answers, ledgers, strict=True)]
    )
    mean = statistics.mean(only.ledger("ep"))
    return max(busiest_bytes(only) / mean, 1.0) if mean else 1.0


BYTES = {"bfloat16": 2, "float32": 4}
"""Name of a dtype → bytes of a value."""


def exchange_formula(case: Case, size: Size, width: int) -> float:
    """Bytes per host and step of the sparse layers by `headway.plan.traffic`: for HP×EP, Head
    Parallel over hp and then Expert Parallel over ep on the sub-tokens."""
    layers, per_token = size.n_layers, 0.0
    if case.mesh.hp > 1:
        per_token += _formula(case, case.mesh.hp, width, TokenExchange.HEADS)
    if case.mesh.ep > 1:
        scheme = TokenExchange.PER_RANK if case.mesh.dedup else TokenExchange.PER_SLOT
        per_token += _formula(case, case.mesh.ep, width, scheme)
    return per_token * size.tokens * layers


def _formula(case: Case, ranks: int, width: int, exchange: TokenExchange) -> float:
    items = traffic_per_token(case.model, ranks, width)
    return next(i.value for i in items if i.part is exchange)


def sweep_row(
    case: Case, mbit: float, samples: list[Sample], size: Size, width: int, base: dict | None
) -> dict:
    """Medians over the repetitions; `width` is the bytes of a value that is sent, `base` the row of
    the same case without a limit."""
    step = statistics.median(s.ms for s in samples)
    wire = statistics.median(s.mean("sent") for s in samples)
    ledger = statistics.median(statistics.mean(s.ledger()) for s in samples)
    exchange = statistics.median(statistics.mean(s.ledger("hp", "ep")) for s in samples)
    busiest = statistics.median(busiest_bytes(s) for s in samples)
    # other programs only add time, so the fastest repetitions say best what a step needs
    fastest = min(s.ms for s in samples)
    alone = base["fastest_ms"] if base else fastest
    total, active = parameters(case.model)
    moe = case.model.moe
    return {
        "bench": "sweep",
        "name": case.name,
        "mesh": _mesh(case.mesh),
        "k": case.k,
        "n_experts": moe.n_experts,
        "d_expert": moe.d_expert,
        "parameters": total,
        "active": active,
        "hosts": case.mesh.hp * case.mesh.ep,
        "tokens": size.tokens,
        "mbit": mbit,
        "step_ms": step,
        "fastest_ms": fastest,
        "repetitions": [s.ms for s in samples],
        "wire_bytes": wire,
        "wire_bytes_of_hosts": [a["sent"] for a in samples[-1].answers],
        "spread": statistics.median(
            max(a["sent"] for a in s.answers) / min(a["sent"] for a in s.answers) - 1
            for s in samples
        ),
        "ledger_bytes": ledger,
        "exchange_bytes": exchange,
        "exchange_wire_bytes": wire - (ledger - exchange),
        "exchange_formula": exchange_formula(case, size, width),
        "busiest_bytes": busiest,
        "imbalance": statistics.median(imbalance(s) for s in samples),
        "wait_ms": statistics.median(s.wait_ms() for s in samples),
        "cpu_ms": 1000 * statistics.median(s.mean("cpu") for s in samples),
        "network_share": 1 - alone / fastest,
        "ledger": {key: v["bytes"] for key, v in samples[-1].answers[0]["ledger"].items()},
    }


def alone_row(case: Case, mbit: float, samples: list[Sample]) -> dict:
    """What one host computes, as a model of one process; all hosts at once, in the rounds of
    `mbit`."""
    return {
        "bench": "alone",
        "name": case.name,
        "k": case.k,
        "mbit": mbit,
        "n_experts": case.model.moe.n_experts,
        "cpu_ms": 1000 * statistics.median(s.mean("cpu") for s in samples),
        "step_ms": statistics.median(s.ms for s in samples),
        "repetitions": [s.ms for s in samples],
    }


def scaling_row(case: Case, mbit: float, hosts: int, samples: list[Sample]) -> dict:
    """A row of the weak scaling; `efficiency` comes later, when all are there."""
    return {
        "bench": "weak",
        "name": case.name,
        "mesh": _mesh(case.mesh),
        "k": case.k,
        "hosts": hosts,
        "mbit": mbit,
        "step_ms": statistics.median(s.ms for s in samples),
        "repetitions": [s.ms for s in samples],
        "wire_bytes": statistics.median(s.mean("sent") for s in samples),
    }


def _mesh(mesh: MeshConfig) -> str:
    return f"dp={mesh.dp}, hp={mesh.hp}, ep={mesh.ep}"


def targets(rows: list[dict]) -> list[dict]:
    """What is demanded of the rows, and what is only said."""
    swept = [r for r in rows if r["bench"] == "sweep"]
    return [*_bytes(swept), *_speed(swept), *_scaling(rows), *_chunks(swept), *_prediction(swept)]


def _bytes(rows: list[dict]) -> list[dict]:
    hp = [r for r in rows if r["name"] == "HP"]
    checks = []
    by_k = {k: statistics.median(r["wire_bytes"] for r in hp if r["k"] == k) for k in _ks(rows)}
    constant = max(by_k.values()) / min(by_k.values()) - 1
    checks.append(common.target("HP: bytes on the wire vary over k by", constant, 0.02, False))
    for k in _ks(rows):
        ratio = statistics.median(
            ep["exchange_wire_bytes"] / _at(rows, "HP", k, ep["mbit"])["exchange_wire_bytes"]
            for ep in rows
            if ep["name"] == "EP" and ep["k"] == k
        )
        name = f"k = {k}: bytes on the wire of EP without dedup over HP, sparse layers, per k"
        checks.append(common.target(name, ratio / k, 0.95, True))
    spread = max(r["spread"] for r in hp)
    checks.append(common.target("HP: largest host over smallest, bytes sent", spread, 0.01, False))
    return checks


def _speed(rows: list[dict]) -> list[dict]:
    """Ratios of step times, geometric means over the rates of each half."""
    checks = []
    for k, bound in ((4, 1.61), (8, 1.82)):
        near, far = [], []
        for mbit in {r["mbit"] for r in rows if r["k"] == k}:
            best = best_ep(rows, k, mbit)
            ratio = best["step_ms"] / _at(rows, "HP", k, mbit)["step_ms"]
            (far if best["network_share"] > 0.5 else near).append(ratio)
        name = f"k = {k}: step time of {BEST} over HP"
        if far:
            checks.append(
                common.target(f"{name}, network-bound", statistics.geometric_mean(far), bound, True)
            )
        if near:
            value = statistics.geometric_mean(near)
            checks.append(common.target(f"{name}, compute-bound", value, 0.97, True))
    return checks


def best_ep(rows: list[dict], k: int, mbit: float) -> dict:
    """The flat mixture's fastest row, of all ways in which Expert Parallel travels."""
    flat = [r for r in rows if r["name"].startswith("EP") and (r["k"], r["mbit"]) == (k, mbit)]
    return min(flat, key=lambda r: r["step_ms"])


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Weak scaling rows with the time of one host over theirs."""
    alone = {r["name"]: r["step_ms"] for r in rows if r["bench"] == "weak" and r["hosts"] == 1}
    return [
        r | {"efficiency": alone[r["name"]] / r["step_ms"]} if r["bench"] == "weak" else r
        for r in rows
    ]


def _scaling(rows: list[dict]) -> list[dict]:
    weak = {(r["name"], r["hosts"]): r for r in rows if r["bench"] == "weak"}
    if not weak:
        return []
    hosts = max(h for _, h in weak)
    gain = weak["HP", hosts]["efficiency"] / weak["EP dedup", hosts]["efficiency"]
    name = f"weak scaling to {hosts} hosts: efficiency of HP over EP with dedup"
    return [common.target(name, gain, 1.0, True)]


def _chunks(rows: list[dict]) -> list[dict]:
    """What `mesh.chunks=0` chooses against the other of 1 and 2, where links are limited: 2 for an
    all-to-all on ep between hosts, 1 for heads alone."""
    checks = []
    limited = [r for r in rows if r["mbit"]]
    for name in ("EP dedup", "HP×EP", "HP"):
        ratios = [
            r["step_ms"] / _at(limited, f"{name}, 2 chunks", r["k"], r["mbit"])["step_ms"]
            for r in limited
            if r["name"] == name
        ]
        if not ratios:
            continue
        one = statistics.geometric_mean(ratios)
        chosen, value = (1, one) if name == "HP" else (2, 1 / one)
        text = f"mesh.chunks=0, {name}: time of {chosen} over that of {3 - chosen}, limited links"
        checks.append(common.target(text, value, 1.0, False))
    return checks


def _prediction(rows: list[dict]) -> list[dict]:
    errors = [abs(r["ratio"] - 1) for r in rows]
    within = sum(e <= 0.2 for e in errors) / len(errors)
    name = "headway plan: share of steps predicted within 20%"
    return [
        common.target("headway plan: largest error of a step", max(errors), 0.2, False),
        common.target(name, within, 1.0, True),
    ]


def prediction_table(rows: list[dict]) -> str:
    """A line per case: predicted over measured at every rate."""
    swept = [r for r in rows if r["bench"] == "sweep"]
    rates = sorted({r["mbit"] for r in swept}, key=lambda mbit: mbit or float("inf"))
    heads = (f"{mbit:>7g}" if mbit else " no limit" for mbit in reversed(rates))
    lines = [f"predicted / measured     k {''.join(heads)}  Mbit/s"]
    for k in _ks(swept):
        for name in dict.fromkeys(r["name"] for r in swept):
            ratios = [_at(swept, name, k, mbit)["ratio"] for mbit in reversed(rates)]
            cells = "".join(f"{ratio:>{7 if i else 9}.2f}" for i, ratio in enumerate(ratios))
            lines.append(f"{name:<24} {k} {cells}")
    return "\n".join(lines)


def _ks(rows: list[dict]) -> list[int]:
    return sorted({r["k"] for r in rows})


def _at(rows: list[dict], name: str, k: int, mbit: float) -> dict:
    matching = [r for r in rows if (r["name"], r["k"], r["mbit"]) == (name, k, mbit)]
    assert len(matching) == 1, (name, k, mbit)
    return matching[0]
