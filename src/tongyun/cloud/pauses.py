"""Keep Python's garbage collector from holding up programs that answer within milliseconds.

A collection of the oldest generation looks at all objects there are. With PyTorch and a
tokenizer loaded most of them live as long as the program, and looking at them takes 80 to
120 ms, in which no token leaves. What is there once a program is ready is therefore set
aside; what comes later is collected as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def settle() -> None:
    """Collect once more, and look at what is left no more."""
    gc.collect()
    gc.freeze()


@contextmanager
def settled() -> Iterator[None]:
    """As `settle`, until the block's end."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()
