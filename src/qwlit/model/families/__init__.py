"""What differs between model architectures, one file each. All other code uses `ModelFamily`.

A new architecture is a new file here with a `ModelFamily`, an entry in FAMILIES, and its presets in `conf/model/`.
"""

from typing import TYPE_CHECKING

from qwlit.model.families.decoder import ModelFamily
from qwlit.model.families.qwen2 import QWEN2
from qwlit.model.families.qwen3 import QWEN3

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: dict[str, ModelFamily] = {family.model_type: family for family in (QWEN2, QWEN3)}
"""By the `model_type` of config.json."""


def family_of(model: "PreTrainedModel") -> ModelFamily:
    return FAMILIES[model.config.model_type]
