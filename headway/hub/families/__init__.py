"""One file per family: the keys of its config.json and the names of its tensors."""

from headway.config import ModelConfig, UsageError
from headway.hub.families.deepseek_v2 import DEEPSEEK_V2
from headway.hub.families.deepseek_v3 import DEEPSEEK_V3
from headway.hub.families.glm4_moe import GLM4_MOE
from headway.hub.families.gpt_oss import GPT_OSS
from headway.hub.families.headway import HEADWAY
from headway.hub.families.llama import LLAMA
from headway.hub.families.mixtral import MIXTRAL
from headway.hub.families.olmoe import OLMOE
from headway.hub.families.qwen2_moe import QWEN2_MOE
from headway.hub.families.qwen3 import QWEN3
from headway.hub.families.qwen3_moe import QWEN3_MOE
from headway.hub.family import Family

FAMILIES = (
    *(QWEN3_MOE, MIXTRAL, GLM4_MOE, QWEN3, LLAMA, OLMOE, QWEN2_MOE),
    *(GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3),
)
"""Published families, in the order in which a model looks for one that it equals."""


def find_family(name: object) -> Family:
    """Return the family of a `model_type`. Raises UsageError, which lists ours, for another one."""
    for family in (*FAMILIES, HEADWAY):
        if family.name == name:
            return family
    known = ", ".join(sorted(family.name for family in (*FAMILIES, HEADWAY)))
    raise UsageError(f"model_type={name} is not known; {known} are")


def choose_family(config: ModelConfig, imported: str = "") -> tuple[Family | None, str]:
    """Return the published family whose models compute what `config` does, or None and why there is
    none, by an option of the family that comes nearest.

    A model that was imported goes back to its own family, `imported`. Others with windows are of no
    family but GPT-OSS: few engines read them."""
    if imported and not (family := find_family(imported)).differences(config):
        return family, ""
    windows = any(map(config.window_of, range(config.n_layers)))
    tried = [(family.differences(config), family) for family in FAMILIES]
    differences, family = min(tried, key=lambda pair: len(pair[0]))
    if windows and family is not GPT_OSS:
        return None, f"model.window={' '.join(map(str, config.window))}, which few engines read"
    return (None, differences[0]) if differences else (family, "")
