"""What nnU-Net's commands say, once they have loaded our trainers, about what a user can mend: a sentence."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from nnunet_oneshot.errors import NotReadyError, OneShotError, told

_NO_TRAINER = re.compile(r"Could not find requested nnunet trainer (\S+) in ")
_NO_DATASET = "Could not find a dataset with the ID"


@lru_cache(maxsize=1)
def explain_mistakes(trainers: tuple[str, ...]) -> None:
    """From now on an error that ends this process and that a user can mend ends it with a sentence, not a traceback.

    Args:
        trainers: Names of our trainers, among which a wrong name is looked for.
    """
    before = sys.excepthook

    def hook(kind, error, trace) -> None:
        sentence = explained(error, trainers)
        if sentence is None:
            before(kind, error, trace)
        else:
            print(sentence, file=sys.stderr)

    sys.excepthook = hook


def explained(error: BaseException, trainers: Sequence[str]) -> str | None:
    """What the user is told of an error; None where only a traceback helps.

    Args:
        error: What nothing has caught.
        trainers: Names of our trainers.
    """
    if isinstance(error, KeyboardInterrupt):
        return "\nInterrupted. A training goes on with --c, a validation is repeated with --val."
    if isinstance(error, OneShotError):
        return told(error)
    if isinstance(error, FileNotFoundError):
        return _missing_plans(Path(str(error.filename)))
    if isinstance(error, RuntimeError) and str(error).startswith(_NO_DATASET):
        return told(NotReadyError(str(error)))
    if isinstance(error, RuntimeError) and (found := _NO_TRAINER.match(str(error))):
        near = difflib.get_close_matches(found[1], trainers, cutoff=0.4) or list(trainers[:4])
        return told(OneShotError(f"There is no trainer {found[1]!r}: correct -tr. Names like it: {', '.join(near)}."))
    return None


def _missing_plans(path: Path) -> str | None:
    """What is told where nnU-Net misses a plans file, as where -p is wrong or left out."""
    folder = os.environ.get("nnUNet_preprocessed")
    if folder is None or path.suffix != ".json" or path.absolute().parent.parent != Path(folder).absolute():
        return None
    dataset = path.parent.name
    present = sorted(file.stem for file in path.parent.glob("*Plans*.json"))
    has = f"has the plans {', '.join(present)}: give one of them with -p" if present else "has no plans"
    return told(
        NotReadyError(
            f"{path} does not exist. {dataset} {has}, or plan it: nnunet_oneshot plan_and_preprocess -d {dataset} "
            f"-c 3d_fullres makes nnUNetOneShotPlans."
        ),
        dataset=dataset,
    )
