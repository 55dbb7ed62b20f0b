"""`train`: trains a model, or goes on with an unfinished run."""

from qwlit.commands.help import train_help
from qwlit.config.compose import Composed, compose, dump
from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.core.ranks import is_rank_zero


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(train_help(), end="")
        return 0
    overrides, show_config = _split_options(arguments)
    composed = compose(overrides)
    if show_config:
        print(dump(composed.config), end="")
    else:
        train(composed)
    return 0


def _split_options(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--cfg job` out of the words; everything else is an override."""
    words = list(arguments)
    show_config = "--cfg" in words
    if show_config:
        at = words.index("--cfg")
        if words[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg takes one word: --cfg job prints the composed settings")
        del words[at : at + 2]
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option.{nearest(word, ['--help', '--cfg'])} Settings are key=value")
    return words, show_config


def train(composed: Composed) -> None:
    """Run the training that `composed` describes, from its start or from where it stopped."""
    from qwlit.job.assemble import assemble, load_model
    from qwlit.job.begin import begin, recorded
    from qwlit.job.finish import finish, show
    from qwlit.job.fit import fit
    from qwlit.training.continuing import refuse_taken
    from qwlit.training.determinism import prepare_determinism
    from qwlit.training.preemption import answering_signals
    from qwlit.training.run_folder import RunFolder, RunLock

    config = composed.config
    prepare_determinism(config.determinism)
    folder = RunFolder(resolve_path(config.run.root) / str(config.run.name))
    with answering_signals(), RunLock(folder) as lock:
        if is_rank_zero():
            refuse_taken(folder, overwrite=config.run.overwrite)
        job = assemble(composed)
        loss_model = load_model(job, leave_empty=job.machine.strategy == "fsdp")
        start = begin(job, loss_model, folder)
        lock.announce()
        with recorded(folder):
            loop = fit(job, loss_model, folder, start)
            records = finish(job, loss_model, loop, folder) if is_rank_zero() else []
        # Only now: the screen may be gone, and the run is not less done for it.
        show(loop, records, folder)
