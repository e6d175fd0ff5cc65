"""The files of a tokenizer beside a model: tokenizer.json, tokenizer_config.json,
chat_template.jinja, generation_config.json."""

import json
import shutil
from pathlib import Path
from typing import Any

from headway.checkpoint.checkpoint_dir import write_json
from headway.data.tokenizer import ByteTokenizer, Tokenizer
from headway.hub.folder import read_json
from headway.hub.tokenizer_files import FILES

CONFIG = "tokenizer_config.json"
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ message['content'] }}

{% endfor -%}
{%- if add_generation_prompt -%}
Assistant:
{%- endif -%}
"""
"""The chat template of a model that has none: `User: …`, a blank line, `Assistant:`."""


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_len: int, run_dir: Path) -> None:
    """Write the files of a tokenizer into `folder`, those that lie in `run_dir` as they are; the
    plain chat template where the run has none.

    Args: max_len: the longest context in tokens."""
    _write_own(folder, tokenizer, max_len)
    for name in FILES:
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, folder / name)
    template = folder / "chat_template.jinja"
    if not template.is_file() and "chat_template" not in read_json(folder / CONFIG):
        template.write_text(PLAIN_TEMPLATE, "utf-8")


def _write_own(folder: Path, tokenizer: Tokenizer, max_len: int) -> None:
    """Write what follows from the tokenizer alone."""
    text = tokenizer.to_json()
    (folder / "tokenizer.json").write_text(text, "utf-8")
    names = token_names(text)
    eos = names[tokenizer.eos]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "eos_token": eos,
        "pad_token": eos,
    }
    if tokenizer.bos is not None:
        config["bos_token"] = names[tokenizer.bos]
    if isinstance(tokenizer, ByteTokenizer):
        config["split_special_tokens"] = True  # every text is its bytes, and nothing else
    write_json(folder / CONFIG, config)
    write_json(folder / "generation_config.json", special_ids(tokenizer))


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids that config.json and generation_config.json name."""
    ends = list(tokenizer.eos_ids)
    eos = ends[0] if len(ends) == 1 else ends
    return {"bos_token_id": tokenizer.bos, "eos_token_id": eos, "pad_token_id": tokenizer.eos}


def token_names(tokenizer_json: str) -> dict[int, str]:
    """Return id → token, special ones included, of a tokenizer.json."""
    spec = json.loads(tokenizer_json)
    vocabulary = spec["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        names = {i: token for i, (token, _) in enumerate(vocabulary)}
    else:
        names = {i: token for token, i in vocabulary.items()}
    return names | {added["id"]: added["content"] for added in spec.get("added_tokens", [])}
