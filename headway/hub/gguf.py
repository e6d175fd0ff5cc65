"""Write a trained model as one GGUF file, which llama.cpp and what is built on it read."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from headway.config import ModelConfig, UsageError
from headway.hub.export import DTYPES, ExportDtype, Exported, exported_config, exported_family
from headway.hub.export_family import FamilyWeights
from headway.hub.export_tokenizer import PLAIN_TEMPLATE
from headway.hub.family import Family
from headway.hub.gguf_graph import FLOAT32, Graph, graph_of
from headway.hub.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from headway.hub.load import chat_template_of
from headway.hub.new_path import new_path
from headway.hub.trained import Trained
from headway.kernels.rope import rope_frequencies

_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""`general.file_type`: ALL_F32, MOSTLY_F16, MOSTLY_BF16."""


def export_gguf(
    trained: Trained, to: Path, dtype: ExportDtype, family: str = "auto"
) -> tuple[Exported, GgufTokenizer]:
    """Write the file `to`, complete or not at all; return what was written, and the tokenizer that
    llama.cpp will use.

    Raises: UsageError where llama.cpp has no graph that computes the model, which it names; where
    `to` exists or cannot be written; without the extra [gguf]."""
    gguf = _library()
    (chosen, why), model = exported_family(trained, family), exported_config(trained)
    if why:
        raise UsageError(f"no GGUF is written of this model: {why}; use --format hf")
    graph, vocabulary = graph_of(chosen, model), gguf_tokenizer(trained.tokenizer)
    # one more family, whose tensors are read and laid out as those of the others
    layout = Family(f"llama.cpp's {graph.name}", "", (), graph.rows, float32=FLOAT32)
    weights = FamilyWeights(model, trained.weights, layout, DTYPES[dtype])
    with new_path(to) as path:
        writer = gguf.GGUFWriter(path, graph.name)
        try:
            _add_model(writer, graph, model)
            writer.add_name(trained.folder.absolute().name)
            writer.add_file_type(_FILE_TYPES[dtype])
            _add_tokenizer(writer, trained, vocabulary)
            _write_tensors(gguf, writer, graph, model, weights)
        finally:
            writer.close()
    left_out = [name for name in weights.left_out if not name.endswith("router.bias_HE")]
    done = Exported(chosen.name, [to.name], to.stat().st_size, left_out)
    return done, vocabulary


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UsageError(
            "--format gguf needs the gguf library; pip install 'headway[gguf]'"
        ) from None
    return gguf


def _add_model(writer: Any, graph: Graph, c: ModelConfig) -> None:
    moe, sparse = c.moe, c.moe.kind != "dense"
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_len)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(moe.d_expert if sparse else c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_width)
    writer.add_value_length(c.head_width)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_width)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    if c.rope.scaling == "linear":
        writer.add_string(f"{graph.name}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(c.rope.factor)
    if sparse:
        writer.add_expert_count(moe.n_experts)
        writer.add_expert_used_count(moe.top_k)
        writer.add_expert_feed_forward_length(moe.d_expert)
    if sparse and moe.d_shared:
        writer.add_expert_shared_feed_forward_length(moe.d_shared)


def _add_tokenizer(writer: Any, trained: Trained, vocabulary: GgufTokenizer) -> None:
    tokenizer = trained.tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(tokenizer.eos)
    for other in tokenizer.eos_ids[1:]:
        writer.add_eot_token_id(other)
    writer.add_pad_token_id(tokenizer.eos)
    writer.add_add_bos_token(tokenizer.bos is not None)
    if tokenizer.bos is not None:
        writer.add_bos_token_id(tokenizer.bos)
    writer.add_chat_template(chat_template_of(trained.folder) or PLAIN_TEMPLATE)


def _write_tensors(
    gguf: ModuleType, writer: Any, graph: Graph, model: ModelConfig, weights: FamilyWeights
) -> None:
    """Write header and tensors, one tensor at a time."""
    kinds = gguf.GGMLQuantizationType
    types = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    planned, factors = weights.planned(), _frequency_factors(model)
    for name, tensor in planned.items():
        how = (tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes, types[tensor.dtype])
        writer.add_tensor_info(name, *how)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in planned:
        tensor = graph.converter(name, model)(weights.read(name)).contiguous()
        writer.write_tensor_data(tensor.flatten().view(torch.uint8).numpy())
    if factors is not None:
        writer.write_tensor_data(factors)


def _frequency_factors(model: ModelConfig) -> np.ndarray | None:
    """Return what llama.cpp divides each frequency by, for the scaling of Llama 3."""
    if model.rope.scaling != "llama3":
        return None
    i = torch.arange(model.head_width // 2, dtype=torch.float64)
    plain = model.rope_theta ** (-2 * i / model.head_width)
    scaled = rope_frequencies(model.head_width, model.rope_theta, model.rope)
    return (plain / scaled).float().numpy()
