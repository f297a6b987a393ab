"""The fingerprint beside that of nnU-Net."""

import json
import shutil
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from tiny_data import read_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.fingerprint import (
    FINGERPRINT_FILE,
    NNUNET_FINGERPRINT_FILE,
    fingerprint_standing_in,
    lent_fingerprint,
    save_fingerprint,
)


@pytest.fixture
def stock_extract(monkeypatch):
    """nnU-Net's extraction as its command runs it, in threads."""
    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(fingerprint_extractor, "multiprocessing", threads)

    def extract(dataset):
        fingerprint_extractor.DatasetFingerprintExtractor(dataset.name, num_processes=1).run()

    return extract


def plan(dataset, *arguments):
    command = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "--no_pp", "--no_pbar"]
    assert main([*command, *arguments]) == 0


def statistics(path):
    (found,) = json.loads(path.read_text())["foreground_intensity_properties_per_channel"].values()
    return found


def mean_inside(dataset, cases):
    """Mean intensity inside the labels, each case counting the same."""
    return np.mean([read_image(dataset.image(case))[read_image(dataset.label(case)) > 0].mean() for case in cases])


def test_stock_makes_its_own_of_all_labels_after_ours(tiny_dataset, stock_extract):
    dataset = tiny_dataset(4, labelled="all")
    plan(dataset, "--atlas", "case_01")
    ours, stock = dataset.preprocessed / FINGERPRINT_FILE, dataset.preprocessed / NNUNET_FINGERPRINT_FILE
    before = ours.read_bytes()
    assert not stock.exists()
    stock_extract(dataset)
    assert "oneshot" not in json.loads(stock.read_text())
    assert statistics(ours)["mean"] == pytest.approx(mean_inside(dataset, ["case_01"]), rel=1e-3)
    assert statistics(stock)["mean"] == pytest.approx(mean_inside(dataset, dataset.cases), rel=1e-3)
    assert statistics(ours)["mean"] != pytest.approx(statistics(stock)["mean"], rel=1e-4)
    assert ours.read_bytes() == before


def test_ours_leaves_that_of_stock_as_it_is(tiny_dataset, stock_extract):
    dataset = tiny_dataset(4, labelled="all")
    dataset.preprocessed.mkdir()
    stock_extract(dataset)
    stock = dataset.preprocessed / NNUNET_FINGERPRINT_FILE
    before = stock.read_bytes()
    for arguments in (["--atlas", "case_01"], ["--clean"]):
        plan(dataset, *arguments)
        assert stock.read_bytes() == before
    with lent_fingerprint(dataset.preprocessed):
        assert stock.read_bytes() == before
    assert stock.read_bytes() == before


@pytest.fixture
def folder(tmp_path):
    save_fingerprint({"spacings": [1]}, tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", [{"spacings": [1]}, {"spacings": [2]}])
def test_copy_of_an_earlier_version_is_removed_when_ours_is_written_again(folder, content):
    shutil.copyfile(folder / FINGERPRINT_FILE, folder / NNUNET_FINGERPRINT_FILE)
    save_fingerprint(content, folder)
    assert [path.name for path in folder.iterdir()] == [FINGERPRINT_FILE]


def test_one_that_differs_by_a_byte_is_kept(folder):
    (folder / NNUNET_FINGERPRINT_FILE).write_bytes((folder / FINGERPRINT_FILE).read_bytes() + b" ")
    save_fingerprint({"spacings": [1]}, folder)
    assert (folder / NNUNET_FINGERPRINT_FILE).is_file()


def test_a_lent_one_is_taken_back_even_after_an_error(folder):
    with pytest.raises(KeyError), lent_fingerprint(folder):
        assert (folder / NNUNET_FINGERPRINT_FILE).read_bytes() == (folder / FINGERPRINT_FILE).read_bytes()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == [FINGERPRINT_FILE]


def test_nothing_is_lent_without_ours(tmp_path):
    with lent_fingerprint(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_ours_stands_in_for_one_folder_and_one_name_only(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("results")
    join = trainer_module.join
    with pytest.raises(KeyError), fingerprint_standing_in(trainer_module, folder):
        assert trainer_module.join(str(folder), NNUNET_FINGERPRINT_FILE) == str(folder / FINGERPRINT_FILE)
        for parts in ((str(other), NNUNET_FINGERPRINT_FILE), (str(folder), "splits_final.json")):
            assert trainer_module.join(*parts) == join(*parts)
        raise KeyError
    assert trainer_module.join is join


def test_nothing_stands_in_without_ours(tmp_path):
    with fingerprint_standing_in(trainer_module, tmp_path):
        assert trainer_module.join(str(tmp_path), NNUNET_FINGERPRINT_FILE) == str(tmp_path / NNUNET_FINGERPRINT_FILE)
