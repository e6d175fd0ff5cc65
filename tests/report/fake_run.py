"""A run folder of the true schema with plausible numbers, for the report's tests. Made from
formulas, not trained."""

import json
import math
from pathlib import Path

import numpy as np

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig
from headway.report.metrics import load_summary
from headway.report.sinks import JsonlSink

SAMPLES = (
    "\x07e t,sn  eo\nt r(es)a i  t_ o\n   n=e,r  fl s",
    "def se(self, sel = self.\n        self._sel(selt, ret\n    ret in self:\n",
    "def get_name(self, name):\n        if name is not None:\n            return self._name\n        self.name = nam\n",
    'def read(self, size=-1):\n        """Read up to size bytes from the object."""\n'
    "        if size < 0:\n            return self.readall()\n        data = self._sock.recv(size)\n        return data\n",
    'def _parse_header(self, line):\n        """Split a header line into name and value."""\n'
    "        name, sep, value = line.partition(':')\n        if not sep:\n"
    "            raise ValueError(f'invalid header: {line!r}')\n        return name.strip(), value.strip()\n",
)


def make_run(
    folder: Path,
    *,
    steps: int = 600,
    every: int = 5,
    layers: int = 4,
    heads: int = 4,
    experts: int = 16,
    seed: int = 0,
    lr: float = 3e-3,
    floor: float = 1.55,
    sample: str | None = None,
    events: bool = True,
    wire: bool = False,
    text: str = "8c1d3e5f7a9b0c2d",
) -> Path:
    """Write run.json and metrics.jsonl; `layers=0` makes a dense run, `text` is the fingerprint of
    its validation. Returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(
        recipe="demo",
        model=ModelConfig(
            vocab_size=320,
            n_layers=max(layers, 1),
            d_model=256,
            n_heads=4,
            moe=MoEConfig(
                kind="multi_head_latent" if layers else "dense",
                n_experts=experts,
                n_heads=heads,
                d_expert=128,
                d_shared=256,
            ),
        ),
        data=DataConfig(seq_len=256, batch_size=16),
        optim=OptimConfig(name="muon", steps=steps, lr=lr, schedule="wsd", warmup=0.05),
        run=RunConfig(
            dir=f"runs/{folder.name}", log_every=every, eval_every=max(1, steps // 10), seed=seed
        ),
    )
    info = {
        "config": config.to_dict(),
        "recipe_source": 'def demo() -> Config:\n    """A small model of Python code."""\n    return Config(recipe="demo")\n',
        "derived": {
            "model.vocab_size": "320 = 257 ids of the byte tokenizer, rounded up to a multiple of 64",
            "moe.d_latent": "256 = d_model",
        },
        "commit": "3f9c1d2a7b6e4c58901234567890abcdef123456",
        "dirty": seed % 2 == 1,
        "versions": {
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "numpy": "2.4.6",
            "safetensors": "0.8.0",
            "headway": "0.1.0",
        },
        "machine": {
            "cpu": "AMD EPYC",
            "cores": 2,
            "memory_gib": 23.4,
            "cpu_capability": "AVX2",
            "gpu": None,
            "gpus": 0,
        },
        "parameters": {"total": 9_482_240, "active": 3_190_784},
        "validation": {
            "windows": 128,
            "fingerprint": text,
            "sentence": "128 of 3,022 windows of 256 tokens of stdlib",
        },
    }
    (folder / "run.json").write_text(json.dumps(info, indent=1))
    taste = np.exp(
        rng.normal(0, 0.9, (layers, heads, experts))
    )  # how uneven the routers are at first
    per_step = config.data.batch_size * config.data.seq_len
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    with JsonlSink(folder / "metrics.jsonl") as sink:
        seconds, skipped = 0.0, 0
        for step in range(every, steps + 1, every):
            t = step / steps
            speed = 15_000 * (1 + 0.04 * rng.normal()) * (0.6 if step == every else 1)
            seconds += every * per_step / speed
            common = {"step": step, "tokens": step * per_step, "seconds": seconds}
            bits = (
                floor
                + 6.4 * math.exp(-18 * t)
                + 1.3 * math.exp(-3.2 * t)
                + 0.05 * rng.normal() * (1.2 - t)
            )
            bad = events and abs(t - 0.42) < every / steps / 2
            if bad:
                skipped += 1
                sink.write(
                    {
                        "step": step - 2,
                        "event": "skipped",
                        "detail": "loss is nan; update not applied",
                    }
                )
            record = common | {
                "loss": math.nan if bad else bits * math.log(2),
                "bits_per_byte": math.nan if bad else bits,
                "lr": lr * min(1, t / 0.05) * (1 if t < 0.7 else 1 - math.sqrt((t - 0.7) / 0.3)),
                "grad_norm": math.nan
                if bad
                else math.exp(-0.7 + 1.6 * math.exp(-12 * t) + 0.22 * rng.normal()),
                "tokens_per_second": speed,
                "flops_per_second": speed * 2.06e7,
                "memory_gib": 0.61 + 0.2 * min(1, 8 * t),
                "skipped": skipped,
            }
            if layers:
                uneven = 0.12 + 0.88 * math.exp(-5 * t)
                load = taste**uneven * np.exp(0.06 * rng.normal(size=taste.shape))
                load[load < 0.22] = 0.0
                load *= experts / load.sum(-1, keepdims=True)
                depth = np.arange(layers) / max(1, layers - 1)
                entropy = (
                    0.97
                    - (0.28 + 0.2 * depth) * (1 - math.exp(-4 * t))
                    + 0.006 * rng.normal(size=layers)
                )
                record |= load_summary(load) | {
                    "balance_loss": 0.01 * (1 + 0.4 * uneven + 0.01 * rng.normal()),
                    "entropy": entropy,
                    "load": load,
                }
            if wire:
                record |= {
                    "wire_bytes": 6.1e6 * (1 + 0.02 * rng.normal()),
                    "wire_expected": 6.0e6,
                    "wire_wait": 0.25 + 0.03 * rng.normal(),
                    "wire_layers": {
                        "layer": list(range(layers)),
                        "bytes": [6.1e6 / layers + i for i in range(layers)],
                        "expected": [6.0e6 / layers] * layers,
                        "weights": [0.0] * layers,
                        "wait": [0.01 * (i + 1) for i in range(layers)],
                    },
                }
            sink.write(record)
            if step % config.run.eval_every == 0 or step == steps:
                val = floor + 0.06 + 6.4 * math.exp(-18 * t) + 1.3 * math.exp(-3.2 * t)
                n = 30 if step == steps else 40
                bins = {"n": [n, 1200], "confidence": [0.25, 0.875], "right": [0.5, 0.75]}
                losses = {"val_loss": val * math.log(2), "val_bits_per_byte": val}
                reliable = {"val_calibration_error": 0.125, "reliability": bins}
                sink.write(common | losses | reliable)
                text = sample or SAMPLES[min(int(5 * t), 4)]
                sink.write(common | {"prompt": "def ", "sample": text})
            if events and abs(t - 0.6) < every / steps / 2:
                sink.write(
                    {
                        "step": step,
                        "event": "interrupted",
                        "detail": "SIGINT; saved checkpoints/step-000360",
                    }
                )
                sink.write(
                    {"step": step, "event": "resumed", "detail": "from checkpoints/step-000360"}
                )
    return folder
