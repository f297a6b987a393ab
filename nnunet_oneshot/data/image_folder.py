"""A folder of images that is not a data set yet: no ``dataset.json``, no labels."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnunet_oneshot.data.raw import RawDataset, visible_files
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.names import check_name

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>[0-9]{4})")


class ImageFolder(RawDataset):
    """Images in one folder, as a data set without labels.

    Files named CASE_0000, CASE_0001, ... are the channels of one case where every case has the same channels from 0000
    on; otherwise each file is a case, so that numbered scans (scan_0001, scan_0002, ...) are not taken for channels.

    Args:
        folder: The folder.
        file_ending: Suffix of the images.

    Raises:
        OneShotError: The folder or images in it do not exist.
    """

    def __init__(self, folder: str | os.PathLike, *, file_ending: str = ".nii.gz") -> None:
        from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        if not self.folder.is_dir():
            raise OneShotError(f"{self.folder} is not a folder: name the folder that holds the images.")
        ending = file_ending if file_ending.startswith(".") else f".{file_ending}"
        names = [
            check_name(name[: -len(ending)], "image", self.folder / name) for name in visible_files(self.folder, ending)
        ]
        if not names:
            present = sorted({"".join(entry.suffixes[-2:]) for entry in self.folder.iterdir() if entry.is_file()})
            raise OneShotError(
                f"{self.folder} holds no file that ends in {ending}: give the suffix with --file_ending. "
                f"Suffixes there: {', '.join(present) or 'none'}."
            )
        known = sorted({suffix for reader in LIST_OF_IO_CLASSES for suffix in reader.supported_file_endings})
        if ending.lower() not in known:
            raise OneShotError(f"Images that end in {ending!r} cannot be read: nnU-Net reads {', '.join(known)}.")
        grouped = channels_of(names) or {name: [name] for name in names}
        self._files = {
            case: ([str(self.folder / f"{part}{ending}") for part in parts], None) for case, parts in grouped.items()
        }
        self.cases = sorted(self._files)
        self.labelled = []
        self.dataset_json = {"file_ending": ending, "labels": {}}
        # What a single file holds, such as the colours of a photograph, is known once it is read.
        data, _ = self._first_image()
        self.dataset_json["channel_names"] = {str(number): f"channel {number}" for number in range(len(data))}

    def _first_image(self):
        case = self.cases[0]
        reader = self.reader_class()
        try:
            return reader.read_images(self.images(case))
        # Readers raise whatever the underlying library raises.
        except Exception as error:
            detail = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OneShotError(f"Case {case}: {', '.join(self.images(case))} cannot be read ({detail}).") from error


def channels_of(names: list[str]) -> dict[str, list[str]]:
    """File names of each case's channels, or nothing where the names do not look like channels."""
    matches = [match for name in names if (match := _CHANNEL.fullmatch(name))]
    if not matches or len(matches) < len(names):
        return {}
    grouped: dict[str, list[str]] = {}
    for match in matches:
        grouped.setdefault(match["case"], []).append(match.string)
    count = len(next(iter(grouped.values())))
    expected = [f"{number:04d}" for number in range(count)]
    regular = all([part[-4:] for part in parts] == expected for parts in grouped.values())
    return grouped if regular and len(grouped) > 1 else {}
