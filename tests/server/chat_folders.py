"""Folders of tokenizers with chat templates, and what Transformers makes of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from headway.data.tokenizer import load_tokenizer, train_bpe
from headway.server.chat_template import ChatTemplate

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set ns = namespace(text='') %}
    {%- if message.content is string %}
        {%- set ns.text = message.content %}
    {%- else %}
        {%- for part in message.content %}{%- set ns.text = ns.text + part.text %}{%- endfor %}
    {%- endif %}
    {%- if loop.index0 > 90 %}{% break %}{% endif %}
    {%- generation %}{{- '<|im_start|>' + message.role + '\\n' + ns.text | trim }}{%- endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + call.function.arguments | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}\
{% elif m['role'] == 'system' %}{{ raise_exception('no system message, please') }}\
{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass
class Folder:
    folder: Path


def byte_level(folder: Path) -> Path:
    """ChatML over byte-level BPE; `<tool_call>` is a token, but no special one."""
    path = folder / "tokenizer.json"
    train_bpe(["system user assistant the cat im_end im_start |>\n" * 20], 330, path)
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens(["<tool_call>", "</tool_call>"])
    inner.save(str(path))
    names = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({**names, "chat_template": CHATML})
    )
    return path.parent


def sentence_piece(folder: Path) -> Path:
    """A space before the first word of a text alone; a special token that takes white space."""
    path = folder / "tokenizer.json"
    pieces = [*"<unk> <s> </s> ▁ ▁the ▁cat [ INST ] / the cat < s >".split(), "\n"]
    pieces += [f"<0x{i:02X}>" for i in range(256)]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    inner.add_special_tokens(["<unk>", "<s>", AddedToken("</s>", rstrip=True)])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    inner.save(str(path))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "rstrip": True}}
    entries = [{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": CHATML}]
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({**names, "chat_template": entries})
    )
    return path.parent


def load(folder):
    return ChatTemplate.load(Folder(folder), load_tokenizer(str(folder)))


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    eos = config["eos_token"]
    template = config["chat_template"]
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=config.get("bos_token"),
        eos_token=eos if isinstance(eos, str) else AddedToken(**eos),
        chat_template=template,
    )


def reference(tokenizer, messages, tools=None, **more):
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **more)
