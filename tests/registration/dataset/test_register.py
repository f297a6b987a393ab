"""Registrations of a dataset: what is cached, what is computed again, and which settings share a network."""

import json
import os

import numpy as np
import pytest
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.config import DistillationConfig, OneShotConfig, RegistrationConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.registration.dataset import register as module
from nnunet_oneshot.self_training.guide import SegmentingGuide

PLANS = "nnUNetOneShotCPUPlans"


@pytest.fixture
def prepared(tiny_dataset):
    torch.set_num_threads(1)
    dataset = tiny_dataset(n_cases=4)
    plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    assert main(plan) == 0
    return dataset


def register(dataset, monkeypatch, capsys, **settings):
    """What the command printed, and the files that it left: path -> content."""
    overrides = {"registration": {"refine_iterations": [2, 2], **settings}}
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(overrides))
    capsys.readouterr()
    assert main(["register", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS, "--no_figures"]) == 0
    base = dataset.preprocessed / "oneshot_registrations"
    return capsys.readouterr().out, {p: p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}


def test_finished_pairs_are_kept_and_damaged_ones_computed_again(prepared, monkeypatch, capsys):
    _, first = register(prepared, monkeypatch, capsys)
    printed, second = register(prepared, monkeypatch, capsys)
    assert second == first and "are cached" in printed
    arrays = [path for path in first if path.suffix == ".npz"]
    assert len(arrays) == 3
    arrays[0].write_bytes(first[arrays[0]][:-20])
    arrays[1].with_suffix(".json").write_text("{not json")
    printed, third = register(prepared, monkeypatch, capsys)
    assert printed.count("is damaged") == 2 and "2 of 3 pairs" in printed
    assert set(third) == set(first)
    cache = module.RegistrationCache(arrays[0].parent.parent)
    for path in arrays:
        assert np.isfinite(cache.load("case_00", path.stem).velocity).all()


def test_files_that_have_not_changed_are_not_read(prepared, monkeypatch, capsys):
    read = []
    original = PreparedDataset.image
    monkeypatch.setattr(PreparedDataset, "image", lambda self, case: read.append(case) or original(self, case))
    register(prepared, monkeypatch, capsys)
    read.clear()
    register(prepared, monkeypatch, capsys)
    assert read == ["case_00"]
    dataset = PreparedDataset.open(dataset=prepared.id, plans_name=PLANS, configuration="3d_fullres")
    touched, changed = (next(dataset.folder.glob(f"case_0{number}.b2nd")) for number in (1, 2))
    os.utime(touched)
    changed.write_bytes((dataset.folder / "case_03.b2nd").read_bytes())
    read.clear()
    printed, _ = register(prepared, monkeypatch, capsys)
    # The first of both holds the same as before, which is noted; the other one is registered again.
    assert "1 of 3 pairs" in printed and set(read) == {"case_00", "case_01", "case_02"}
    read.clear()
    assert "are cached" in register(prepared, monkeypatch, capsys)[0] and read == ["case_00"]


def test_other_settings_are_another_registration(prepared, monkeypatch, capsys):
    register(prepared, monkeypatch, capsys)
    assert "3 of 3 pairs" in register(prepared, monkeypatch, capsys, smoothness=1.0)[0]


def test_an_affine_stage_that_finds_nothing_is_told(prepared, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_oneshot.registration.pair.affine._LARGEST_STRETCH", 0.5)
    printed, _ = register(prepared, monkeypatch, capsys)
    assert "Warning: the affine stage found nothing better" in printed and "case_01" in printed


class FixedGuide(SegmentingGuide):
    """Finds each label of the atlas where a displacement carries it, in every case."""

    def __init__(self, labels, segmentation, shift, trust):
        self.labels = labels
        self.shift = shift
        self.trust = np.full(len(labels.foreground_labels), trust)
        self.moved = np.roll(segmentation, shift, axis=1)

    @property
    def digest(self):
        return f"shifted by {self.shift}, trusted by {self.trust}"

    def describe(self):
        return "Guided by fixed labels."

    def probabilities(self, image):
        maps = np.zeros((len(self.labels.foreground_labels), *image.shape[1:]), np.float32)
        box = tuple(slice(0, min(pair)) for pair in zip(image.shape[1:], self.moved.shape[1:], strict=True))
        for index, label in enumerate(self.labels.foreground_labels):
            maps[(index, *box)] = self.moved[(0, *box)] == label
        return maps


def again(dataset, first, student, folder, log, **settings):
    """`register_again` for the tiny dataset."""
    config = OneShotConfig(
        registration=RegistrationConfig(**settings), distillation=DistillationConfig(guide_weight=1.0)
    )
    registrar = module.DatasetRegistrar(dataset, config, ["case_00"], torch.device("cpu"), log.append)
    return registrar.register_again(["case_01", "case_02"], first=first, guide=student, folder=folder)


def test_pairs_are_registered_again_under_a_guide(prepared, monkeypatch, capsys):
    dataset = PreparedDataset.open(dataset=prepared.id, plans_name=PLANS, configuration="3d_fullres")
    atlas = dataset.image("case_00")
    monkeypatch.setattr(PreparedDataset, "image", lambda self, case: atlas)
    register(prepared, monkeypatch, capsys)
    first = module.RegistrationCache(prepared.preprocessed / "oneshot_registrations" / dataset.folder.name)
    settings = {"method": "network", "refine_iterations": (10, 10), "guide_weight": 0.0}
    displacements, cached = [], []
    for shift, trust in ((0, 1.0), (2, 1.0), (2, 1.0), (2, 0.0), (0, 0.0)):
        log = []
        guide = FixedGuide(dataset.label_manager, dataset.segmentation("case_00"), shift, trust)
        cache = again(dataset, first, guide, prepared.preprocessed / "again", log, **settings)
        pair = cache.load("case_00", "case_01")
        assert np.array_equal(pair.affine, first.load("case_00", "case_01").affine)
        assert cache.path("case_00", "case_02", ".png").is_file()
        displacements.append(pair.velocity[0].min())
        cached.append("are cached in" in log[-1])
    assert cached == [False, False, True, False, False]
    assert displacements[1] == displacements[2] < displacements[0] - 0.5
    # What nobody trusts changes nothing, wherever it points.
    assert displacements[3] == pytest.approx(displacements[4], abs=1e-4)
    assert displacements[1] < displacements[3] - 0.5


def test_methods_share_one_network(prepared, monkeypatch, capsys):
    fitted = []
    original = module.stored_network

    def fit(folder, *arguments, **options):
        result = original(folder, *arguments, **options)
        fitted.append(sorted(path.name for path in folder.glob("network_*.pth")))
        return result

    monkeypatch.setattr(module, "stored_network", fit)
    register(prepared, monkeypatch, capsys, method="network", network_iterations=2)
    printed, _ = register(prepared, monkeypatch, capsys, method="network+refine", network_iterations=2)
    assert "Using the registration network" in printed
    register(prepared, monkeypatch, capsys, method="network", network_iterations=3)
    assert [len(names) for names in fitted] == [1, 1, 2]
