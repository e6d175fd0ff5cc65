"""The `headway` model for Hugging Face Transformers (≥ 5.0): headway/model in three files. (The
experts are in this one, since Transformers looks for their decorator here.)

B sequences · S positions · T = B·S tokens · D model width · N query heads · M key/value heads · d
width of one · H heads of a sparse layer · L width of one (D_L = H·L) · E experts per head · Z
choices that do nothing · K chosen · F hidden width · G pre-activations per hidden unit (2 for
SwiGLU: gate, then up) · V vocabulary. A flat mixture of experts has H = 1 and L = D."""

import inspect
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention_headway import Attention, rope_tables
from .configuration_headway import HeadwayConfig
from .layers_headway import FeedForward, RMSNorm, StaysFloat32, activate, n_inputs, widen


class Router(StaysFloat32):
    """One linear router per head; scores, selection and gates in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: HeadwayConfig):
        super().__init__()
        H, D = config.moe_num_heads, config.hidden_size
        width = D if config.router_reads == "token" else config.moe_latent_size // H
        self.top_k, self.n_experts = config.num_experts_per_tok, config.num_experts
        self.scoring_func, self.norm_topk_prob = config.scoring_func, config.norm_topk_prob
        self.scale, self.groups = config.routed_scaling_factor, config.router_groups
        choices = config.num_experts + config.num_zero_experts
        self.weight = nn.Parameter(torch.empty(H, choices, width))
        self.bias = nn.Parameter(torch.zeros(H, choices)) if config.router_bias else None
        # added to the scores for selection only
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(H, choices, dtype=torch.float32)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route `[T, H, L]` sub-tokens, or `[T, D]` tokens that all heads read; return which of
        the head's E experts, int64 `[T, H, K]`, best first, ties to the lowest index, and gates."""
        heads = "thl,hel->the" if x.dim() == 3 else "tl,hel->the"
        logits_THE = torch.einsum(heads, widen(x), widen(self.weight).to(widen(x).dtype))
        if self.bias is not None:
            logits_THE = logits_THE + self.bias
        sigmoid = self.scoring_func == "sigmoid"
        score_THE = torch.sigmoid(logits_THE) if sigmoid else logits_THE
        biased_THE = (score_THE + self.e_score_correction_bias).detach()
        if self.groups[0] > 1:
            biased_THE = in_best_groups(biased_THE, *self.groups)
        index_THK = torch.sort(biased_THE, dim=-1, descending=True, stable=True).indices[
            ..., : self.top_k
        ]
        match self.scoring_func:
            case "topk_softmax":
                gate_THK = torch.softmax(logits_THE.gather(-1, index_THK), dim=-1)
            case "softmax_topk":
                gate_THK = torch.softmax(logits_THE, dim=-1).gather(-1, index_THK)
            case _:
                gate_THK = score_THE.gather(-1, index_THK)
        if self.norm_topk_prob:
            gate_THK = gate_THK / gate_THK.sum(-1, keepdim=True).clamp(min=1e-20)
        nothing = index_THK >= self.n_experts
        gate_THK = torch.where(nothing, 0, gate_THK * self.scale)
        return index_THK.clamp(max=self.n_experts - 1), gate_THK


def in_best_groups(score_THE: Tensor, n: int, n_best: int, n_scores: int) -> Tensor:
    """Return the scores of the experts in the `n_best` best of n equal groups, −∞ for the others; a
    group is as good as the sum of its `n_scores` largest scores, ties to the lowest index."""
    score_THGE = score_THE.unflatten(-1, (n, -1))
    quality_THG = score_THGE.topk(n_scores, dim=-1).values.sum(-1)
    order_THG = torch.sort(quality_THG, dim=-1, descending=True, stable=True).indices
    outside_THG = torch.ones_like(quality_THG, dtype=torch.bool)
    outside_THG = outside_THG.scatter(-1, order_THG[..., :n_best], False)
    return score_THGE.masked_fill(outside_THG.unsqueeze(-1), -torch.inf).flatten(-2)


