"""``nnunet_oneshot import``: a raw data set from a folder of scans and one label."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk

from nnunet_oneshot.data.drawn_labels import read_drawn_label, renumbered
from nnunet_oneshot.data.parallel import default_processes, run_on_cases
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.scans import Scan, find_scans, read_scan
from nnunet_oneshot.errors import OneShotError, listed
from nnunet_oneshot.io import atomic_folder, require_env, writing
from nnunet_oneshot.names import check_name
from nnunet_oneshot.tables import csv_table

ENDING = ".nii.gz"
# In the data set's folder: where each case came from.
SOURCES = "oneshot_sources.csv"
# DICOM's modalities in the words that choose nnU-Net's normalisation.
_CHANNELS = {"CT": "CT", "MR": "MR", "PT": "PET"}
_DATASET = re.compile(r"Dataset(\d{3})_.+")


def import_scans(
    folder: str,
    *,
    dataset: str,
    labels: Sequence[tuple[str, str]],
    label_names: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    test_folder: str | None = None,
    num_processes: int | None = None,
) -> Path:
    """Writes a raw data set of nnU-Net; scans that cannot be read are left out and told.

    Args:
        folder: Holds the scans: DICOM series, or files that SimpleITK or nibabel read, also in folders below.
        dataset: ``DatasetXXX_Name``, or a number, which takes the folder's name.
        labels: Case and file of each label.
        label_names: Names of the labels in order of their values; None takes those in the files, or numbers.
        channels: Names of the channels, such as ``CT``; None takes DICOM's modality.
        test_folder: Scans for ``imagesTs``.
        num_processes: Processes; None chooses.

    Returns:
        The folder of the data set.

    Raises:
        OneShotError: The data set exists, or something does not fit.
    """
    (raw,) = require_env("nnUNet_raw")
    target = raw / _dataset_name(dataset, folder, raw)
    scans = find_scans(folder, without=[file for _, file in labels])
    tests = find_scans(test_folder) if test_folder else []
    names = _channel_names([*scans, *tests], channels)
    _check_labelled(scans, labels)
    number = num_processes or default_processes()
    with writing(target), atomic_folder(target) as temporary:
        used = _written(scans, temporary / "imagesTr", number, "Scans")
        missing = [case for case, _ in labels if case not in {scan.name for scan in used}]
        if missing:
            raise OneShotError(f"The labelled scan {missing[0]} could not be read, see above: give another.")
        used_tests = _written(tests, temporary / "imagesTs", number, "Test scans") if tests else []
        declared = _write_labels(labels, temporary, label_names)
        _describe(temporary, target.name, names, declared, len(used))
        rows = [(scan.name, part, scan.source) for part, of in (("Tr", used), ("Ts", used_tests)) for scan in of]
        text = csv_table(["case", "images", "source"], rows)
        (temporary / SOURCES).write_text(text, encoding="utf-8")
        RawDataset(temporary)
    print(
        f"{target}: {len(used)} scans, {len(labels)} of them labelled, channels {', '.join(names)}, labels "
        f"{', '.join(f'{value} {name}' for name, value in declared.items() if value)}."
        f"\nGo on with: nnunet_oneshot plan_and_preprocess -d {_number(target.name)} -c 3d_fullres"
    )
    return target


def _dataset_name(dataset: str, folder: str, raw: Path) -> str:
    """The name of the new data set, which no other one has."""
    if dataset.isdecimal() and 0 < int(dataset) < 1000:
        name = "".join(word[:1].upper() + word[1:] for word in re.findall("[A-Za-z0-9]+", Path(folder).resolve().name))
        dataset = f"Dataset{int(dataset):03d}_{name or 'Scans'}"
    if not _DATASET.fullmatch(dataset):
        raise OneShotError(f"-d {dataset}: expected a number from 1 to 999, or a name such as Dataset005_Liver.")
    check_name(dataset, "data set", "-d")
    if not raw.is_dir():
        raise OneShotError(f"{raw} is not a folder: make it, or correct the environment variable nnUNet_raw.")
    number = _number(dataset)
    taken = [path.name for path in raw.iterdir() if (m := _DATASET.fullmatch(path.name)) and int(m[1]) == number]
    if taken:
        raise OneShotError(f"{raw / taken[0]} exists already: give another number with -d, or move it away.")
    return dataset


def _number(name: str) -> int:
    return int(name[len("Dataset") :][:3])


def _channel_names(scans: Sequence[Scan], channels: Sequence[str] | None) -> list[str]:
    """Names of the channels, and the check that all scans have as many."""
    count = len(scans[0].channels)
    other = next((scan for scan in scans if len(scan.channels) != count), None)
    if other is not None:
        raise OneShotError(
            f"{scans[0].source} has {count} channels and {other.source} {len(other.channels)}: all need the same."
        )
    if channels is not None:
        if len(channels) != count:
            raise OneShotError(f"--channels gives {len(channels)} names, but the scans have {count} channels.")
        return list(channels)
    found = sorted({scan.modality or "" for scan in scans})
    if len(found) == 1 and found[0] in _CHANNELS:
        return [_CHANNELS[found[0]]]
    what = f"DICOM's modalities {listed(filter(None, found))}" if any(found) else "their files do not say it"
    raise OneShotError(
        f"What the {count} channel(s) of the scans show is not known ({what}): name them with --channels, CT for "
        f"computed tomography, which nnU-Net normalises in its own way, or any name such as MR."
    )


def _check_labelled(scans: Sequence[Scan], labels: Sequence[tuple[str, str]]) -> None:
    known = {scan.name for scan in scans}
    for case, file in labels:
        if case not in known:
            raise OneShotError(
                f"--label {case}: there is no such scan. The first argument is the name of a case: "
                f"{listed(sorted(known))}."
            )
        if not os.path.isfile(file):
            raise OneShotError(f"--label {case} {file}: there is no such file.")


def _written(scans: Sequence[Scan], folder: Path, num_processes: int, description: str) -> list[Scan]:
    """Writes the scans; returns those that could be read, after telling the others."""
    folder.mkdir()
    problems = run_on_cases(
        _write_scan, [(scan, folder) for scan in scans], num_processes=num_processes, description=description
    )
    for problem in filter(None, problems):
        print(f"Left out: {problem}")
    return [scan for scan, problem in zip(scans, problems, strict=True) if not problem]


def _write_scan(scan: Scan, folder: Path) -> str | None:
    """Writes the channels of a scan; returns why it cannot be used."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        images = [read_scan(files) for files in scan.channels]
    except OneShotError as error:
        return str(error)
    for number, (files, image) in enumerate(zip(scan.channels, images, strict=True)):
        target = folder / f"{scan.name}_{number:04d}{ENDING}"
        if files[0].endswith(ENDING) and _axes(files[0]) == 3:
            # As it is, with its whole header.
            shutil.copyfile(files[0], target)
        else:
            sitk.WriteImage(image, str(target), useCompression=True)
    return None


