import pytest
import torch

from nnunet_oneshot import devices
from nnunet_oneshot.cli import main
from nnunet_oneshot.devices import host_threads, usable_device
from nnunet_oneshot.errors import OneShotError


def test_a_device_that_is_there():
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(OneShotError, match=f"Device '{name}' is not available"):
        usable_device(name)


@pytest.mark.parametrize(("kind", "expected"), [("cuda", 3), ("cpu", 1)])
def test_a_host_beside_a_gpu_gets_its_cores(kind, expected, monkeypatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(KeyError), host_threads(torch.device(kind)):
            assert torch.get_num_threads() == expected
            raise KeyError
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "command",
    [
        ["register"],
        ["propagate", "-o", "out"],
        ["benchmark", "-o", "out"],
        ["export", "-tr", "OneShotDistillTrainer", "-o", "out"],
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_a_device_that_is_not_there(command, tiny_dataset, monkeypatch, tmp_path, capsys):
    dataset = tiny_dataset(3)
    planned = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres"]
    assert main([*planned, "-np", "1", "-npfp", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    name, *options = command
    plans = ["-d", str(dataset.id), "-c", "3d_fullres", "-p", "nnUNetOneShotCPUPlans"]
    assert main([name, *plans, *options, "--device", "abacus"]) == 1
    assert "Device 'abacus' is not available" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_mps_lacks_is_named_with_the_way_out(monkeypatch):
    import nnunet_oneshot.devices as module

    def lacks(volume):
        raise NotImplementedError("The operator 'aten::_adaptive_avg_pool3d' is not currently implemented for MPS")

    for name, run in module._OPERATIONS.items():
        assert module._runs(run, torch.device("cpu")), name
    original = module._runs
    monkeypatch.setattr(module, "_runs", lambda run, device: original(run, torch.device("cpu")))
    module.check_operations(torch.device("mps"))
    monkeypatch.setitem(module._OPERATIONS, "adaptive_avg_pool3d", lacks)
    with pytest.raises(OneShotError, match="adaptive_avg_pool3d. Set PYTORCH_ENABLE_MPS_FALLBACK=1"):
        module.check_operations(torch.device("mps"))
    module.check_operations(torch.device("cpu"))
