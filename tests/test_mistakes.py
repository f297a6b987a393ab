"""What nnU-Net's commands say of wrong options once our trainers are loaded, and what they leave as it is."""

import subprocess
import sys

import pytest

from nnunet_oneshot.errors import NotReadyError, OneShotError
from nnunet_oneshot.mistakes import explained

TRAINERS = ("OneShotDistillTrainer", "OneShotDistillTrainer_20epochs", "OneShotAtlasTrainer")


def test_plans_that_do_not_exist_are_told_with_those_that_do(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    folder = tmp_path / "Dataset004_Hippocampus"
    folder.mkdir()
    missing = FileNotFoundError(2, "No such file", str(folder / "nnUNetPlans.json"))
    assert "has no plans" in explained(missing, TRAINERS)
    (folder / "nnUNetOneShotPlans.json").write_text("{}")
    sentence = explained(missing, TRAINERS)
    assert "has the plans nnUNetOneShotPlans: give one of them with -p" in sentence
    assert sentence.endswith("\nnnunet_oneshot doctor -d Dataset004_Hippocampus tells more.")


def test_a_trainer_that_does_not_exist_is_told_with_names_like_it():
    error = RuntimeError("Could not find requested nnunet trainer OneShotDistilTrainer in nnunetv2.training (...)")
    sentence = explained(error, TRAINERS)
    assert "no trainer 'OneShotDistilTrainer'" in sentence and "Names like it: OneShotDistillTrainer," in sentence


def test_the_messages_of_nnunet_are_those_that_are_looked_for(tmp_path, monkeypatch):
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        convert_id_to_dataset_name(4)
    assert explained(caught.value, TRAINERS).endswith("nnunet_oneshot doctor tells more.")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), FileNotFoundError(2, "No such file", "/x/y.json"), KeyError("x")]
)
def test_other_errors_keep_their_traceback(error, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert explained(error, TRAINERS) is None


def test_only_errors_that_doctor_explains_point_to_it():
    assert explained(OneShotError("No."), TRAINERS) == "error: No."
    assert explained(NotReadyError("No."), TRAINERS) == "error: No.\nnnunet_oneshot doctor tells more."


def test_a_process_ends_with_the_sentence_and_status_1():
    code = (
        "from nnunet_oneshot.mistakes import explain_mistakes; from nnunet_oneshot.errors import OneShotError\n"
        "explain_mistakes(('A',)); explain_mistakes(('A',)); raise {}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format("OneShotError('Mend it.')")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "error: Mend it.\n")
    done = subprocess.run([sys.executable, "-c", code.format("KeyError('x')")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