@use_experts_implementation
class Experts(nn.Module):
    """y = Σ_k gate_k · down[e_k] act(gate_up[e_k]·x): the experts of all heads, one stack; expert e
    of head h is number h·E + e."""

    def __init__(self, config: HeadwayConfig):
        super().__init__()
        H, F_ = config.moe_num_heads, config.moe_intermediate_size
        L, self.activation = config.moe_latent_size // H, config.moe_activation
        self.num_experts = H * config.num_experts
        inputs = n_inputs(self.activation) * F_
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, inputs, L))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, L, F_))
        self.gate_up_proj_bias = self.down_proj_bias = None
        if config.moe_expert_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(self.num_experts, inputs))
            self.down_proj_bias = nn.Parameter(torch.zeros(self.num_experts, L))

    def _apply_gate(self, pre: Tensor) -> Tensor:
        """Return what every experts implementation of Transformers puts between the products."""
        return activate(pre, self.activation)

    def forward(self, x_NL: Tensor, index_NK: Tensor, gate_NK: Tensor) -> Tensor:
        y_NL = torch.zeros_like(x_NL, dtype=gate_NK.dtype)
        for expert in index_NK.unique().tolist():
            row, slot = torch.where(index_NK == expert)
            b_in = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert]
            b_out = None if self.down_proj_bias is None else self.down_proj_bias[expert]
            hidden = self._apply_gate(F.linear(x_NL[row], self.gate_up_proj[expert], b_in))
            out = F.linear(hidden, self.down_proj[expert], b_out) * gate_NK[row, slot].unsqueeze(-1)
            y_NL = y_NL.index_add(0, row, out)
        return y_NL.to(x_NL.dtype)


@use_experts_implementation(has_bias=True)
class BiasedExperts(Experts):
    """Experts with `moe_expert_bias`: a bias on each of the two products."""


class SparseLayer(nn.Module):
    """A sparse layer: split, router, experts, merge. The stack is not called `experts`, since vLLM
    replaces what has that name by experts of width D."""

    def __init__(self, config: HeadwayConfig):
        super().__init__()
        D, self.n_heads = config.hidden_size, config.moe_num_heads
        d_latent, latent = config.moe_latent_size, config.moe_kind != "moe"
        projects = latent and config.moe_projection == "learned"
        self.reads_token = config.router_reads == "token"
        self.in_proj = nn.Linear(D, d_latent, bias=False) if projects else None
        norm = RMSNorm(self.n_heads, d_latent // self.n_heads, eps=config.rms_norm_eps)
        self.norm = norm if latent and config.moe_latent_norm else None
        self.router = Router(config)
        self.head_experts = (BiasedExperts if config.moe_expert_bias else Experts)(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = FeedForward(D, shared, config.moe_activation) if shared else None
        gated = config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if gated else None
        self.out_proj = nn.Linear(d_latent, D, bias=False) if projects else None

    def split(self, x_TD: Tensor) -> Tensor:
        """Map `[T, D]` to sub-tokens `[T, H, L]`; in a flat MoE the token itself, H = 1."""
        z_TL = x_TD if self.in_proj is None else self.in_proj(x_TD)
        z_THL = z_TL.unflatten(-1, (self.n_heads, -1))
        return z_THL if self.norm is None else self.norm(z_THL)

    def merge(self, y_THL: Tensor) -> Tensor:
        """Map `[T, H, L]` to `[T, D]`."""
        return y_THL.flatten(1) if self.out_proj is None else self.out_proj(y_THL.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        z_THL = self.split(x_TD)
        index_THK, gate_THK = self.router(x_TD if self.reads_token else z_THL)
        first_H1 = torch.arange(self.n_heads, device=x.device).unsqueeze(1) * self.router.n_experts
        routed = (index_THK + first_H1).flatten(0, 1), gate_THK.flatten(0, 1)
        y_TD = self.merge(self.head_experts(z_THL.flatten(0, 1), *routed).view_as(z_THL))
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x)


class Block(GradientCheckpointingLayer):
    """A branch with attention, then a branch with a feed-forward layer, each behind a norm."""

    def __init__(self, config: HeadwayConfig, layer: int):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps=eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps=eps)
        dense = config.moe_kind == "dense" or layer in config.mlp_only_layers
        ffn = FeedForward(D, config.intermediate_size, config.activation) if dense else None
        self.mlp = SparseLayer(config) if ffn is None else ffn

    def forward(self, x_BSD: Tensor, tables: tuple, mask, held, **kwargs) -> tuple[Tensor, Tensor]:
        y_BSD, weights = self.self_attn(self.input_layernorm(x_BSD), tables, mask, held, **kwargs)
        x_BSD = x_BSD + y_BSD
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), weights


