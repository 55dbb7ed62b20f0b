"""qwlit: fine-tune Qwen2 and Qwen3 models on Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwlit.api import Run, lightning_modules, plan, train
    from qwlit.core.errors import ConfigError, DataError, GuardStop, Interrupted, Preempted, QwlitError
    from qwlit.training.data_module import StepDataModule
    from qwlit.training.module import CausalLMModule

__version__ = "0.1.0"
__all__ = [
    "CausalLMModule",
    "ConfigError",
    "DataError",
    "GuardStop",
    "Interrupted",
    "Preempted",
    "QwlitError",
    "Run",
    "StepDataModule",
    "lightning_modules",
    "plan",
    "train",
]

_MODULES = {"CausalLMModule": "qwlit.training.module", "StepDataModule": "qwlit.training.data_module"}
_MODULES |= dict.fromkeys(("Run", "lightning_modules", "plan", "train"), "qwlit.api")


def __getattr__(name: str) -> Any:
    """Import a name of the Python interface when it is first used: importing torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'qwlit' has no attribute '{name}'")
    return getattr(import_module(_MODULES.get(name, "qwlit.core.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
