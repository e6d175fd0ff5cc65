"""Routers of published families against Transformers' modules: the same experts, the same gates."""

import pytest
import torch

from headway.config import MoEConfig, RouterConfig
from headway.model.router import Router
from tests.compare import assert_close

transformers = pytest.importorskip("transformers")

E, K, D, T = 16, 4, 32, 200
GROUPS = {"n_group": 4, "topk_group": 2}
OURS = {"n_groups": 4, "top_k_groups": 2}


def olmoe(norm: bool):
    from transformers.models.olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    config = OlmoeConfig(num_experts=E, num_experts_per_tok=K, hidden_size=D, norm_topk_prob=norm)
    return OlmoeTopKRouter(config), RouterConfig(gate="softmax_topk", renormalize=norm)


def mixtral():
    """Softmax over the selected scores equals the renormalised softmax over all."""
    theirs, _ = olmoe(True)
    return theirs, RouterConfig(gate="topk_softmax")


def gpt_oss():
    from transformers.models.gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    config = GptOssConfig(num_local_experts=E, num_experts_per_tok=K, hidden_size=D)
    return GptOssTopKRouter(config), RouterConfig(gate="topk_softmax", logit_bias=True)


def deepseek_v2(method: str):
    from transformers.models.deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = DeepseekV2Config(
        n_routed_experts=E,
        num_experts_per_tok=K,
        hidden_size=D,
        topk_method=method,
        routed_scaling_factor=16.0,
        **GROUPS,
    )
    groups = OURS if method == "group_limited_greedy" else {}
    return DeepseekV2TopkRouter(config), RouterConfig(gate="softmax_topk", scale=16.0, **groups)


def deepseek_v3():
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        n_routed_experts=E, num_experts_per_tok=K, hidden_size=D, norm_topk_prob=True, **GROUPS
    )
    ours = RouterConfig(gate="sigmoid", renormalize=True, scale=2.5, group_best=2, **OURS)
    return DeepseekV3TopkRouter(config), ours


def glm4_moe():
    from transformers.models.glm4_moe import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    config = Glm4MoeConfig(
        n_routed_experts=E,
        num_experts_per_tok=K,
        hidden_size=D,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
    )
    return Glm4MoeTopkRouter(config), RouterConfig(gate="sigmoid", renormalize=True, scale=1.5)


FAMILIES = {
    "olmoe": lambda: olmoe(False),
    "qwen3_moe": lambda: olmoe(True),
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "deepseek_v2": lambda: deepseek_v2("group_limited_greedy"),
    "deepseek_v2_lite": lambda: deepseek_v2("greedy"),
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_transformers(family, packed):
    theirs, config = FAMILIES[family]()
    ours = Router(D, MoEConfig(kind="moe", n_experts=E, top_k=K, router=config)).eval()
    theirs.weight.normal_(std=0.5)
    ours.w_HEL.copy_(theirs.weight[None])
    if config.logit_bias:
        ours.logit_bias_HE.copy_(theirs.bias.normal_()[None])
    if config.gate == "sigmoid":
        ours.bias_HE.copy_(theirs.e_score_correction_bias.normal_(std=0.1)[None])
    if packed:
        ours.pack(torch.float32)
    x = torch.randn(T, D)
    _, gate, index = theirs(x)
    route = ours(x)
    index, order = index.sort(-1)
    index_TK, own_order = route.index_THK[:, 0].sort(-1)
    assert torch.equal(index_TK, index)
    assert_close(route.gate_THK[:, 0].gather(-1, own_order), gate.gather(-1, order), 1e-6)
