"""What ends a training from outside: a full disk, a lost folder or case, a killed worker. Each is told."""

import errno
import os
import shutil
import signal
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

from nnunet_oneshot.errors import OneShotError

NAME = "OneShotSynthesisTrainer_5epochs"
NOT_YET = "There is no checkpoint yet: then give the same command again."


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Drawing the progress takes longer than all else."""
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *_: None)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")


def no_space_of_torch(content, path, *_):
    Path(path).write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (torch, "save", no_space),
        (torch, "save", no_space_of_torch),
        (stock, "save_json", no_space),
    ],
)
def test_a_full_disk_is_told_and_no_checkpoint_promised(
    where, name, fault, prepare, make_trainer, short, stubs, monkeypatch
):
    trainer = make_trainer(prepare(), NAME)
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(OneShotError, match="(?i)space left") as caught:
        trainer.run_training()
    assert "--c" not in str(caught.value)
    assert not list(Path(trainer.output_folder).glob("*.pth")) + list(Path(trainer.output_folder).glob(".partial*"))


def test_a_disk_that_fills_up_later_leaves_the_checkpoint_that_is_named(
    prepare, make_trainer, short, stubs, monkeypatch
):
    dataset = prepare()
    trainer = make_trainer(dataset, NAME)
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *_: no_space() if latest.is_file() else None)
    with pytest.raises(OneShotError, match=f"No space left on device.*with --c, which goes on from {latest}"):
        trainer.run_training()


def after_first_epoch(monkeypatch, harm):
    """Does some harm to a training once its first checkpoint is written."""
    from nnunet_oneshot.trainers.base import OneShotTrainer

    original = OneShotTrainer.on_epoch_end

    def on_epoch_end(self):
        original(self)
        if self.current_epoch == 1:
            harm(self)
            # More than workers have made already.
            self.num_iterations_per_epoch = 40

    monkeypatch.setattr(OneShotTrainer, "on_epoch_end", on_epoch_end)


def test_lost_results_are_told(prepare, make_trainer, short, stubs, monkeypatch):
    trainer = make_trainer(prepare(), NAME)
    monkeypatch.setattr(stock, "sleep", lambda _: None)
    after_first_epoch(monkeypatch, lambda self: shutil.rmtree(self.output_folder))
    with pytest.raises(OneShotError, match=f"(?s){trainer.output_folder}.*{NOT_YET}"):
        trainer.run_training()


def lose_case(trainer):
    for path in Path(trainer.preprocessed_dataset_folder).glob("*.b2nd"):
        if path.stem.removesuffix("_seg") not in trainer.roles.atlases:
            path.rename(path.with_suffix(".away"))


def lose_folder(trainer):
    folder = Path(trainer.preprocessed_dataset_folder)
    folder.rename(folder.with_name("away"))


def bring_back(trainer):
    folder = Path(trainer.preprocessed_dataset_folder)
    if folder.with_name("away").is_dir():
        folder.with_name("away").rename(folder)
    for path in folder.glob("*.away"):
        path.rename(path.with_suffix(".b2nd"))


def kill_worker(trainer):
    os.kill(trainer.dataloader_train._processes[0].pid, signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("harm", "processes", "said"),
    [
        (lose_case, "0", r"case_0\d\.b2nd cannot be read"),
        (lose_case, "2", r"case_0\d\.b2nd cannot be read"),
        (lose_folder, "2", r"case_0\d\.b2nd cannot be read"),
        (kill_worker, "2", "worker process that makes patches ended unexpectedly.*nnUNet_n_proc_DA"),
    ],
)
def test_what_patches_are_made_of_or_by_is_lost_and_the_training_resumed(
    harm, processes, said, prepare, make_trainer, short, monkeypatch
):
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    monkeypatch.setenv("nnUNet_oneshot_overrides", '{"registration": {"refine_iterations": [1], "search_reach": 0}}')
    dataset = prepare()
    trainer = make_trainer(dataset, NAME)
    with monkeypatch.context() as patch:
        after_first_epoch(patch, harm)
        with pytest.raises(OneShotError, match=f"(?s)training in .* stopped.*{said}.*with --c, which goes on from"):
            trainer.run_training()
    bring_back(trainer)
    again = make_trainer(dataset, NAME, resume=True)
    from nnunet_oneshot.locks import free

    free(os.path.join(trainer.output_folder, "training.lock"))
    again.load_checkpoint(os.path.join(again.output_folder, "checkpoint_latest.pth"))
    again.run_training()
    assert os.path.isfile(os.path.join(again.output_folder, "checkpoint_final.pth"))


def test_a_damaged_atlas_is_named_before_nnunet_reads_it(prepare, make_trainer, short):
    trainer = make_trainer(prepare(), "OneShotAtlasTrainer_5epochs")
    path = Path(trainer.preprocessed_dataset_folder) / f"{trainer.roles.atlases[0]}.b2nd"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OneShotError, match=f"{path} cannot be read"):
        trainer.run_training()


def test_weights_that_changed_on_disk_are_not_taken(prepare, make_trainer, short, stubs):
    dataset = prepare()
    trainer = make_trainer(dataset, NAME)
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    whole = path.read_bytes()
    assert make_trainer(dataset, NAME).load_checkpoint(str(path)) is None
    with ZipFile(path) as archive:
        parts = sorted(archive.infolist(), key=lambda part: part.file_size)
        weights = [archive.read(part) for part in parts[-2:]]
    for content in weights:
        place = whole.index(content) + len(content) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        again = make_trainer(dataset, NAME)
        with pytest.raises(OneShotError, match=f"{path}.*has changed.*Delete it and train again without --c"):
            again.load_checkpoint(str(path))
    # Wherever a checkpoint is moved or copied to, it is known to be whole.
    path.write_bytes(whole)
    path.rename(path.with_name("checkpoint_best.pth"))
    make_trainer(dataset, NAME).load_checkpoint(str(path.with_name("checkpoint_best.pth")))
