"""One part of a dataset's cases, for job arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_oneshot.errors import OneShotError


@dataclass(frozen=True)
class Part:
    """One of several parts of equal size that share no case.

    Attributes:
        number: Which, from 0.
        count: How many there are.

    Raises:
        OneShotError: There is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise OneShotError(f"--num_parts is {self.count}: give the number of parts, 1 or more.")
        if not 0 <= self.number < self.count:
            raise OneShotError(
                f"--part_id is {self.number}, but the parts are numbered from 0 to {self.count - 1} (--num_parts "
                f"{self.count}): give one of these numbers. Job arrays often count from 1."
            )

    def of(self, cases: Sequence[str], everything: Sequence[str]) -> list[str]:
        """Those of ``cases`` that belong to this part.

        Args:
            cases: Some cases of the dataset.
            everything: All of them. Folds hold different cases; a case belongs to the same part in each.
        """
        own = set(sorted(everything)[self.number :: self.count])
        return [case for case in cases if case in own]
