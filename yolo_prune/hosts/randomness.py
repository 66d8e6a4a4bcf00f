"""Random numbers that belong to a piece of work and to nothing before or after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what augmentations draw from, Python's and NumPy's generators, and let them go on afterwards as before.

    Args:
        seed: 0 or more.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)  # the hosts draw from this one
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
