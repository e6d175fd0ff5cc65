"""`headway describe`: what a config costs, as numbers and as text, each line with its formula."""

from dataclasses import replace
from typing import Any

from headway.config import Config, UsageError
from headway.model.build import BlockBuilder, build_block
from headway.plan.cost import model_costs, total
from headway.plan.layout import MeshLayout
from headway.plan.memory import states
from headway.plan.traffic import traffic_per_token

TYPICAL_VOCAB = 320
"""The byte tokenizer's 257 rounded up to a multiple of 64; used when neither config nor caller
names a size."""


def with_vocab(config: Config, vocab_size: int = 0) -> Config:
    """Return the config with a vocabulary: its own, else `vocab_size` rounded up to a multiple of
    64, else that of bytes."""
    if config.model.vocab_size:
        return config
    rounded = -(-vocab_size // 64) * 64 or TYPICAL_VOCAB
    return replace(config, model=replace(config.model, vocab_size=rounded))


def describe(
    config: Config, n_ranks: int = 8, bytes_per_value: int = 4, blocks: BlockBuilder = build_block
) -> dict[str, Any]:
    """Return all costs of a valid config, JSON-ready: groups of `{name: {value, formula}}` and
    their totals.

    `bytes_per_value` is of the matmuls: 4 for float32, 2 for bfloat16. Traffic is always that of
    bfloat16. `blocks` builds blocks with modules of your own, as in `Transformer`."""
    if n_ranks < 2:
        raise UsageError(f"--P {n_ranks} ranks send nothing; use 2 or more")
    data = config.data
    costs = model_costs(config, data.micro_batch_size or data.batch_size, bytes_per_value, blocks)
    groups = {
        "parameters": costs.parameters,
        "active_parameters": costs.active,
        "flops_per_token_forward": costs.flops,
        "state_bytes": states(costs, MeshLayout(), config.optim),
        "activation_bytes": costs.saved,
    }
    totals = {name: round(total(items)) for name, items in groups.items()}
    groups["traffic_bytes_per_token_and_layer"] = sent = traffic_per_token(config.model, n_ranks)
    return {
        "recipe": config.recipe,
        "model": summary(config),
        **totals,
        "flops_per_token_training": round(costs.training_flops),
        "traffic_ranks": n_ranks,
        "traffic_bytes_per_token_and_layer": {i.name: round(i.value) for i in sent},
        "items": {
            name: {i.name: {"value": round(i.value), "formula": i.formula} for i in items}
            for name, items in groups.items()
        },
    }


def summary(config: Config) -> str:
    """Return one line on the architecture."""
    m, moe = config.model, config.model.moe
    text = f"{m.n_layers} layers, D {m.d_model}, V {m.vocab_size}, "
    if m.mixer == "mla":
        text += f"{m.n_heads} heads of latent attention, {m.mla.latent_width} values per token"
    else:
        text += f"{m.n_heads} attention heads ({m.kv_heads} key/value) of width {m.head_width}"
    if n_dense := m.n_layers - m.n_sparse:
        text += f"; {n_dense} dense networks, F {m.d_ff}"
    if m.n_sparse:
        kind = {
            "moe": "flat MoE",
            "latent": f"LatentMoE of width {moe.latent_width(m.d_model)}",
            "multi_head_latent": "Multi-Head LatentMoE, "
            f"H {moe.n_heads} × L {moe.head_width(m.d_model)}"
            + ("" if moe.projects else " (slices of the token)"),
        }[moe.kind]
        text += f"; {m.n_sparse} layers of {kind}, E {moe.n_experts}, K {moe.top_k}"
        text += f", F {moe.d_expert}" + (f", shared expert {moe.d_shared}" if moe.d_shared else "")
    return text


def format_description(costs: dict[str, Any], config: Config, derived: dict[str, str]) -> str:
    """Format the result of `describe` as text for people."""
    micro = config.data.micro_batch_size or config.data.batch_size
    lines = [f"{costs['recipe'] or 'config'}: {costs['model']}"]
    lines += [f"  {name} = {sentence}" for name, sentence in derived.items()]
    headings = {
        "parameters": "parameters",
        "active_parameters": "parameters that a token visits",
        "flops_per_token_forward": "FLOPs per token, forward (training: three times)",
        "state_bytes": "bytes of weights, gradients and optimiser",
        "activation_bytes": f"bytes kept for backward, {micro} × {config.data.seq_len} tokens",
    }
    for name, heading in headings.items():
        size = f" ({costs[name] / 2**20:,.1f} MiB)" if name.endswith("bytes") else ""
        lines += ["", f"{heading}: {costs[name]:,}{size}", *_rows(costs["items"][name])]
    ranks = costs["traffic_ranks"]
    sent = costs["items"]["traffic_bytes_per_token_and_layer"]
    if sent:
        lines += ["", f"bytes sent per token and sparse layer in training, P = {ranks}, bfloat16:"]
        lines += _rows(sent)
        heads = config.model.moe.n_heads
        if "Head Parallel" in sent and heads % ranks:
            lines.append(f"  (Head Parallel itself needs P to divide H = {heads})")
    return "\n".join(lines)


def _rows(items: dict[str, dict[str, float | str]]) -> list[str]:
    return [f"  {name:<34} {row['value']:>16,}  {row['formula']}" for name, row in items.items()]
