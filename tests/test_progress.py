"""Progress: sparse lines in a log, bars in a terminal, and estimates that the first step does not mislead."""

import sys

import pytest

from nnunet_oneshot.progress import Progress, Status, duration, tracked


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def in_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_the_first_step_does_not_count_for_the_time_left():
    clock = Clock()
    progress = Progress(11, "Registering", show=False, clock=clock)
    assert "not known" in progress.estimate()
    clock.now = 500
    progress.update()
    assert "not known" in progress.estimate()
    for _ in range(2):
        clock.now += 4
        progress.update()
    assert progress.estimate() == "4 s each, 32 s left"


def test_a_first_batch_does_not_count_either_and_later_steps_are_told():
    clock = Clock()
    progress = Progress(250, "Epoch 0", later=750, show=False, clock=clock)
    clock.now = 100
    progress.update(50)
    clock.now += 100
    progress.update(50)
    assert progress.estimate() == "2 s each, 5 min left, 30 min until all is done"


def take_steps(progress, clock, steps):
    for _ in range(steps):
        clock.now += 1
        progress.update()


def test_a_log_gets_a_line_every_ten_seconds_and_after_a_minute_one_a_minute(capsys):
    clock = Clock()
    with Progress(1000, "Registering", clock=clock) as progress:
        take_steps(progress, clock, 9)
        assert capsys.readouterr().err == ""
        take_steps(progress, clock, 171)
    told = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()]
    assert told == [10, 20, 30, 40, 50, 110, 170]


def test_a_later_part_of_a_long_step_is_told_once_a_minute_and_its_end_not_at_all(capsys):
    clock = Clock()
    clock.now = 1000
    with Progress(120, "Epoch 7", begun=0.0, clock=clock) as progress:
        take_steps(progress, clock, 120)
    assert capsys.readouterr().err == "Epoch 7: 60 of 120, 1 s each, 60 s left\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    in_terminal(monkeypatch)
    assert list(tracked(iter("abc"), 3, "Reading")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "Reading: 100%" in shown and "3/3" in shown and "s each" in shown


def test_nothing_is_shown_where_nothing_is_wanted(monkeypatch, capsys):
    in_terminal(monkeypatch)
    with Progress(2, "Reading", show=False) as progress:
        progress.update(2)
    assert capsys.readouterr().err == ""


def test_a_status_is_written_over_in_a_terminal_and_rare_in_a_log(monkeypatch, capsys):
    clock = Clock()
    status = Status(clock)
    for _ in range(130):
        clock.now += 1
        status.tell(f"after {clock.now:.0f} s")
    assert capsys.readouterr().err == "after 60 s\nafter 120 s\n"
    in_terminal(monkeypatch)
    status.tell("now")
    assert capsys.readouterr().err.startswith("\rnow ")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (150, "2 min"), (5400, "1.5 h"), (86400, "24 h"), (200000, "2.3 d")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
