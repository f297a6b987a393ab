"""Hints: losses that draw the student's features to the teacher's, each one registered entry.

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
        projects: Whether the student's features pass a learned projection before they are compared.
        teaches: Whether the student hears of the teacher at all; otherwise no teacher is trained.
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
    """One cosine at every place, after a learned projection of the student's features."""
    return voxel_cosine_hint(student, teacher)


@HINTS.register("voxel_raw", Hint)
def voxel_raw(student: Tensor, teacher: Tensor) -> Tensor:
    """One cosine at every place, of the student's features as they are."""
    return voxel_cosine_hint(student, teacher)


@HINTS.register("global", Hint)
def whole(student: Tensor, teacher: Tensor) -> Tensor:
    """One cosine a level, over all places and channels: the form of arXiv 2408.03616."""
    return global_cosine_hint(student, teacher)


@HINTS.register("none", Hint, teaches=False)
def none(student: Tensor, teacher: Tensor) -> Tensor:
    """No hint; no teacher is trained."""
    return student.new_zeros(())
