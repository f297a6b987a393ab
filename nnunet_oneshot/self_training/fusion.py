"""Fuses what a student finds in an image with the label that registration carries to it."""

from __future__ import annotations

import numpy as np

from nnunet_oneshot.inference import likeliest, likeliest_heads
from nnunet_oneshot.self_training.agreement import trust_in


def fused_probabilities(carried: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Carried labels, moved towards the student's where both show about the same.

    With the Dice :math:`t_l` between the voxels where each of both finds label l likeliest, 0 where it is below 0.5,

    .. math:: p_l = (1 - t_l / 2) \, c_l + t_l / 2 \, s_l

    and the background is what the labels leave. Where both agree it is their mean. A label on which they do not agree
    remains as it was carried: one of them is wrong altogether, and nothing tells which. This is a mean on purpose:
    products of probabilities lose much where one of both is sure and wrong.

    Args:
        carried: Probabilities (labels, X, Y, Z) float32, background first; overwritten with the result.
        student: Those of the student without background, (labels - 1, X, Y, Z).

    Returns:
        Fused probabilities (labels, X, Y, Z), and :math:`t_l` of each label but the background, (labels - 1,).
    """
    labels = likeliest(carried), likeliest_heads(student)
    dice = np.full(len(student), np.nan)
    for place in range(len(student)):
        first, second = (found == place + 1 for found in labels)
        if size := first.sum() + second.sum():
            dice[place] = 2 * (first & second).sum() / size
    trust = trust_in(dice, dice)
    # In place and label by label: of many labels of a large image, each copy takes gigabytes.
    for own, found, share in zip(carried[1:], student, (trust / 2).tolist(), strict=True):
        own *= 1 - share
        own += np.multiply(found, share, dtype=own.dtype)
    np.maximum(1 - carried[1:].sum(axis=0), 0, out=carried[0])
    return carried, trust
