"""How far a long step is: a bar in a terminal; in a log file a line a minute, at first one every ten seconds."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS = 60.0, 10.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress:
    """Steps of which some are done. Speed and time left are judged from the second on.

    The first takes what is made only once with it: files are read, processes are started, code is compiled.

    Args:
        total: How many steps there are.
        description: What they are, such as ``"Registering"``.
        later: How many such steps come after these, whose time is told too.
        show: Whether anything is shown.
        begun: When that of which these steps are a part began, by ``clock``; None is now. In the minute after it more
            lines are shown.
        clock: Gives the time, s.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        later: int = 0,
        show: bool = True,
        begun: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._description, self._later, self._clock = total, description, later, clock
        self._done = 0
        self._first: tuple[int, float] | None = None
        self._told = clock()
        self._begun = self._told if begun is None else begun
        is_terminal = show and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=description, bar_format=_BAR) if is_terminal else None
        self._lines = show and not is_terminal

    def update(self, number: int = 1) -> None:
        """Notes that so many further steps are done."""
        self._done += number
        now = self._clock()
        if self._first is None:
            self._first = (self._done, now)
        if self._bar is not None:
            self._bar.set_postfix_str(self.estimate(), refresh=False)
            self._bar.update(number)
        elif self._lines and self._done < self._total and now - self._told >= self._pause(now):
            self._told = now
            print(f"{self._description}: {self._done} of {self._total}, {self.estimate()}", file=sys.stderr, flush=True)

    def _pause(self, now: float) -> float:
        return _FIRST_PAUSE_SECONDS if now - self._begun < _PAUSE_SECONDS else _PAUSE_SECONDS

    def estimate(self) -> str:
        """Speed and time left, in words; before two steps are done, that they are not known."""
        if self._first is None or self._done <= self._first[0]:
            return "time left is not known yet"
        seconds = (self._clock() - self._first[1]) / (self._done - self._first[0])
        left = f"{seconds:.2g} s each, {duration(seconds * (self._total - self._done))} left"
        return (
            f"{left}, {duration(seconds * (self._total - self._done + self._later))} until all is done"
            if self._later
            else left
        )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def tracked(steps: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The same items; how many have been dealt with is shown."""
    with Progress(total, description) as progress:
        for step in steps:
            yield step
            progress.update()


class Status:
    """What goes on where nothing can be counted: in a terminal a line that is written over, else one now and then.

    Args:
        clock: Gives the time, s.
        pause: Seconds between lines where there is no terminal.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, pause: float = _PAUSE_SECONDS) -> None:
        self._clock, self._pause = clock, pause
        self._told = clock()

    def tell(self, text: str) -> None:
        """Shows what goes on now."""
        now = self._clock()
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        elif now - self._told >= self._pause:
            self._told = now
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Makes room for the next line."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A length of time in words, such as ``"3 min"``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:.1f} {unit}" if number < 10 and unit != "min" else f"{number:.0f} {unit}"
    return f"{seconds:.0f} s"
