"""One file per family: the keys of its config.json and the names of its tensors."""

from headway.hub.families.llama import LLAMA
from headway.hub.families.mixtral import MIXTRAL
from headway.hub.families.olmoe import OLMOE
from headway.hub.families.qwen3 import QWEN3
from headway.hub.families.qwen3_moe import QWEN3_MOE

FAMILIES = (QWEN3_MOE, MIXTRAL, OLMOE, QWEN3, LLAMA)
"""All families, in the order in which a model looks for one that it equals."""
