"""What a training or a registration is said to do, from its log."""

from datetime import datetime

import pytest

from nnunet_oneshot.demo.watching import what_registration_does, what_training_does

BEGINNING = """Using device: cpu
2026-11-28 10:00:00.000000: Training 3d_fullres of plans: patch [24, 28, 24], batch 2, 5 epochs. Plans are in x.
2026-11-28 10:00:01.000000:\x20
2026-11-28 10:00:01.000000: Epoch 0
2026-11-28 10:00:01.000000: Current learning rate: 0.003
"""
ENDED = """2026-11-28 10:00:21.000000: Pseudo dice [np.float32(0.8), np.float32(0.9), nan]
2026-11-28 10:00:21.000000: Epoch time: 20.0 s
"""
NEXT = """2026-11-28 10:00:22.000000: Epoch 1
2026-11-28 10:00:22.000000: Current learning rate: 0.002
Epoch 1: 60 of 250, 0.1 s each, 19 s left, 2 min until all is done
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "starting the training"),
        (BEGINNING, "epoch 1 of 5, time left is not known yet"),
        (
            BEGINNING + "Epoch 0: 9 of 250, 0.1 s each, 24 s left, 2 min until all is done\n",
            "epoch 1 of 5, about 2 min left",
        ),
        (BEGINNING + ENDED, "epoch 2 of 5, pseudo Dice 0.85, about 80 s left"),
        (BEGINNING + ENDED + NEXT, "epoch 2 of 5, pseudo Dice 0.85, about 72 s left"),
        (
            BEGINNING + ENDED + "2026: Registering a: 10 of 10 pairs",
            "after epoch 1 of 5, pseudo Dice 0.85: the student",
        ),
        (BEGINNING + 5 * ENDED, "training is done"),
    ],
)
def test_a_training_is_told_in_epochs_dice_and_time(tmp_path, text, told):
    log = tmp_path / "log.txt"
    log.write_text(text)
    assert what_training_does(log, now=datetime(2026, 11, 28, 10, 0, 30)).startswith(told)


def test_a_registration_is_told_in_pairs(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("Registering a: 13 of 13 pairs are to be computed\n")
    assert what_registration_does(log) == "registering the labelled phantom to the others"
    log.write_text("Registering: 2 of 13, 1 s each, 11 s left\nRegistering: 9 of 13, 1 s each, 4 s left\n")
    assert what_registration_does(log) == "registering, 9 of 13, 1 s each, 4 s left"
