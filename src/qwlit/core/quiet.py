"""Other people's libraries that speak where nothing is wrong."""

import logging


def quieten_bitsandbytes() -> None:
    """Before it is imported, by whomever: it complains about an optional CPU kernel that nothing here uses."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
