"""Mixtures of five languages, one of which a model never sees, and what it can do in each.

Sums without carry (`world:sums`) in languages of the same meaning, which differ in their words, or
in their word order too; and the pages of LibreOffice's help in five natural languages."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from headway import recipes
from headway.config import Config, EngineConfig, with_leaf
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.worlds.source import WorldSource
from headway.eval.bits_per_byte import evaluate
from headway.eval.pass_at_k import Samples, covered, pass_at_k
from headway.hub.load import LoadedModel, load_model
from headway.lab.rows import Row
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams

SHARES = {"88.9%": 0.889, "10%": 0.1, "1%": 0.01, "0.1%": 0.001, "0%": 0.0}
"""Of a mixture, by their names."""
HELP = ("en-gb", "de", "es", "hu", "fi")
LETTERS = ("a", "b", "c", "d", "e")
WORDS, ORDERS = ("words (a)",), ("order (a)",)
PAGES = tuple(f"help ({language})" for language in HELP)
"""Texts, named by the language that has most."""
PROBLEMS, SAMPLES = 32, 256
SUMS: dict[str, Any] = {
    **{"model.qk_norm": "none", "model.rope_theta": 100.0, "optim.muon_lr": 0.01},
    **{"data.batch_size": 128, "data.seq_len": 16, "optim.warmup_steps": 50},
}
TEXT: dict[str, Any] = {"data.batch_size": 16, "data.seq_len": 256, "optim.warmup_steps": 20}


def by_share(first: int) -> dict[str, int]:
    """Return share → number of the language that has it, where `first` has most."""
    return {share: (first + i) % len(SHARES) for i, share in enumerate(SHARES)}


def config(specs: Sequence[str], first: int, sizes: Mapping[str, Any]) -> Config:
    """Return two dense layers of width 64 on a mixture; a language without share is no source."""
    seen = {specs[i]: SHARES[share] for share, i in by_share(first).items() if SHARES[share]}
    values = recipes.load("dense")
    for name, value in {
        **{"model.n_layers": 2, "model.d_model": 64, "model.d_ff": 128, "model.n_heads": 4},
        **{"data.source": tuple(seen), "data.weights": tuple(seen.values()), **sizes},
    }.items():
        values = with_leaf(values, name, value)
    return values


def sums(order: str, first: int) -> Config:
    """Return the config of sums of five digits below five; `order` is the option of the world."""
    world = f"world:sums,length=5,base=5,order={order},languages={len(LETTERS)}"
    return config([f"{world},language={i}" for i in range(len(LETTERS))], first, SUMS)


def texts(first: int) -> Config:
    """Return the config of pages of help."""
    return config([f"set:help:{language}" for language in HELP], first, TEXT)


def scores(folder: Path) -> Mapping[str, float]:
    """Return what a run can do in each language, also in the one it has not seen."""
    loaded = load_model(folder, "cpu", "float32", 1)
    return of_sums(loaded) if loaded.config.data.worlds else of_texts(loaded)


def of_texts(loaded: LoadedModel) -> dict[str, float]:
    """Return bits per byte of the validation split of each language."""
    known = {f"set:help:{language}": language for language in HELP}
    if not set(known) & set(loaded.config.data.source):  # a quick run, which reads no help
        known = {spec: spec for spec in loaded.config.data.source}
    return {f"bits/byte, {name}": _bits(loaded, spec) for spec, name in known.items()}


def _bits(loaded: LoadedModel, spec: str) -> float:
    data = dataclasses.replace(loaded.config.data, source=(spec,), weights=())
    stream = Stream(prepare(data, loaded.tokenizer, lambda line: None), data, 0)
    windows = min(100, stream.n_val_windows)
    return evaluate(loaded.model, stream, windows, 20).val_bits_per_byte


def of_sums(loaded: LoadedModel) -> dict[str, float]:
    """Return pass@1, pass@256 and Cover@0.5 of test problems in each language, by its share, and
    pass@256 where the language has none and the answer may be in any."""
    opened = WorldSource.open(loaded.config.data.source[0], loaded.tokenizer)
    world: Any = opened.world
    index_P, n = np.arange(PROBLEMS, dtype=np.uint64), world.length
    sources = [
        dataclasses.replace(opened, world=dataclasses.replace(world, language=i))
        for i in range(len(LETTERS))
    ]
    rows = [source.rows("test", index_P, world.n_tokens) for source in sources]
    answers_LPn = np.stack([row.targets_BS[:, -n:] for row in rows])
    engine = Engine.of(loaded, EngineConfig(max_len=4 * n, max_requests=SAMPLES))
    results: dict[str, float] = {}
    for share, language in by_share(world.language).items():  # the first source has most
        right_LP = np.zeros((len(LETTERS), PROBLEMS), dtype=np.int64)
        for problem in range(PROBLEMS):
            prompt = rows[language].tokens_BS[problem, : 2 * n + 2].tolist()
            # a seed for each problem: else all would draw by the same numbers
            params = SamplingParams(max_tokens=n, n=SAMPLES, seed=problem, ignore_eos=True)
            (said,) = engine.generate([prompt], params)
            said_Sn = np.array([completion.tokens for completion in said])
            right_LP[:, problem] = (said_Sn == answers_LPn[:, problem, None]).all(2).sum(1)
        tries_P = np.full(PROBLEMS, SAMPLES)
        samples = Samples(tries_P, right_LP[language])
        results[f"pass@1, {share}"] = float(pass_at_k(samples, 1).mean())
        results[f"pass@256, {share}"] = float(pass_at_k(samples, 256).mean())
        results[f"cover@0.5, {share}"] = float(covered(samples, 0.5).mean())
        if not SHARES[share]:
            anyhow = Samples(tries_P, right_LP.sum(0))
            results["pass@256 in any, 0%"] = float(pass_at_k(anyhow, 256).mean())
    return results


def of(rows: Sequence[Row], name: str) -> list[float]:
    """Return a score of each run on sums."""
    return [row["scores"][name] for row in rows if name in row["scores"]]


def said(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in sorted(values))


def by_text(rows: Sequence[Row]) -> list[Row]:
    """Return the scores of sums by kind of text and share: mean, least and most of the runs."""
    table = []
    for kind, corpora in (("words", WORDS), ("words and order", ORDERS)):
        chosen = [row for row in rows if row["corpus"] in corpora and row["scores"]]
        for share in SHARES if chosen else ():
            row: Row = {"languages differ in": kind, "share": share, "runs": len(chosen)}
            for name in ("pass@1", "pass@256", "cover@0.5"):
                x = of(chosen, f"{name}, {share}")
                row[name] = f"{mean(x):.3f} ({min(x):.3f} … {max(x):.3f})"
            table.append(row)
    return table


def by_language(rows: Sequence[Row]) -> list[Row]:
    """Return bits per byte of each natural language by its share, the mean over seeds."""
    table = []
    for number, language in enumerate(HELP):
        row: Row = {"language": language}
        for share in reversed(SHARES):
            first = next(i for i in range(len(HELP)) if by_share(i)[share] == number)
            runs = [r["scores"] for r in rows if r["corpus"] == PAGES[first] and r["scores"]]
            name = f"bits/byte, {language}"
            row[share] = mean(run[name] for run in runs) if runs else None
        table.append(row)
    return table if any(row[share] for row in table for share in SHARES) else []
