"""Qwen3 (arXiv 2505.09388), dense: Llama with QK-norm per head."""

from headway.hub.decoder import SILU, decoder_keys
from headway.hub.families.llama import LLAMA
from headway.hub.family import Family, Key, Keys, Values, lookup


def _read_windows(values: Values) -> Values:
    """Layers from `max_window_layers` on have windows, unless `layer_types` says which do."""
    n, width = lookup(values, "num_hidden_layers"), lookup(values, "sliding_window", 4096)
    if not lookup(values, "use_sliding_window", False):
        return {"window": []}
    first = lookup(values, "max_window_layers", 28)
    plain = ["full_attention"] * first + ["sliding_attention"] * (n - first)
    kinds = lookup(values, "layer_types", plain[:n])
    return {"window": [width if kind == "sliding_attention" else 0 for kind in kinds]}


def _write_windows(ours: Values) -> Values:
    n, window = ours["n_layers"], ours["window"]
    widths = [window[i % len(window)] if window else 0 for i in range(n)]
    return {
        "use_sliding_window": any(widths),
        "sliding_window": max(widths) or None,
        "max_window_layers": n,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in widths],
    }


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(
        *decoder_keys(max_len=32_768),
        Key("head_dim", "d_head", 128),
        Key("intermediate_size", "d_ff"),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "o_bias", False),
        Keys(
            "use_sliding_window sliding_window max_window_layers layer_types",
            _read_windows,
            _write_windows,
        ),
    ),
    rows=LLAMA.rows,
    fixed={"qk_norm": "head", "moe.kind": "dense"},
)
