"""Doctor: what stands in the way of training is marked, the status follows it, and the next line is the right one."""

import json
import shutil

import pytest

from nnunet_oneshot.cli import main
from nnunet_oneshot.environment import TRAINER_FOLDER

PLANS = "nnUNetOneShotCPUPlans"


@pytest.fixture(autouse=True)
def _trainers_are_known(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))


def examine(capsys, *arguments):
    """Status, lines marked as problems, all that is printed, and what is to be typed next."""
    capsys.readouterr()
    status = main(["doctor", *arguments])
    text = capsys.readouterr().out
    lines = text.splitlines()
    next_line = next((line.removeprefix("Next: ") for line in lines if line.startswith("Next: ")), None)
    return status, [line for line in lines if line.startswith("PROBLEM")], text, next_line


def test_a_dataset_is_followed_from_raw_files_to_the_model(prepared_dataset, capsys):
    dataset = prepared_dataset(n_cases=4, labelled=["case_00"])
    before = sorted(path for path in dataset.preprocessed.rglob("*"))
    number = str(dataset.id)
    status, problems, text, line = examine(capsys, "-d", number)
    assert (status, problems) == (0, [])
    assert "4 training cases, 1 of them labelled" in text and "atlas case_00" in text
    assert "3 of 3 registrations are missing" in text and "Training time" in text
    assert line == f"nnunet_oneshot register -d {number} -c 3d_fullres -p {PLANS}"
    assert sorted(path for path in dataset.preprocessed.rglob("*")) == before

    assert main(line.split()[1:] + ["--no_figures"]) == 0
    status, problems, text, line = examine(capsys, "-d", number)
    assert status == 0 and "All 3 registrations are there" in text
    assert line.startswith(f"nnUNetv2_train {number} 3d_fullres 0 -tr OneShotDistillTrainer -p {PLANS} -device ")

    fold = dataset.results / f"OneShotDistillTrainer_20epochs__{PLANS}__3d_fullres" / "fold_all"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    line = examine(capsys, "-d", number)[3]
    assert line.startswith(f"nnUNetv2_train {number} 3d_fullres all -tr OneShotDistillTrainer_20epochs ")
    assert line.endswith(" --c") and "Training time" not in examine(capsys, "-d", number)[2]
    (fold / "checkpoint_final.pth").touch()
    assert "nnUNetv2_predict" in examine(capsys, "-d", number)[3]

    # Training reads no raw file, but no image may be missing among those that were preprocessed.
    shutil.rmtree(dataset.raw)
    assert examine(capsys, "-d", number)[0] == 0
    next((dataset.preprocessed / f"{PLANS}_3d_fullres").glob("case_02.pkl")).unlink()
    status, problems, _, line = examine(capsys, "-d", number)
    assert status == 1 and "lacks case_02" in " ".join(problems)


def test_a_dataset_that_is_not_planned_is_a_problem_with_the_line_that_plans_it(tiny_dataset, capsys):
    dataset = tiny_dataset()
    status, problems, _, line = examine(capsys, "-d", str(dataset.id))
    assert status == 1 and len(problems) == 1
    assert line == f"nnunet_oneshot plan_and_preprocess -d {dataset.id} -c 3d_fullres"
    shutil.rmtree(dataset.raw / "labelsTr")
    status, problems, _, line = examine(capsys, "-d", str(dataset.id))
    assert status == 1 and "label" in problems[0] and line.startswith("mend the raw dataset")


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("nnUNet_raw", None, "nnUNet_raw (the folder"),
        ("nnUNet_raw", "/no/such/folder", "is no folder"),
        ("nnUNet_results", f"{__file__}/results", "cannot be written to"),
        ("nnUNet_n_proc_DA", "many", "'many'"),
        ("nnUNet_def_n_proc", "0", "'0'"),
        ("nnUNet_extTrainer", None, 'eval "$(nnunet_oneshot env)"'),
    ],
)
def test_what_is_wrong_with_the_environment_is_a_problem(tiny_dataset, monkeypatch, capsys, variable, value, told):
    tiny_dataset()
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    status, problems, _, line = examine(capsys)
    assert status == 1 and len(problems) == 1 and told in problems[0] and line is None


def test_more_workers_than_cores_are_a_note(tiny_dataset, monkeypatch, capsys):
    tiny_dataset()
    monkeypatch.setenv("nnUNet_n_proc_DA", "5000")
    status, problems, text, line = examine(capsys)
    assert status == 0 and "note    nnUNet_n_proc_DA is 5000" in text and "doctor -d DATASET" in line


def test_a_package_of_another_release_than_is_needed_is_a_problem(tiny_dataset, monkeypatch, capsys):
    import nnunet_oneshot.doctor as doctor

    tiny_dataset()
    monkeypatch.setattr(doctor, "requires", lambda _: ["nnunetv2<2", "no_such_package_here>=1; extra == 'dev'"])
    status, problems, _, _ = examine(capsys)
    assert status == 1 and len(problems) == 1 and "pip install 'nnunetv2<2'" in problems[0]


def test_stock_plans_are_examined_where_there_are_no_others(prepared_dataset, capsys):
    dataset = prepared_dataset(n_cases=4)
    path = dataset.preprocessed / f"{PLANS}.json"
    plans = json.loads(path.read_text())
    del plans["oneshot"]
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans | {"plans_name": "nnUNetPlans"}))
    assert f"-p {PLANS}" in examine(capsys, "-d", str(dataset.id))[3]
    path.unlink()
    assert "-p nnUNetPlans" in examine(capsys, "-d", str(dataset.id))[3]
