"""The config of a `headway` model for Hugging Face Transformers (≥ 5.0)."""

from transformers import PretrainedConfig

ROTARY = {
    "rotary_dim": 0,
    "interleaved": False,
    "scaling": "none",
    "factor": 1.0,
    "original_max_len": 0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": 0.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
}
"""Rotary embedding by default, as `rope_parameters` of Transformers; 0 is not given."""


class HeadwayConfig(PretrainedConfig):
    """A decoder-only transformer with dense and sparse feed-forward layers, as `headway` trains it.

    Args:
        vocab_size, hidden_size, num_hidden_layers: V, D, blocks.
        num_attention_heads, num_key_value_heads, head_dim: N, M, d of attention.
        qk_norm: RMSNorm on queries and keys: `head`, of each; `all`, of all together; `none`.
        clip_qkv: clamps queries, keys and values, after QK-norm and before RoPE; 0 is off.
        qkv_bias, o_bias: biases on the projections of attention.
        attn_gate: a sigmoid gate per head on the output of attention.
        attention_sinks: one more score per head, which takes weight and gives nothing. Computed by
            eager attention, whatever the implementation.
        windows: attention window of each block in tokens, itself included; 0 is full attention.
        rope_theta, rms_norm_eps, initializer_range: as in Llama.
        rotary: `rotary_dim` (dims of a head that are rotated; 0 is all), `interleaved`, `scaling`
            (`none`, `linear`, `llama3` or `yarn`) and what it reads: see `ROTARY`.
        max_position_embeddings: tokens of the sequences in training; no table has this size.
        final_logit_softcapping: bounds the logits, cap·tanh(logits/cap); None is off, since
            engines would divide by 0.
        intermediate_size, activation: hidden width of dense layers; `swiglu`,
            `swiglu_clamped`, `relu2` or `gelu`.
        moe_kind: `dense` (no sparse layers), `moe`, `latent` or `multi_head_latent`.
        mlp_only_layers: blocks with a dense layer, from 0.
        moe_num_heads, moe_latent_size: H, and D_L = H·L; a flat mixture has H = 1 and D_L = D.
        moe_latent_norm: RMSNorm per head on the sub-tokens.
        moe_projection: `learned`, or `none` where sub-tokens are slices of the token.
        num_experts, num_zero_experts, num_experts_per_tok: E and Z per head, and K.
        moe_intermediate_size, moe_activation: F, and the activation of all experts.
        moe_expert_bias: biases on both products of the routed experts.
        shared_expert_intermediate_size: hidden width of the shared expert; 0 is none.
        shared_expert_gate: multiply its output by a sigmoid of the token.
        scoring_func: `topk_softmax`, `softmax_topk` or `sigmoid`.
        norm_topk_prob, routed_scaling_factor: divide the K gates by their sum; multiply them.
        router_reads: `token` (width D), or `sub_token` (width L).
        router_bias: a bias per expert on the scores, part of selection and gates alike.
        router_groups: groups of experts, how many of them, the best, are chosen from, and by how
            many of its best scores a group is judged."""

    model_type = "headway"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=None,
        head_dim=None,
        qk_norm="head",
        clip_qkv=0.0,
        qkv_bias=False,
        o_bias=False,
        attn_gate=False,
        attention_sinks=False,
        windows=None,
        rope_theta=10_000.0,
        rotary=None,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        max_position_embeddings=2048,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        intermediate_size=128,
        activation="swiglu",
        moe_kind="multi_head_latent",
        mlp_only_layers=(),
        moe_num_heads=2,
        moe_latent_size=None,
        moe_latent_norm=True,
        moe_projection="learned",
        num_experts=4,
        num_zero_experts=0,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_activation="swiglu",
        moe_expert_bias=False,
        shared_expert_intermediate_size=0,
        shared_expert_gate=False,
        scoring_func="topk_softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        router_reads="sub_token",
        router_bias=False,
        router_groups=(1, 1, 1),
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qk_norm = qk_norm
        self.clip_qkv = clip_qkv
        self.qkv_bias = qkv_bias
        self.o_bias = o_bias
        self.attn_gate = attn_gate
        self.attention_sinks = attention_sinks
        self.windows = list(windows or [0] * num_hidden_layers)
        self.rope_theta = rope_theta
        self.rotary = {**ROTARY, **(rotary or {})}
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.final_logit_softcapping = final_logit_softcapping
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.moe_kind = moe_kind
        self.mlp_only_layers = list(mlp_only_layers)
        self.moe_num_heads = moe_num_heads
        self.moe_latent_size = moe_latent_size or hidden_size
        self.moe_latent_norm = moe_latent_norm
        self.moe_projection = moe_projection
        self.num_experts = num_experts
        self.num_zero_experts = num_zero_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.moe_activation = moe_activation
        self.moe_expert_bias = moe_expert_bias
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.router_reads = router_reads
        self.router_bias = router_bias
        self.router_groups = list(router_groups)
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        widths = set(self.windows) - {0}
        if len(widths) == 1:  # the names by which caches and engines know windows of one width
            self.sliding_window = widths.pop()
            self.layer_types = [
                "sliding_attention" if window else "full_attention" for window in self.windows
            ]
        kwargs = {k: v for k, v in kwargs.items() if k not in ("sliding_window", "layer_types")}
        super().__init__(**kwargs)


__all__ = ["HeadwayConfig"]
