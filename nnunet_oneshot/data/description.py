"""What ``dataset.json`` must look like: one check of its shape, before anything is made of its content."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from nnunet_oneshot.data.partial import check_partial
from nnunet_oneshot.errors import OneShotError, shown

_ENDING = re.compile(r"(\.[A-Za-z0-9]+)+")
# nnU-Net keeps preprocessed labels as int16.
_LARGEST_LABEL = 2**15 - 1


def check_description(content: Any, path: str | os.PathLike) -> dict[str, Any]:
    """Makes sure that the content of a ``dataset.json`` has the shape of nnU-Net's data set format.

    Args:
        content: What the file holds.
        path: The file, for the error.

    Returns:
        The content.

    Raises:
        OneShotError: Something is missing or of another type.
    """
    if not isinstance(content, dict):
        raise OneShotError(f"{path} must hold a JSON object {{...}}, found {shown(content)}: write it anew.")
    missing = [key for key in ("labels", "file_ending") if key not in content]
    if not {"channel_names", "modality"} & set(content):
        missing.append("channel_names")
    if missing:
        raise OneShotError(f"{path} lacks {missing}: add them as described in nnU-Net's data set format.")
    _check_channels(content, path)
    _check_labels(content, path)
    for key, fits, expected in _ENTRIES:
        if key in content and not fits(content[key]):
            raise _wrong(path, key, content[key], expected)
    check_partial(content, path)
    return content


def checked_labels(build: Callable[[], Any], path: str | os.PathLike) -> Any:
    """nnU-Net's label manager, whose labels must be consecutive numbers.

    Args:
        build: Builds it from the content of a ``dataset.json``.
        path: The file, for the error.

    Raises:
        OneShotError: The labels are not what nnU-Net accepts.
    """
    try:
        manager = build()
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise OneShotError(
            f"nnU-Net refuses the labels in {path} ({error}): expected consecutive numbers from "
            f'"background": 0, "ignore", where there is one, the highest, and with regions also '
            f'"regions_class_order". Correct them.'
        ) from error
    declared = [*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])]
    if declared != list(range(len(declared))):
        raise OneShotError(
            f"The labels in {path} have the numbers {shown([int(label) for label in declared])}: nnU-Net needs "
            f"consecutive ones, 0, 1, 2 and so on. Correct them."
        )
    return manager


def _check_channels(content: dict[str, Any], path: str | os.PathLike) -> None:
    key = "modality" if "modality" in content and not content.get("channel_names") else "channel_names"
    names = content[key]
    expected = 'an object of the channels in order, such as {"0": "T1", "1": "T2"}'
    if not isinstance(names, dict) or not names:
        raise _wrong(path, key, names, expected)
    if list(names) != [str(number) for number in range(len(names))]:
        raise _wrong(path, key, names, f'{expected}, its keys "0" to "{len(names) - 1}" in this order')
    if not all(isinstance(name, str) and name for name in names.values()):
        raise _wrong(path, key, names, f"{expected}, its values text")


def _check_labels(content: dict[str, Any], path: str | os.PathLike) -> None:
    labels = content["labels"]
    if not isinstance(labels, dict) or not labels:
        raise _wrong(path, "labels", labels, 'an object such as {"background": 0, "liver": 1}')
    for name, value in labels.items():
        members = value if isinstance(value, list) and value else [value]
        if not all(_is_whole(member) and 0 <= member <= _LARGEST_LABEL for member in members):
            raise OneShotError(
                f"The label {shown(name)} in {path} has the value {shown(value)}: the value must be a number from 0 "
                f"to {_LARGEST_LABEL}, such as 1 without quotation marks, or for a region a list of numbers."
            )
    if labels.get("background") != 0:
        raise OneShotError(f'"labels" in {path} is {shown(labels)}: expected "background": 0 among them. Correct it.')
    if isinstance(labels.get("ignore"), list):
        raise OneShotError(
            f'The label "ignore" in {path} has the value {shown(labels["ignore"])}: expected one number, the highest '
            f"of all labels. Correct it."
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# Entry, what it must be, and that in words.
_ENTRIES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "file_ending",
        lambda value: _is_text(value) and _ENDING.fullmatch(value) is not None,
        'text that begins with a dot, such as ".nii.gz"',
    ),
    ("numTraining", lambda value: value is None or _is_whole(value), "a number without quotation marks, such as 20"),
    (
        "dataset",
        lambda value: isinstance(value, dict),
        'an object of cases, such as {"case_1": {"images": ["imagesTr/case_1_0000.nii.gz"], "label": '
        '"labelsTr/case_1.nii.gz"}}',
    ),
    (
        "regions_class_order",
        lambda value: value is None or isinstance(value, list) and all(map(_is_whole, value)),
        "a list of numbers",
    ),
    ("overwrite_image_reader_writer", _is_text, 'the name of a reader of nnU-Net, such as "NibabelIOWithReorient"'),
)


def _wrong(path: str | os.PathLike, key: str, found: Any, expected: str) -> OneShotError:
    return OneShotError(f'"{key}" in {path} is {shown(found)}: expected {expected}. Correct it.')
