"""The model card of an exported folder: what the run itself recorded, and how to use it."""

import json
from pathlib import Path
from typing import Any

from headway.config import Config
from headway.hub.folder import read_json
from headway.hub.trained import Trained


def model_card(trained: Trained, model_type: str, dtype: str) -> str:
    """Return README.md of an exported model: parameters, tokens, bits per byte, commit, as far as
    its run recorded them, and code that writes text."""
    run_dir, config = trained.folder, trained.config
    info = read_json(run_dir / "run.json")
    origin = f"Trained with Headway, recipe `{config.recipe or '(none)'}`."
    if trained.family:
        origin = f"Converted by Headway; it came as a `{trained.family}` model."
    rows = [("architecture", _architecture(config)), ("dtype of the weights", dtype)]
    if sizes := info.get("parameters"):
        rows.append(("parameters", f"{sizes['total']:,}"))
        rows.append(("active for a token", f"{sizes['active']:,}"))
    rows += _measured(run_dir / "metrics.jsonl")
    if validation := info.get("validation"):
        rows.append(("validation text", validation["sentence"]))
    if commit := info.get("commit"):
        changed = ", with local changes" if info.get("dirty") else ""
        rows.append(("trained at commit", f"`{commit}`{changed}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    tags = "headway" if config.model.moe.kind == "dense" else "headway, mixture-of-experts"
    remote = ", trust_remote_code=True" if model_type == "headway" else ""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {run_dir.absolute().name}

{origin}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder{remote})
model = AutoModelForCausalLM.from_pretrained(folder{remote})
ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```
"""


def _architecture(config: Config) -> str:
    model, moe = config.model, config.model.moe
    size = f"{model.n_layers} layers of width {model.d_model}"
    if moe.kind == "dense":
        return f"dense, {size}"
    name = {"moe": "flat mixture of experts", "latent": "LatentMoE"}.get(
        moe.kind, "Multi-Head LatentMoE"
    )
    heads = f"{moe.n_heads} heads of " if moe.n_heads > 1 else ""
    return f"{name}, {size}, {heads}{moe.n_experts} experts, {moe.top_k} per token"


def _measured(metrics: Path) -> list[tuple[str, str]]:
    """Return the last number of tokens and the last validation loss of a run."""
    last: dict[str, Any] = {}
    if metrics.is_file():
        for line in metrics.read_text("utf-8").splitlines():
            last |= json.loads(line) if line.strip() else {}
    rows = []
    if tokens := last.get("tokens"):
        rows.append(("tokens trained on", f"{tokens:,}"))
    if (bits := last.get("val_bits_per_byte")) is not None:
        rows.append(("bits per byte, validation", f"{bits:.4f}"))
    return rows
