"""Labelled cases whose label map shows some of the structures only, as ``dataset.json`` declares them::

    "oneshot": {"partial": {"case_7": ["liver", "spleen"]}}

says that ``case_7`` was labelled for liver and spleen alone. What is background there may be any other structure. A
structure that was looked for and is truly absent, such as a resected kidney, is listed, and no voxel has its value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_oneshot.data.structures import structures
from nnunet_oneshot.errors import OneShotError, listed, shown

BLOCK, PARTIAL = "oneshot", "partial"
_EXAMPLE = '{"partial": {"case_7": ["liver", "spleen"]}}, for each partly labelled case the structures that it shows'


def check_partial(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Makes sure that the declaration of partial labels in the content of a ``dataset.json`` has the right shape.

    Args:
        content: What the file holds; its labels have been checked.
        path: The file, for the error.

    Raises:
        OneShotError: It has another shape, names what is no structure, or the dataset has regions.
    """
    block = content.get(BLOCK, {})
    if not isinstance(block, dict) or set(block) - {PARTIAL} or not isinstance(block.get(PARTIAL, {}), dict):
        raise OneShotError(f'"{BLOCK}" in {path} is {shown(block)}: expected {_EXAMPLE}. Correct it.')
    known = structures(content)
    for case, names in block.get(PARTIAL, {}).items():
        is_list = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
        if not is_list or len(set(names)) < len(names) or set(names) - set(known):
            raise OneShotError(
                f'Case {shown(case)} of "{BLOCK}" in {path} shows {shown(names)}: expected a list of one or more of '
                f"{listed(known)}, each once. Correct it."
            )
    if block.get(PARTIAL) and any(isinstance(value, list) for value in content["labels"].values()):
        raise OneShotError(
            f'"{BLOCK}" in {path} declares partial labels, and "labels" has regions: these do not go together yet. '
            f"Declare plain labels, or remove the partly labelled cases."
        )


def hidden_labels(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Each partly labelled case with the values of the labels that its label map does not show.

    Args:
        content: Content of ``dataset.json``, see `check_partial`.
    """
    known = structures(content)
    declared = content.get(BLOCK, {}).get(PARTIAL, {})
    found = {
        case: tuple(value for name, value in known.items() if name not in names) for case, names in declared.items()
    }
    return {case: hidden for case, hidden in found.items() if hidden}


def require_every_label(content: Mapping[str, Any], atlases: Sequence[str], fold: int | str) -> None:
    """Makes sure that each structure is shown by one atlas at least: of another one nothing would be learned.

    Args:
        content: Content of ``dataset.json``.
        atlases: The labelled cases of a training.
        fold: Its fold, for the error.

    Raises:
        OneShotError: A structure is shown by none.
    """
    hidden = hidden_labels(content)
    unseen = [n for n, value in structures(content).items() if all(value in hidden.get(a, ()) for a in atlases)]
    if unseen:
        raise OneShotError(
            f"None of the atlases of fold {fold} ({listed(atlases)}) shows {listed(unseen)}, by the partial labels "
            f'that "{BLOCK}" in dataset.json declares, so that nothing tells it from background. Label it in one of '
            f"them, name other atlases, train another fold or all, or remove it from the labels."
        )


def averaged_probabilities(
    found: Iterable[tuple[str, np.ndarray]], labels: Sequence[int], hidden: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """The mean of label probabilities that several atlases carry to a case.

    A partly labelled atlas says nothing of the labels that it does not show: each label is the mean over the atlases
    that show it, and the background is what the labels leave.

    Args:
        found: Atlases and their probabilities (len(labels), X, Y, Z), 0 to 1; at least one. The first is overwritten.
        labels: Values in the order of the first axis, 0 first.
        hidden: Atlas to the labels that it does not show.

    Returns:
        (len(labels), X, Y, Z); 0 for a label that no atlas shows.
    """
    iterator = iter(found)
    atlas, result = next(iterator)
    shown = np.array([label not in hidden.get(atlas, ()) for label in labels])
    result[~shown] = 0
    counts = shown.astype(int)
    for atlas, probabilities in iterator:
        for index, label in enumerate(labels):
            if label not in hidden.get(atlas, ()):
                result[index] += probabilities[index]
                counts[index] += 1
    for index, count in enumerate(counts.tolist()):
        result[index] /= max(count, 1)
    if counts.min() < counts.max():
        result[0] = np.maximum(1 - result[1:].sum(axis=0), 0)
    return result
