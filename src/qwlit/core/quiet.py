"""Silence libraries that warn where nothing is wrong."""

import logging


def quieten_bitsandbytes() -> None:
    """Silence a warning about an optional CPU kernel that qwlit does not use. Call it before anything imports it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