class HeadwayPreTrainedModel(PreTrainedModel):
    """What Transformers asks of a family."""

    config_class = HeadwayConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router", "norm"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Router | Experts):
            for weight in module.parameters(recurse=False):  # biases are matrices
                nn.init.normal_(weight, std=self.config.initializer_range * (weight.dim() > 2))

    def _grouped_mm_can_dispatch(self) -> bool:
        """`grouped_mm` takes rows of whole 16 bytes; without them `eager` is the default."""
        c = self.config
        for width in (c.moe_latent_size // c.moe_num_heads, c.moe_intermediate_size):
            if width % 8 and c.moe_kind != "dense":
                raise ValueError(
                    f"grouped_mm needs expert widths that 8 divides, and one is {width}; "
                    "use experts_implementation='eager' or 'batched_mm'"
                )
        return super()._grouped_mm_can_dispatch()


class HeadwayModel(HeadwayPreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config: HeadwayConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,  # what `past_key_values` is called from Transformers 5.24 on
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the normed stream `[B, S, D]` of `input_ids` `[B, S]`, or of their embeddings."""
        c, cache = self.config, past_key_values if cache is None else cache
        wants_states = kwargs.pop("output_hidden_states", c.output_hidden_states)
        wants_weights = kwargs.pop("output_attentions", c.output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (c.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=c)
        start = 0 if cache is None else cache.get_seq_length()
        index = torch.arange(start, start + x_BSD.shape[1], device=x_BSD.device)
        position_ids = index.unsqueeze(0) if position_ids is None else position_ids
        masks = self._masks(x_BSD, attention_mask, cache, position_ids, index)
        tables = rope_tables(position_ids, c, x_BSD.dtype)
        states, weights = [], []
        kwargs["position_ids"] = position_ids
        for block, window in zip(self.layers, c.windows, strict=True):
            states += [x_BSD] if wants_states else []
            x_BSD, w = block(x_BSD, tables, masks[window], cache, **kwargs)
            weights += [w] if wants_weights else []
        x_BSD = self.norm(x_BSD)
        states = (*states, x_BSD) if wants_states else None
        weights = tuple(weights) if wants_weights else None
        return BaseModelOutputWithPast(x_BSD, cache, states, weights)

    def _masks(self, x_BSD, attention_mask, cache, position_ids, index) -> dict:
        """Return window → mask, in the form that the attention implementation reads."""
        known = inspect.signature(create_causal_mask).parameters
        how = {"cache" if "cache" in known else "past_key_values": cache}
        how["position_ids"] = position_ids
        if "cache_position" in known:  # before 5.3
            how["cache_position"] = index
        masks = {}
        for window in set(self.config.windows):
            config = copy(self.config)
            config.sliding_window = window or None
            if config.attention_sinks:
                config._attn_implementation = "eager"  # whose masks are added to the scores
            make = create_sliding_window_causal_mask if window else create_causal_mask
            masks[window] = make(config, x_BSD, attention_mask=attention_mask, **how)
        return masks


class HeadwayForCausalLM(HeadwayPreTrainedModel, GenerationMixin):
    """The model with its output head: logits of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HeadwayConfig):
        super().__init__(config)
        self.model = HeadwayModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return float32 logits `[B, S, V]`, or of the last `logits_to_keep` positions; with
        `labels` `[B, S]` (−100 is ignored) the mean cross-entropy of the next token too."""
        cache = past_key_values if cache is None else cache
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        out = self.model(*given, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = widen(self.lm_head(out.last_hidden_state[:, keep]))
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap) if cap else logits
        loss = None
        if labels is not None:  # attention and loss take from kwargs what they know
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        cache = out["cache"] if "cache" in out else out.get("past_key_values")
        return CausalLMOutputWithPast(loss, logits, cache, out.hidden_states, out.attentions)


__all__ = ["HeadwayForCausalLM", "HeadwayModel", "HeadwayPreTrainedModel"]
