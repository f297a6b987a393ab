"""What counts as equal: images, registrations and networks, to the bit."""

import numpy as np
import pytest
import torch
from tiny_data import write_image

from nnunet_oneshot.benchmarks.equality import main

VALUE = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)


def write(folder, *, image=VALUE, spacing=(1.0, 1.0, 2.0), velocity=VALUE, weight=VALUE):
    (folder / "sub").mkdir(parents=True)
    write_image(folder / "case.nii.gz", image, spacing)
    np.savez(folder / "sub" / "pair.npz", velocity=velocity)
    torch.save({"network_weights": {"w": torch.from_numpy(weight)}, "logging": 3}, folder / "checkpoint_final.pth")
    (folder / "log.txt").write_text(str(folder))
    return folder


def compared(capsys, before, after):
    status = main([str(before), str(after)])
    return status, capsys.readouterr()


def test_equal_results_are_equal_whatever_the_logs_say(tmp_path, capsys):
    status, printed = compared(capsys, write(tmp_path / "a"), write(tmp_path / "b"))
    assert status == 0
    assert printed.out.count("1 of 1 files are equal to the bit") == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image": VALUE + np.float32(1e-6)}, "case.nii.gz: voxels"),
        ({"spacing": (1.0, 1.0, 2.5)}, "case.nii.gz: geometry"),
        ({"velocity": VALUE.astype(np.float64)}, "pair.npz: velocity is (3, 4, 5) float32 and (3, 4, 5) float64"),
        ({"weight": np.nextafter(VALUE, np.float32(2))}, "checkpoint_final.pth: w differs in 60 of 60 values"),
    ],
)
def test_the_least_difference_is_named(tmp_path, capsys, change, named):
    status, printed = compared(capsys, write(tmp_path / "a"), write(tmp_path / "b", **change))
    assert status == 1
    assert named in printed.out and "differ" in printed.err


def test_a_file_that_only_one_run_wrote_is_a_difference(tmp_path, capsys):
    before, after = write(tmp_path / "a"), write(tmp_path / "b")
    (after / "case.nii.gz").unlink()
    status, printed = compared(capsys, before, after)
    assert status == 1 and "case.nii.gz is missing in" in printed.out


def test_nothing_to_compare_is_an_error(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    status, printed = compared(capsys, tmp_path / "a", tmp_path / "a")
    assert status == 1 and "nothing to compare" in printed.err
    status, printed = compared(capsys, tmp_path / "a", tmp_path / "none")
    assert status == 1 and "is no folder" in printed.err
