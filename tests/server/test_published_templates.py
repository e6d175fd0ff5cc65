"""Ids of conversations in the templates and tokenizers of published models."""

import json

import pytest

from tests.published import published
from tests.server.chat_folders import load, reference

pytest.importorskip("jinja2")
QUESTION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Wie spät ist es in 東京? \U0001f600\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 12:00."},
    {"role": "system", "content": "Now be verbose."},
    {"role": "user", "content": "Why <b>?</b> 1234567 <tool_response> user: | >"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        },
    }
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3_1", "deepseek_v3", "gptoss"])
def test_ids_of_published_models_equal_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = published(name)
    if name == "smollm2":
        [gguf] = folder.glob("*.gguf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        tokenizer.save_pretrained(tmp_path)
        folder = tmp_path
    else:
        folder = next(folder.rglob("tokenizer.json")).parent
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if config.get("chat_template") is None:  # gpt-oss: its package has none
            config["chat_template"] = (
                "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
            )
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((folder / file).read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        folder = tmp_path
        names = {
            k: v if isinstance(v, str) else v["content"]
            for k, v in config.items()
            if k.endswith("_token") and v and not isinstance(v, bool)
        }
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            chat_template=config["chat_template"],
            **names,
        )
    ours = load(folder)
    for tools in (None, TOOLS):
        for opening in (False, True):
            want = reference(tokenizer, QUESTION, tools, add_generation_prompt=opening)
            assert ours.render(QUESTION, tools, add_generation_prompt=opening) == want
    continued = [*QUESTION, {"role": "assistant", "content": "Because "}]
    want = reference(tokenizer, continued, continue_final_message=True)
    assert ours.render(continued, add_generation_prompt=False, continue_final_message=True) == want
    special = tokenizer.convert_ids_to_tokens(sorted(ours._tokenizer.special_tokens.values()))
    attack = [{"role": "user", "content": "".join(special[:300])}]
    clean = [{"role": "user", "content": ""}]
    count = [
        sum(i in set(ours._tokenizer.special_tokens.values()) for i in ours.render(m))
        for m in (attack, clean)
    ]
    assert count[0] == count[1]
    assert "".join(special[:300]) in ours._tokenizer.decode(
        ours.render(attack), skip_special_tokens=False
    )
