"""Fuses what a student finds in an image with the label that registration carries to it."""

from __future__ import annotations

import numpy as np

from nnunet_oneshot.self_training.agreement import trust_in


def fused_probabilities(carried: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Carried labels, moved towards the student's where both show about the same.

    With the Dice :math:`t_l` between the voxels where each of both finds label l likeliest, 0 where it is below 0.5,

    .. math:: p_l = (1 - t_l / 2) \, c_l + t_l / 2 \, s_l

    and the background is what the labels leave. Where both agree it is their mean. A label on which they do not agree
    remains as it was carried: one of them is wrong altogether, and nothing tells which. This is a mean on purpose:
    products of probabilities lose much where one of both is sure and wrong.

    Args:
        carried: Probabilities (labels, X, Y, Z), background first.
        student: The same of the student.

    Returns:
        Fused probabilities of the same shape, and :math:`t_l` of each label but the background, (labels - 1,).
    """
    likeliest = [probabilities.argmax(0) for probabilities in (carried, student)]
    dice = np.full(len(carried) - 1, np.nan)
    for label in range(1, len(carried)):
        first, second = (found == label for found in likeliest)
        if size := first.sum() + second.sum():
            dice[label - 1] = 2 * (first & second).sum() / size
    trust = trust_in(dice, dice)
    share = (trust / 2)[:, None, None, None]
    labels = (1 - share) * carried[1:] + share * student[1:]
    background = np.maximum(1 - labels.sum(0, keepdims=True), 0)
    return np.concatenate([background, labels]).astype(np.float32), trust
