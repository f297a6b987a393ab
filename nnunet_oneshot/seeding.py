"""One seed for every source of randomness of a run."""

from __future__ import annotations

import random


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators of this process."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part, such as a run's seed and its epoch."""
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1)[0])