def _axes(path: str) -> int:
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader.GetDimension()


def _write_labels(labels: Sequence[tuple[str, str]], folder: Path, label_names: Sequence[str] | None) -> dict[str, int]:
    """Writes the labels with consecutive numbers; returns ``labels`` of ``dataset.json``."""
    (folder / "labelsTr").mkdir()
    read: dict[str, sitk.Image] = {}
    found: dict[int, str] = {}
    for case, file in labels:
        path = folder / "imagesTr" / f"{case}_0000{ENDING}"
        read[case], named = read_drawn_label(file, sitk.ReadImage(str(path)), f"the scan {case}")
        found.update(named)
    numbers, declared = renumbered([sitk.GetArrayViewFromImage(label) for label in read.values()], found, label_names)
    changed = {value: number for value, number in numbers.items() if value != number}
    if changed:
        told = ", ".join(f"{value} is now {number}" for value, number in changed.items())
        print(f"nnU-Net needs consecutive labels: {told}.")
    for case, label in read.items():
        # Simultaneously, so that no new number is changed again.
        result = sitk.ChangeLabel(label, {float(value): float(number) for value, number in changed.items()})
        sitk.WriteImage(result, str(folder / "labelsTr" / f"{case}{ENDING}"), useCompression=True)
    return declared


def _describe(folder: Path, name: str, channels: Sequence[str], labels: dict[str, int], count: int) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    generate_dataset_json(
        str(folder),
        {str(number): channel for number, channel in enumerate(channels)},
        dict(labels),
        count,
        ENDING,
        dataset_name=name,
        license="",
        converted_by="nnunet_oneshot import",
    )
