"""A dask cluster registers as this machine does, and says which pair failed."""

import os
import sys

import pytest
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset import cluster
from nnunet_oneshot.registration.dataset import register as module
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.cluster import cluster_workers
from nnunet_oneshot.registration.dataset.pairs import Pair, PairWork
from nnunet_oneshot.registration.dataset.workers import run_by

PLANS = "nnUNetOneShotCPUPlans"


@pytest.fixture
def dataset(prepared_dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", '{"registration": {"refine_iterations": [2, 2]}}')
    return prepared_dataset(labelled=("case_00",), n_cases=4)


@pytest.fixture(params=[False, True], ids=["threads", "processes"])
def scheduler(request):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=request.param, dashboard_address=None
    ) as started:
        yield started.scheduler_address


def command(dataset, *options):
    return main(["register", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS, *options])


def files(dataset):
    return {path.name for path in (dataset.preprocessed / "oneshot_registrations").rglob("case_*.*")}


def test_the_workers_of_a_cluster_register_all_pairs_and_name_the_one_that_fails(
    dataset, scheduler, monkeypatch, capsys
):
    assert command(dataset, "--scheduler", scheduler, "--num_parts", "3", "--part_id", "0") == 0
    assert "has 1 worker threads." in capsys.readouterr().out
    assert files(dataset) == {"case_03.npz", "case_03.json", "case_03.png"}

    def damage_first(executor, work, batches, done, *, at_once):
        (work.prepared.folder / "case_02.b2nd").write_bytes(b"damaged")
        run_by(executor, work, batches, done, at_once=at_once)

    monkeypatch.setattr(module, "run_by", damage_first)
    assert command(dataset, "--scheduler", scheduler) == 1
    printed = capsys.readouterr()
    assert "2 of 3 pairs" in printed.out
    assert "The registration of case_00 to case_02 failed: The preprocessed image" in printed.err


class DyingWork(PairWork):
    """Ends its process."""

    def register(self, batch):
        os._exit(9)


def test_a_worker_that_dies_is_told_with_its_pair(dataset, monkeypatch):
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    work = DyingWork(prepared, OneShotConfig(), torch.device("cpu"), RegistrationCache(prepared.base), {})
    pair = Pair("case_00", "case_01", "key", {}, ((4, 4, 4), (4, 4, 4)))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as started,
        cluster_workers(started.scheduler_address, print) as executor,
        pytest.raises(OneShotError, match=r"case_00 to case_01 failed on its worker \(KilledWorker"),
    ):
        run_by(executor, work, [[pair]], print, at_once=1)


def test_a_scheduler_that_does_not_answer_is_told(dataset, monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "_SECONDS_TO_ANSWER", 1)
    assert command(dataset, "--scheduler", "tcp://127.0.0.1:9") == 1
    assert "No dask scheduler answers at 'tcp://127.0.0.1:9'" in capsys.readouterr().err
    assert command(dataset, "--scheduler", "nowhere") == 1
    assert "No dask scheduler answers at 'nowhere'" in capsys.readouterr().err


def test_a_missing_package_is_told(dataset, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert command(dataset, "--scheduler", "tcp://127.0.0.1:9") == 1
    error = capsys.readouterr().err
    assert "--scheduler needs the package distributed" in error and "nnunet_oneshot[cluster]" in error
