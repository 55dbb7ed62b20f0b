"""What differs between model architectures. All other code uses `ModelFamily`.

A new architecture is a new file here, with a `ModelFamily` called FAMILY, and its presets in `conf/model/`. If its
decoder layers differ from those that `decoder` describes, FAMILY is a subclass of `ModelFamily`, and the counting in
`model/flops.py` and `planning/memory/activations.py` must follow.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from qwlit.model.families.decoder import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _find_families() -> dict[str, ModelFamily]:
    """Import every file of this folder, and return their families by `model_type`."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in families}


FAMILIES: dict[str, ModelFamily] = _find_families()
"""By the `model_type` of config.json."""


def family_of(model: "PreTrainedModel") -> ModelFamily:
    return FAMILIES[model.config.model_type]
