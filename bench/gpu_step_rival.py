"""A whole training step of Transformers' OLMoE, as a rival of Headway's on one GPU.

Grouped matmuls for the experts, scaled_dot_product_attention, fused AdamW, matmuls in bfloat16:
the fastest that Transformers offers without kernels from elsewhere. The model is that of
bench/cpu_step.py.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bench.cpu_step import build_peer
from headway.config import ModelConfig

Weights = Literal["masters", "bfloat16", "float32"]


def rival_step(
    model: ModelConfig,
    tokens_BS: Tensor,
    device: torch.device | str,
    weights: Weights = "masters",
    implementation: str = "grouped_mm",
    balance: bool = False,
    clip: float = 1.0,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """Build the model; every call is forward with the loss, backward and one step of AdamW on the
    same tokens, and returns the loss without waiting for the device.

    Args:
        model: vocab_size, d_model, n_layers, n_heads, n_kv_heads and the n_experts, top_k and
            d_expert of `moe` are taken (`kind` is flat MoE here).
        tokens_BS: int64; the labels are the tokens, shifted inside.
        weights: `masters`: a bfloat16 model, and float32 copies that the optimiser works on, with
            float32 gradients and moments (20 bytes per parameter). `bfloat16`: everything in
            bfloat16 (8 bytes). `float32`: matmuls in float32 (16 bytes), to test.
        implementation: of the experts: `grouped_mm`, `batched_mm` or `eager`.
        balance: compute the balance loss of all layers too.
        clip: bound of the global gradient norm; 0 leaves clipping out.
        compiled: torch.compile the model.

    Errors: UsageError without transformers; RuntimeError where F.grouped_mm cannot take the number
    of experts (at most 1023 on CUDA).
    """
    torch.manual_seed(0)
    narrow = torch.float32 if weights == "float32" else torch.bfloat16
    with torch.device(device):
        peer = build_peer(model, implementation, narrow, tokens_BS.shape[1], balance)
    peer.train()
    tokens_BS = tokens_BS.to(device)
    own: list[Tensor] = [p for p in peer.parameters() if p.requires_grad]
    trained = own
    if weights == "masters":
        trained = [p.detach().float().requires_grad_() for p in own]
        for master in trained:
            master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(peer) if compiled else peer

    def step() -> Tensor:
        loss = run(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        if trained is not own:
            torch._foreach_copy_(_gradients(trained), _gradients(own))
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        if trained is not own:
            with torch.no_grad():
                torch._foreach_copy_(own, trained)
        for p in own:
            p.grad = None
        return loss.detach()

    return step


def _gradients(tensors: list[Tensor]) -> list[Tensor]:
    found = [t.grad for t in tensors if t.grad is not None]
    assert len(found) == len(tensors), "every parameter has a gradient"
    return found
