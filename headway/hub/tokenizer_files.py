"""The files of a tokenizer in a Hugging Face folder."""

from pathlib import Path

from headway.config import UsageError
from headway.data.tokenizer import JsonTokenizer, eos_token
from headway.hub.folder import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What an imported run takes over as it is, beside its weights."""


def load_hub_tokenizer(folder: Path) -> JsonTokenizer:
    """Load the tokenizer.json of a folder. The end of a text is what tokenizer_config.json calls
    so, or the first `eos_token_id` of generation_config.json or config.json. Raises UsageError
    without a tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no tokenizer.json; save its tokenizer there (with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    return JsonTokenizer(path, eos_token=end_of_text(folder))


def end_of_text(folder: Path) -> str:
    """Return the token that ends a text, by its name; "" where no file tells."""
    if name := eos_token(folder / "tokenizer_config.json"):
        return name
    for file in ("generation_config.json", "config.json"):
        ids = read_json(folder / file).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and (name := _name_of(folder / "tokenizer.json", first)):
            return name
    return ""


def _name_of(path: Path, token: int) -> str:
    """Return the name of an id in a tokenizer.json; "" where there is none."""
    spec = read_json(path)
    for entry in spec.get("added_tokens") or []:
        if entry["id"] == token:
            return entry["content"]
    vocabulary = spec.get("model", {}).get("vocab")
    names = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return next((name for name, i in names if i == token), "")
