import pytest
import torch

from nnunet_oneshot.checkpoints import loading_checkpoint, saving_checkpoint
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
