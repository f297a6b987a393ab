"""Which preprocessed cases have a label, told from file names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def labelled_cases(
    preprocessed_dataset_folder_base: str, dataset_json: Mapping[str, Any], identifiers: Iterable[str]
) -> list[str]:
    """The cases among ``identifiers`` that have a file in ``gt_segmentations``, sorted. No label is opened.

    Args:
        preprocessed_dataset_folder_base: ``nnUNet_preprocessed/DatasetXXX_Name``.
        dataset_json: Content of ``dataset.json``, for the suffix of label files.
        identifiers: Preprocessed cases.
    """
    folder = Path(preprocessed_dataset_folder_base) / "gt_segmentations"
    return sorted(case for case in identifiers if (folder / f"{case}{dataset_json['file_ending']}").is_file())
