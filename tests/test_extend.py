"""The examples of docs/how_to/extend.md: each new entry works wherever its name can be given."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import student
from tiny_volumes import blobs

from nnunet_oneshot.benchmarks.registration_worker import Worker
from nnunet_oneshot.cli import main
from nnunet_oneshot.config import DistillationConfig, OneShotConfig, RegistrationConfig
from nnunet_oneshot.distillation.features import decoder_features
from nnunet_oneshot.distillation.teacher import Distiller
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.methods import parse_method
from nnunet_oneshot.evaluation.registration_methods import MethodOptions
from nnunet_oneshot.registration.pair.registrar import register_arrays
from nnunet_oneshot.registries import ABLATIONS, HINTS, REGISTRATION_METHODS, SIMILARITIES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how_to" / "extend.md"
ADDED = ((SIMILARITIES, "l1"), (HINTS, "squared"), (REGISTRATION_METHODS, "stretch"), (ABLATIONS, "no-affine"))


@pytest.fixture(autouse=True)
def _entries():
    """Runs the page's blocks, and takes their entries out again."""
    torch.set_num_threads(1)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == len(ADDED)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    yield "\n".join(blocks)
    for registry, name in ADDED:
        registry.remove(name)


def test_every_entry_has_a_meaning_for_the_reference():
    for registry, name in ADDED:
        assert registry.meaning(name).endswith(".") and len(registry.meaning(name)) > 20


def test_the_similarity_registers_a_pair():
    moving = blobs((20, 22, 18))
    fixed = np.roll(moving, 2, axis=1)
    config = RegistrationConfig(similarity="l1", affine=False, refine_iterations=(30,), smoothness=0.01)
    pair = register_arrays(moving, fixed, atlas_spacing=(1.0,) * 3, case_spacing=(1.0,) * 3, config=config)
    assert pair.quality["similarity_after"] > pair.quality["similarity_before"] + 0.1
    assert pair.velocity[0].mean() < -0.5


def test_settings_know_the_names_and_no_others():
    block = {"registration": {"similarity": "l1"}, "distillation": {"hint": "squared"}}
    config = OneShotConfig.from_plans({"oneshot": block})
    assert (config.registration.similarity, config.distillation.hint) == ("l1", "squared")
    with pytest.raises(OneShotError, match="l1"):
        OneShotConfig.from_plans({"oneshot": {"registration": {"similarity": "l3"}}})


def test_the_hint_draws_the_student_to_the_teacher():
    torch.manual_seed(0)
    network, teacher = student(2), student(2, deep_supervision=False)
    own = Distiller(teacher, DistillationConfig(hint="squared"))
    image = torch.rand(2, 1, 16, 16)
    features = [level.detach() for level in decoder_features(teacher, image)[1]]
    hint = own.hint(decoder_features(network, image)[1], features, hint_weight=1.0)
    hint.backward()
    assert hint.item() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own.projections.parameters())


def test_the_baseline_propagates_labels(prepared_dataset, tmp_path):
    dataset = prepared_dataset(n_cases=5)
    command = ["propagate", "-d", str(dataset.id), "-c", "3d_fullres", "-p", "nnUNetOneShotCPUPlans"]
    # Choices of an option are read when the command is given, so that the new name is among them.
    assert main([*command, "-o", str(tmp_path / "out"), "--method", "stretch"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["foreground_mean"]["Dice"] > 0.4


@pytest.fixture
def own_module(_entries, tmp_path, monkeypatch):
    """The page's entries as a module, which the processes that are started are told of as the page says."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my_entries.py").write_text(_entries, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("nnUNet_oneshot_modules", "my_entries")


def test_a_module_of_the_user_reaches_the_benchmark(own_module, prepared_dataset, tmp_path, monkeypatch):
    # This process has the entries already, so that it cannot import them too.
    with monkeypatch.context() as here:
        here.delenv("nnUNet_oneshot_modules")
        dataset = prepared_dataset(n_cases=5)
    command = ["benchmark", "-d", str(dataset.id), "-c", "3d_fullres", "-p", "nnUNetOneShotCPUPlans"]
    command += ["--methods", "stretch", "affine", "-o", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-m", "nnunet_oneshot.cli", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["method"] for row in rows} == {"affine", "stretch"}


def test_a_module_of_the_user_reaches_the_process_of_a_method(own_module):
    worker = Worker("stretch", MethodOptions(RegistrationConfig()))
    case, atlas = ((blobs(shape), (1.0,) * 3) for shape in ((6, 7, 8), (11, 7, 8)))
    try:
        places = worker.measure(case, atlas)["places"]
    finally:
        worker.close()
    assert places.shape == (3, 6, 7, 8) and places[0, :, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]


def test_the_ablation_gives_its_settings():
    assert parse_method("distill:no-affine").overrides == {"registration": {"affine": False}}
