"""The same training with several seeds, one after another; each is an ordinary run."""

from pathlib import Path

from rich.console import Console

from qwlit.config.compose import as_tree, compose
from qwlit.config.run import RunConfig, flatten
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.tuning.short_run import failed, run_shortly


def train_seeds(overrides: list[str], repeats: int, screen: Console) -> list[Path]:
    """Train with `seed` and the numbers after it, and return the runs' folders, NAME-seedN in run.root.

    The same command resumes: it passes over runs that are finished, unless `run.overwrite` is set.

    Raises:
        ConfigError: a run of this name is finished and has other settings.
        QwlitError: a training failed, with its exit code.
    """
    config = compose(overrides).config
    folders = []
    for seed in range(config.seed, config.seed + repeats):
        name = f"{config.run.name}-seed{seed}"
        own = [*overrides, f"seed={seed}", f"run.name={name}"]
        run = RunFolder(resolve_path(config.run.root) / name)
        folders.append(run.path)
        if run.status == FINISHED and not config.run.overwrite:
            if differing := _differing(run, compose(own).config):
                raise ConfigError(
                    f"{run.path} is finished and has other settings, {', '.join(differing)}; set another run.name, or"
                    " run.overwrite=true"
                )
            continue
        log = run.path.with_name(f"{name}.log")
        code = run_shortly(own, run, log, config.train.max_steps or 0, name, screen)
        if code:
            raise failed(f"{name} did not end", code, log)
        log.unlink()
    return folders


def _differing(run: RunFolder, config: RunConfig) -> list[str]:
    """Return the settings that a finished run does not share; `resume` and `run.overwrite` change no result."""
    earlier, now = (flatten(as_tree(each)) for each in (compose([f"config={run.config_file}"]).config, config))
    return [key for key, value in now.items() if value != earlier[key] and key not in ("resume", "run.overwrite")]
