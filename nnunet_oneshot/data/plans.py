"""What plans must look like: one check of their shape, before nnU-Net's classes make anything of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from nnunet_oneshot.errors import OneShotError, shown

# In the plans, since nnU-Net prints them and keeps them in the log whenever a training begins.
NOTE = "oneshot_note"
FOR_OUR_TRAINERS = (
    "These plans are for the trainers of nnunet_oneshot, such as -tr OneShotDistillTrainer. nnU-Net's own trainers, "
    "such as nnUNetTrainer, which is its default, take a case without a label for one that shows none of the "
    "structures: of such a dataset they learn to find nothing. They also stop for lack of dataset_fingerprint.json, "
    "which nnUNetv2_extract_fingerprint makes where every case is labelled."
)


def check_plans(content: Any, path: str | os.PathLike) -> dict[str, Any]:
    """Makes sure that plans have the shape of nnU-Net's plans, as far as this package reads them.

    Args:
        content: What the plans file holds.
        path: The file, for the error.

    Returns:
        The content.

    Raises:
        OneShotError: Something is missing or of another type.
    """
    configurations = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(configurations, dict) or not all(isinstance(one, dict) for one in configurations.values()):
        raise OneShotError(
            f'{path} does not hold nnU-Net\'s plans, an object with "configurations": plan the dataset again, or '
            f"delete the file."
        )
    _check_entries(content, _OF_PLANS, str(path))
    for name in configurations:
        where = f"configuration {shown(name)} of {path}"
        whole = _with_inherited(configurations, name, where)
        _check_entries(whole, _OF_CONFIGURATION, where)
        # Plans of nnU-Net before 2.4 describe the network otherwise.
        if "UNet_class_name" not in whole:
            _check_entries(whole, _OF_NETWORK, where)
    return content


def _with_inherited(configurations: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    chain = [name]
    while "inherits_from" in configurations[chain[-1]]:
        parent = configurations[chain[-1]]["inherits_from"]
        if not isinstance(parent, str) or parent not in configurations or parent in chain:
            raise OneShotError(
                f'"inherits_from" leads from {where} to {shown(parent)}: expected another configuration of these '
                f"plans. {_REMEDY}"
            )
        chain.append(parent)
    return {key: value for link in reversed(chain) for key, value in configurations[link].items()}


def _check_entries(content: Mapping[str, Any], entries: Mapping[str, _Entry], where: str) -> None:
    for key, (fits, expected) in entries.items():
        if not fits(content.get(key)):
            found = f"is {shown(content[key])}" if key in content else "is missing"
            raise OneShotError(f'"{key}" {found} in {where}: expected {expected}. {_REMEDY}')


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: Any, *, low: float = 0) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < _LARGEST


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_list(value: Any, of: Callable[[Any], bool], lengths: tuple[int, ...]) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(of, value))


def _is_order(value: Any) -> bool:
    return _is_list(value, lambda axis: type(axis) is int, (3,)) and sorted(value) == [0, 1, 2]


def _is_architecture(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("arch_kwargs"), dict):
        return False
    strides, imported = value["arch_kwargs"].get("strides"), value.get("_kw_requires_import")
    return (
        _is_text(value.get("network_class_name"))
        and isinstance(imported, (list, tuple))
        and all(map(_is_text, imported))
        and isinstance(strides, (list, tuple))
        and all(_is_whole(one) or (isinstance(one, (list, tuple)) and all(map(_is_whole, one))) for one in strides)
    )


# Whether an entry, None where it is missing, is as it must be; and that in words.
_Entry = tuple[Callable[[Any], bool], str]
_LARGEST = 1e9
_REMEDY = "Correct it, or plan the dataset again."
_ORDER: _Entry = (_is_order, "the axes 0, 1 and 2 in some order")
_OF_PLANS: dict[str, _Entry] = {
    "plans_name": (_is_text, "the name of the plans"),
    "dataset_name": (_is_text, "the name of the dataset"),
    "image_reader_writer": (_is_text, "the name of one of nnU-Net's readers"),
    "transpose_forward": _ORDER,
    "transpose_backward": _ORDER,
}
_OF_NETWORK: dict[str, _Entry] = {
    "architecture": (
        _is_architecture,
        'an object with "network_class_name", "arch_kwargs", the strides of each stage among them, and '
        '"_kw_requires_import"',
    ),
}
_RESAMPLED = ("data", "seg", "probabilities")
_OF_CONFIGURATION: dict[str, _Entry] = {
    "data_identifier": (_is_text, "the name of a folder"),
    "batch_size": (_is_whole, "a whole number of at least 1"),
    "patch_size": (lambda value: _is_list(value, _is_whole, (2, 3)), "two or three whole numbers of at least 1"),
    "spacing": (lambda value: _is_list(value, _is_number, (2, 3)), "two or three numbers above 0 (mm)"),
    "use_mask_for_norm": (
        lambda value: isinstance(value, list) and all(isinstance(one, bool) for one in value),
        "a list of true or false, one a channel",
    ),
    "preprocessor_name": (_is_text, "the name of one of nnU-Net's preprocessors"),
    "batch_dice": (lambda value: isinstance(value, bool), "true or false"),
    **{f"resampling_fn_{what}": (_is_text, "the name of a function of nnU-Net") for what in _RESAMPLED},
    **{f"resampling_fn_{what}_kwargs": (lambda value: isinstance(value, dict), "an object") for what in _RESAMPLED},
    "normalization_schemes": (
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
        "a list of names of nnU-Net's normalizations, one a channel",
    ),
}
