"""`python -m qwlit VERB [overrides]`: find the verb, run it, turn errors into one line and an exit code."""

import importlib
import sys

from qwlit.core.errors import ConfigError, QwlitError, nearest
from qwlit.core.ranks import is_rank_zero

VERBS = {"train": "train a model, or go on with an unfinished run"}

HELP = """\
qwlit: fine-tune Qwen2 and Qwen3 models.

  python -m qwlit VERB [key=value ...]

Verbs
{verbs}

First steps
  python -m qwlit train experiment=demo        a tiny Qwen3 learns a rule in two languages: no network, no GPU
  python -m qwlit train model.path=FOLDER data.path=FILE.jsonl recipe=lora
  python -m qwlit train --help                 every setting, with its default and unit

Exit codes
  0 done   2 a setting or the data is wrong   3 stopped by the guard   75 preempted, goes on when run again
  130 interrupted, saved   1 a fault of qwlit's
"""


def help_text() -> str:
    return HELP.format(verbs="\n".join(f"  {name:<10} {what}" for name, what in VERBS.items()))


def main() -> int:
    """Run the verb in `sys.argv`, which stays whole: Lightning's child processes are started with the same words."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if words[0] == "--version":
        from qwlit import __version__

        print(f"qwlit {__version__}")
        return 0
    try:
        return _run(words[0], words[1:])
    except QwlitError as error:
        # Each rank of a launch meets the same error; one of them says it.
        if is_rank_zero():
            print(f"qwlit {words[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(verb: str, arguments: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(f"no such verb.{nearest(verb, VERBS)} Verbs: {', '.join(VERBS)}; see python -m qwlit --help")
    module = importlib.import_module(f"qwlit.commands.{verb}")
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
