import os

import numpy as np
import pytest
import torch

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint, saving_checkpoint
from nnunet_oneshot.errors import OneShotError


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_the_device_reports_is_not_blamed_on_the_file(error, tmp_path):
    with pytest.raises(error), loading_checkpoint(tmp_path / "a.pth", advice="Delete it."):
        raise error("CUDA out of memory")
    with pytest.raises(error), saving_checkpoint(tmp_path / "a.pth"):
        raise error("CUDA out of memory")


def test_other_errors_of_torch_are(tmp_path):
    damaged = pytest.raises(OneShotError, match=r"a\.pth .* is damaged .* Delete it\.")
    with damaged, loading_checkpoint(tmp_path / "a.pth", advice="Delete it."):
        raise RuntimeError("size mismatch")
    with pytest.raises(OneShotError, match="could not be written"), saving_checkpoint(tmp_path / "a.pth"):
        raise RuntimeError("file write failed")


class Harmful:
    """What a crafted checkpoint may hold: a call of anything."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def test_what_nnunet_stores_is_read_as_data(tmp_path):
    content = {
        "network_weights": {"w": torch.ones(2)},
        "logging": {"dice": [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True)], "names": ["a"]},
        "init_args": {"device": torch.device("cpu"), "fold": 0, "plans": {"a": [1, None, 2.5]}},
        "current_epoch": 3,
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    found = load_data(tmp_path / "checkpoint.pth")
    assert found["logging"] == content["logging"] and found["init_args"] == content["init_args"]
    assert torch.equal(found["network_weights"]["w"], torch.ones(2))


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path):
    torch.save({"network_weights": Harmful(tmp_path / "ran")}, tmp_path / "checkpoint.pth")
    with pytest.raises(OneShotError, match=r"checkpoint.pth holds more than numbers and weights \(.*mkdir\)"):
        load_data(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_stays_a_damaged_file(tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"x" * 100)
    with pytest.raises(OneShotError, match="is damaged"), loading_checkpoint(tmp_path / "checkpoint.pth", advice=""):
        load_data(tmp_path / "checkpoint.pth")
