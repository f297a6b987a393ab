"""The lengths in which trainers come, and their names."""

from __future__ import annotations

# Epochs of 250 iterations: nnU-Net's length, and the shorter ones that our trainers have too.
DEFAULT_EPOCHS = 1000
SHORTER = (1, 5, 10, 20, 50, 100, 250, 500)


def variant(trainer: str, epochs: int) -> str:
    """Name of the class of a trainer with this length, as nnU-Net names its own."""
    if epochs == DEFAULT_EPOCHS:
        return trainer
    return f"{trainer}_1epoch" if epochs == 1 else f"{trainer}_{epochs}epochs"
