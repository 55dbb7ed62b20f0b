"""A sweep with W&B: its server draws the settings, agents on any machine train, and each trial is an ordinary run."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.markup import escape

from qwlit.config.run import RunConfig
from qwlit.core.children import start_child
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, Interrupted, Preempted, QwlitError, one_line
from qwlit.core.signals import answering_signals
from qwlit.training.tracking.wandb_access import find_access, project_of, stop_client
from qwlit.tuning.optuna_search import check_metric, sweep_folder
from qwlit.tuning.slots import allocate_slots
from qwlit.tuning.space import check_space, keys_of, with_distributions
from qwlit.tuning.sweep_file import Sweep

# The agent forwards a signal to its trial, which saves and ends.
AGENT = ["-m", "wandb", "agent", "--forward-signals"]
EXAMPLE_AGENTS = 4


def run_wandb(sweep: Sweep, overrides: list[str], *, trials: int | None, agents: int | None) -> None:
    """Create the sweep on W&B and run agents until it ends.

    Args:
        overrides: of every trial, after those in the sweep file's command.
        trials: number of trials in all; None: the file's run_cap, or no limit.
        agents: number of agents to start here; None: one per GPU; 0: none.

    Raises:
        ConfigError: the sweep cannot run as it is written, or W&B cannot be reached.
        QwlitError: an agent failed.
    """
    composed = check_space(sweep, [*sweep.overrides, *overrides])
    config = composed.config
    if not config.logger.wandb:
        raise ConfigError(f"logger=none: W&B would not see the trials; write logger=wandb into {sweep.path}")
    check_metric(sweep, config)
    slots = [] if agents == 0 else allocate_slots(agents, config.hardware.devices, option="agents")
    folder = sweep_folder(sweep, composed, overrides)
    fixed = [override for override in overrides if not keys_of([override]) & {"run.name", "run.root"}]
    path, url = _create(sweep, [*fixed, f"run.root={folder}"], config, trials)
    _show_commands(path, url, folder, config, len(slots) or trials or EXAMPLE_AGENTS)
    if slots:
        _run_agents(path, slots, folder)


def _create(sweep: Sweep, overrides: list[str], config: RunConfig, trials: int | None) -> tuple[str, str]:
    """Create the sweep. Return its path on W&B, entity/project/id, and the URL of its page."""
    import wandb

    *command, values = sweep.document.command
    spec: dict[str, Any] = {"name": sweep.name, **sweep.raw, "parameters": with_distributions(sweep)}
    spec["command"] = [*command, *overrides, values]
    if trials is not None:
        spec["run_cap"] = trials
    entity, project = spec.pop("entity", config.logger.entity), spec.pop("project", project_of(config.logger))
    printed = io.StringIO()
    try:
        access = find_access(verify=True)
        if access.mode != "online":
            raise ConfigError(
                f"a W&B sweep needs W&B online, but it is {access.mode} ({access.reason}); or use backend=optuna"
            )
        with contextlib.redirect_stdout(printed):
            id = wandb.sweep(spec, entity=entity, project=project)
    except wandb.Error as error:
        raise ConfigError(f"W&B refused {sweep.path}: {one_line(str(error))}") from None
    finally:
        stop_client()
    # The client stores the entity and project that the server chose in these variables.
    path = "/".join([*(os.environ[name] for name in ("WANDB_ENTITY", "WANDB_PROJECT") if name in os.environ), id])
    match = re.search(r"https?://\S+", printed.getvalue())
    return path, match.group() if match else ""


def _show_commands(path: str, url: str, folder: Path, config: RunConfig, count: int) -> None:
    """Print the sweep's page and the commands that start more agents."""
    gpus = config.hardware.devices if isinstance(config.hardware.devices, int) else 1
    agent = f"python {' '.join(AGENT)} {path}"
    lines = [
        f"[bold]sweep {escape(path)}[/]  {escape(url)}",
        f"  folder of the trials       {escape(str(folder))}",
        f"  on another machine, run    {escape(agent)}",
        f'  on a cluster, run          sbatch --array=1-{count} --gpus={gpus} --wrap="{escape(agent)}"',
    ]
    console().print("\n".join(lines))


def _run_agents(path: str, slots: list[dict[str, str]], folder: Path) -> None:
    """Run one agent per slot until all have ended."""
    logs = [None] if len(slots) == 1 else [folder / "logs" / f"agent-{n}.log" for n in range(1, len(slots) + 1)]
    agents = [_start_agent(path, slot, log) for slot, log in zip(slots, logs, strict=True)]
    if logs[0] is not None:
        console().print(f"  logs of the agents         {escape(str(logs[0].parent))}")
    try:
        with answering_signals():
            codes = [agent.wait() for agent in agents]
    except (KeyboardInterrupt, Preempted) as error:
        _stop(agents)
        message = f"trials saved; resume the sweep with: python {' '.join(AGENT)} {path}"
        # No requeue: the same command would create another sweep.
        raise Preempted(message, requeue=False) if isinstance(error, Preempted) else Interrupted(message) from None
    failed = [f"agent {number} with code {code}" for number, code in enumerate(codes, start=1) if code]
    if failed:
        raise QwlitError(f"ended early: {', '.join(failed)}; resume the sweep with: python {' '.join(AGENT)} {path}")


def _start_agent(path: str, slot: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    # The agent starts trials as `python` from PATH: put this environment's python first.
    folder = Path(sys.executable).parent
    environment = os.environ | slot | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    # If this process is killed, the agent gets SIGINT and its trial saves. W&B's threads have ended: forking is safe.
    return start_child([*AGENT, path], log, environment, parent_death_signal=signal.SIGINT)


def _stop(agents: list[subprocess.Popen[bytes]]) -> None:
    """Tell the agents to let their trials save and end; after another Ctrl-C the trials stop at once."""
    while any(agent.poll() is None for agent in agents):
        try:
            for agent in agents:
                agent.send_signal(signal.SIGINT)
            for agent in agents:
                agent.wait()
        except KeyboardInterrupt:
            continue
