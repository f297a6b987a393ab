"""What the first stage of a cascade leaves to the second: segmentations in the grid of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_oneshot.data.preprocessed import open_array
from nnunet_oneshot.errors import OneShotError, listed

# In the folder of a fold: nnU-Net's own place is one for all folds, whose models learn from different labels.
NEXT_STAGE = "predicted_next_stage"
_ENDINGS = (".b2nd", ".npy", ".npz")


@dataclass(frozen=True)
class PreviousStage:
    """The segmentations by a trained first stage.

    Attributes:
        folder: Holds one file a case, in nnU-Net's format.
        command: Trains the first stage.
    """

    folder: Path
    command: str

    def open(self, case: str) -> Any:
        """The segmentation of a case, (X, Y, Z) integers; a slice of it is a numpy array.

        Raises:
            OneShotError: It is missing or unreadable.
        """
        what = f"segmentation of {case} by the previous stage"
        advice = f"Repeat the validation of that stage, which writes it: `{self.command} --val`."
        return open_array(str(self.folder), case, what=what, key="seg", axes=3, advice=advice)

    def check(self, cases: Sequence[str], shape_of: Callable[[str], tuple[int, ...]]) -> None:
        """Makes sure that there is a segmentation of each case.

        Args:
            cases: Names of cases.
            shape_of: Gives the voxels of a case's image.

        Raises:
            OneShotError: Cases have none, or one in another grid than that of the image.
        """
        missing = [case for case in cases if not any((self.folder / f"{case}{end}").is_file() for end in _ENDINGS)]
        if missing:
            raise OneShotError(
                f"{self.folder} holds no segmentation by the previous stage of {listed(missing)}; the second stage of "
                f"a cascade needs those of all {len(cases)} cases of the fold. Train the previous stage first: "
                f"`{self.command}`. If it is trained already, add --val, which repeats its validation and writes them."
            )
        for case in cases:
            found, expected = tuple(self.open(case).shape), shape_of(case)
            if found != expected:
                raise OneShotError(
                    f"The segmentation of {case} by the previous stage in {self.folder} has {found} voxels, its "
                    f"preprocessed image {expected}: the images were preprocessed anew since. Write it again: "
                    f"`{self.command} --val`."
                )
