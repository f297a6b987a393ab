"""What the demonstration's commands are doing, in a line, from what they have written to their logs so far."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from nnunet_oneshot.progress import duration

_STAMP = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): "
_EPOCH = re.compile(rf"^{_STAMP}Epoch (\d+)\s*$", re.MULTILINE)
_LENGTH = re.compile(r", (\d+) epochs?\.")
_EPOCH_TIME = re.compile(r"Epoch time: ([\d.]+) s")
_LEFT = re.compile(r"^Epoch 0: .*, (\S+ \S+) until all is done", re.MULTILINE)
_PSEUDO_DICE = re.compile(r"Pseudo dice \[(.*)\]")
_NUMBER = re.compile(r"\d+\.\d+")
_REGISTERED = re.compile(r"^Registering: (.+)$", re.MULTILINE)


def what_registration_does(log: Path) -> str:
    """How many pairs are registered, from the log of ``nnunet_oneshot register``."""
    told = _REGISTERED.findall(log.read_text(encoding="utf-8", errors="replace"))
    return f"registering, {told[-1]}" if told else "registering the labelled phantom to the others"


def what_training_does(log: Path, now: datetime | None = None) -> str:
    """Epoch of epochs, pseudo Dice and time left, from the log of ``nnUNetv2_train``.

    Args:
        log: Its log.
        now: The time; None is the present.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    begun, length = list(_EPOCH.finditer(text)), _LENGTH.search(text)
    if not begun or length is None:
        return "starting the training"
    total, ended = int(length[1]), [float(seconds) for seconds in _EPOCH_TIME.findall(text)]
    if len(ended) >= total:
        return "training is done, the final validation runs"
    stamp, number = begun[-1].groups()
    dice = _mean_dice(text)
    if len(ended) == len(begun) and "Registering" in text[begun[-1].end() :]:
        return f"after epoch {len(ended)} of {total}{dice}: the student guides a second registration"
    epoch = f"epoch {min(int(number) + 1 + (len(ended) == len(begun)), total)} of {total}{dice}"
    if not ended:
        told = _LEFT.findall(text)
        return f"{epoch}, about {told[-1]} left" if told else f"{epoch}, time left is not known yet"
    passed = ((now or datetime.now()) - datetime.fromisoformat(stamp)).total_seconds() if len(ended) < len(begun) else 0
    mean = sum(ended) / len(ended)
    left = max(0.0, mean - passed) + mean * (total - len(ended) - 1)
    return f"{epoch}, about {duration(left)} left"


def _mean_dice(text: str) -> str:
    """A clause with the mean over the labels of the last epoch's pseudo Dice; empty before there is one."""
    found = _PSEUDO_DICE.findall(text)
    values = [float(value) for value in _NUMBER.findall(found[-1])] if found else []
    return f", pseudo Dice {sum(values) / len(values):.2f}" if values else ""
