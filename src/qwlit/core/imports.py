"""Import large libraries faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage in the block, which only imports, and keep what it makes out of all later collections.

    torch, transformers and lightning make 700,000 objects that live until the process ends. Else the collector goes
    through all of them again and again, in the imports and later in the training, and finds 2 % of them to free.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
