"""The ranking of cases by how well they represent the others."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter
from tiny_data import draw_blobs, write_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.image_folder import ImageFolder
from nnunet_oneshot.data.thumbnails import find_medoid
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset.ranking import order_next, rank_cases
from nnunet_oneshot.registration.dataset.suggestion import suggest_atlas


def scene(seed=0, edge=24):
    random = np.random.default_rng(seed)
    return gaussian_filter(random.standard_normal((edge,) * 3), 2.5).astype(np.float32)


def fill(folder, names, ending=".nii.gz", shape=(14, 16, 12)):
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in names:
        write_image(folder / f"{name}{ending}", draw_blobs(shape, random)[0])


def test_the_case_between_the_others_comes_first_and_the_strange_one_last():
    base, first, second = scene(0), scene(1), scene(2)
    volumes = {"middle": base, "left": base + 0.7 * first, "right": base - 0.7 * first, "strange": second}
    ranking = rank_cases({name: volume[None] for name, volume in volumes.items()})
    assert [ranked.case for ranked in ranking][::3] == ["middle", "strange"]
    assert [ranked.rank for ranked in ranking] == [1, 2, 3, 4]
    assert ranking[1].most_similar == "middle"


def test_pose_is_not_held_against_a_case():
    # The typical case lies askew; alignment, which every registration begins with, sees through it.
    base, *others = (np.pad(scene(seed)[4:-4, 4:-4, 4:-4], 4) for seed in range(4))
    angle = 0.25
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    centre = np.full(3, 11.5)
    askew = affine_transform(base, turn, centre - turn @ centre + (1.0, -1.0, 0.5), order=1)
    volumes = {"askew": askew[None]}
    volumes |= {f"upright_{index}": (base + 0.5 * other)[None] for index, other in enumerate(others)}
    assert find_medoid(sorted(volumes), volumes)[0] != "askew"
    ranking = rank_cases(volumes)
    assert ranking[0].case == "askew"
    assert ranking[0].correlation > ranking[0].correlation_unaligned + 0.1


def test_order_of_the_cases_and_their_contrast_do_not_matter():
    volumes = {f"case_{i}": (scene(0) + 0.5 * scene(i + 1))[None] for i in range(4)}
    ranking = rank_cases(volumes)
    again = rank_cases({name: 5 * volumes[name] + 3 for name in reversed(volumes)})
    assert [ranked.case for ranked in again] == [ranked.case for ranked in ranking]


def test_a_data_set_is_ranked_without_any_label(tiny_dataset, tmp_path, capsys):
    dataset = tiny_dataset(n_cases=4, shape=(14, 16, 12), labelled=())
    assert main(["suggest-atlas", "-d", str(dataset.id), "-o", str(tmp_path / "out"), "-np", "1"]) == 0
    ranking = json.loads((tmp_path / "out" / "atlas_ranking.json").read_text())["ranking"]
    assert sorted(entry["case"] for entry in ranking) == dataset.cases
    means = [entry["correlation"] for entry in ranking]
    assert means == sorted(means, reverse=True)
    with open(tmp_path / "out" / "atlas_ranking.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [entry["case"] for entry in ranking]
    assert (tmp_path / "out" / "atlas_ranking.png").read_bytes().startswith(b"\x89PNG")
    assert f"Label {ranking[0]['case']} first" in capsys.readouterr().out


def test_damaged_labels_are_never_opened(tiny_dataset, tmp_path):
    dataset = tiny_dataset(n_cases=3, shape=(14, 16, 12), labelled="all")
    for case in dataset.cases:
        dataset.label(case).write_bytes(b"not an image")
    lines = []
    ranking = suggest_atlas(dataset=dataset.name, out=tmp_path, num_processes=1, show_progress=False, log=lines.append)
    assert len(ranking) == 3
    assert lines[0].count("labelled") == 3


@pytest.mark.parametrize(
    ("names", "cases", "channels"),
    [
        (["a", "b", "c"], ["a", "b", "c"], 1),
        (["a_0000", "a_0001", "b_0000", "b_0001"], ["a", "b"], 2),
        (["scan_0001", "scan_0002", "scan_0003"], ["scan_0001", "scan_0002", "scan_0003"], 1),
        (["scan_0000", "scan_0001"], ["scan_0000", "scan_0001"], 1),
        (["a_0000", "a_0001", "b_0000"], ["a_0000", "a_0001", "b_0000"], 1),
    ],
)
def test_files_of_a_folder_are_cases_or_their_channels(tmp_path, names, cases, channels):
    fill(tmp_path / "images", names)
    folder = ImageFolder(tmp_path / "images")
    assert folder.cases == cases
    assert {len(folder.images(case)) for case in cases} == {channels}
    assert len(folder.channel_names) == channels
    assert folder.labelled == []


@pytest.mark.parametrize(("ending", "shape"), [(".mha", (14, 12, 13)), (".png", (30, 26))])
def test_a_folder_of_images_in_other_formats(tmp_path, ending, shape):
    fill(tmp_path / "images", ["a", "b", "c"], ending, shape)
    arguments = ["-i", str(tmp_path / "images"), "--file_ending", ending, "-o", str(tmp_path / "out"), "-np", "1"]
    assert main(["suggest-atlas", *arguments]) == 0
    assert len(json.loads((tmp_path / "out" / "atlas_ranking.json").read_text())["ranking"]) == 3


def test_what_cannot_be_ranked_is_said(tmp_path, capsys):
    fill(tmp_path / "two", ["a", "b"])
    with pytest.raises(OneShotError, match="2 case.*at least 3"):
        suggest_atlas(images=tmp_path / "two", out=tmp_path / "out")
    with pytest.raises(OneShotError, match="ends in .mha.*--file_ending.*.nii.gz"):
        suggest_atlas(images=tmp_path / "two", file_ending="mha", out=tmp_path / "out")
    with pytest.raises(OneShotError, match="is not a folder"):
        suggest_atlas(images=tmp_path / "none", out=tmp_path / "out")
    (tmp_path / "two" / "a.txt").write_text("no image")
    with pytest.raises(OneShotError, match="'.txt'.*nnU-Net reads"):
        suggest_atlas(images=tmp_path / "two", file_ending=".txt", out=tmp_path / "out")
    (tmp_path / "two" / "a.nii.gz").write_bytes(b"broken")
    with pytest.raises(OneShotError, match="a.nii.gz"):
        suggest_atlas(images=tmp_path / "two", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["suggest-atlas"])
    assert "one of the arguments -d -i is required" in capsys.readouterr().err


NAMES = ["known", "like_a", "like_b", "new_0", "new_1", "new_2", "strange"]


def families():
    """Similarities of two cases like the labelled one, three of another shape, and one like none."""
    group = np.array([0, 0, 0, 1, 1, 1, 2])
    matrix = np.where(group[:, None] == group, 0.9, 0.1)
    matrix[3, 4] = matrix[4, 3] = 0.95
    np.fill_diagonal(matrix, 1)
    return NAMES, matrix


def test_the_next_case_stands_for_those_that_no_labelled_one_is_like():
    ranking = order_next(*families(), ["known"])
    assert [entry.case for entry in ranking] == ["new_0", "new_1", "new_2", "strange", "like_a", "like_b"]
    assert [entry.rank for entry in ranking] == [1, 2, 3, 4, 5, 6]
    # New to itself and to two others; strange to itself alone.
    assert [ranking[0].gain, ranking[3].gain] == pytest.approx([(0.9 + 0.85 + 0.8) / 7, 0.9 / 7], abs=1e-6)
    assert {entry.nearest for entry in ranking} == {"known"} and all(entry.agreement is None for entry in ranking)
    assert [ranking[0].similarity, ranking[4].similarity] == pytest.approx([0.1, 0.9])
    # The other family is covered once one of it is labelled.
    again = order_next(*families(), ["known", "new_0"])
    assert again[0].case == "strange" and {again[1].nearest, again[-1].nearest} == {"new_0", "known"}


def test_disagreement_of_the_student_counts_as_much_as_coverage():
    plain = [entry.case for entry in order_next(*families(), ["known"])]
    agreement = dict.fromkeys(plain, 0.5)
    assert [entry.case for entry in order_next(*families(), ["known"], agreement)] == plain
    # The first by gain is the one on which both agree most: the second, on which they agree least, takes its place.
    ranking = order_next(*families(), ["known"], {**agreement, "new_0": 0.9, "new_1": 0.2})
    assert (ranking[0].case, ranking[0].agreement) == ("new_1", 0.2)


def test_the_next_case_to_label_is_suggested_by_the_names_of_labels_alone(tiny_dataset, tmp_path, capsys):
    dataset = tiny_dataset(n_cases=5, shape=(14, 16, 12), labelled=("case_01", "case_03"))
    for case in ("case_01", "case_03"):
        dataset.label(case).write_bytes(b"not an image")
    out = tmp_path / "out"
    assert main(["suggest-atlas", "-d", str(dataset.id), "--next", "-o", str(out), "-np", "1"]) == 0
    content = json.loads((out / "next_ranking.json").read_text())
    assert sorted(entry["case"] for entry in content["ranking"]) == ["case_00", "case_02", "case_04"]
    assert {entry["nearest"] for entry in content["ranking"]} <= {"case_01", "case_03"} == set(content["labelled"])
    with open(out / "next_ranking.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [entry["case"] for entry in content["ranking"]]
    assert (out / "next_ranking.png").read_bytes().startswith(b"\x89PNG")
    assert f"Label {content['ranking'][0]['case']} next" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labelled", "arguments", "message"),
    [
        ((), ["--next"], "0 labelled and 4 unlabelled"),
        ("all", ["--next"], "4 labelled and 0 unlabelled"),
        ((), ["--student", "model"], "--student goes with --next"),
        (("case_00",), ["--next", "--student", "nowhere"], "plan_and_preprocess"),
    ],
)
def test_what_cannot_be_ranked_as_next_is_said(labelled, arguments, message, tiny_dataset, tmp_path, capsys):
    dataset = tiny_dataset(n_cases=4, shape=(14, 16, 12), labelled=labelled)
    dataset.preprocessed.mkdir()
    assert main(["suggest-atlas", "-d", str(dataset.id), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert main(["suggest-atlas", "-i", str(dataset.raw / "imagesTr"), "--next"]) == 1
    assert "--next needs a dataset" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
