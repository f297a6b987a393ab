"""Hints: losses that pull the student's features towards the teacher's, each a registered entry.

The plans' ``distillation.hint`` names one of `HINTS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nnunet_oneshot.distillation.functional import global_cosine_hint, voxel_cosine_hint
from nnunet_oneshot.registry import Registry


@dataclass(frozen=True)
class Hint:
    """An entry of `HINTS`.

    Attributes:
        loss: (student, teacher), features (B, C, *spatial) of one level each -> a scalar.
        projects: Whether a learned projection is applied to the student's features before the comparison.
        teaches: Whether the student learns from a teacher; otherwise no teacher is trained.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    projects: bool = False
    teaches: bool = True

    @property
    def meaning(self) -> str:
        """What it compares, from the docstring of its function."""
        return inspect.getdoc(self.loss) or ""


HINTS: Registry[Hint] = Registry("hint", setting="hint")


@HINTS.register("voxel", Hint, projects=True)
def voxel(student: Tensor, teacher: Tensor) -> Tensor:
    """One cosine per voxel, after a learned projection of the student's features."""
    return voxel_cosine_hint(student, teacher)


@HINTS.register("voxel_raw", Hint)
def voxel_raw(student: Tensor, teacher: Tensor) -> Tensor:
    """One cosine per voxel, of the student's unprojected features."""
    return voxel_cosine_hint(student, teacher)


@HINTS.register("global", Hint)
def whole(student: Tensor, teacher: Tensor) -> Tensor:
    """One cosine per level, over all voxels and channels, as in arXiv 2408.03616."""
    return global_cosine_hint(student, teacher)


@HINTS.register("none", Hint, teaches=False)
def none(student: Tensor, teacher: Tensor) -> Tensor:
    """No hint; no teacher is trained."""
    return student.new_zeros(())
