"""Whatever the files of a data set say: planning works rightly or ends in one of our sentences, and harms nothing.

A small data set is changed at random: entries of its JSON files, names, links and missing files. Then it is planned, or
opened as a training opens it. ``NNUNET_ONESHOT_EXAMPLES`` sets the number of examples.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_data import draw_blobs, write_image

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.options import Options
from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.roles import resolve_roles
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.planners import OneShotCPUPlanner

EXAMPLES = int(os.environ.get("NNUNET_ONESHOT_EXAMPLES", 0))
NAME, PLANS, CONFIGURATION = "Dataset901_Tiny", "nnUNetOneShotCPUPlans", "3d_fullres"
CASES = [f"case_{number:02d}" for number in range(4)]
LABELLED = ["case_00", "case_02"]
OUTSIDE = "/nnunet_oneshot_outside"
DESCRIPTION = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "left": 1, "right": 2},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}
LISTED = {case: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"} for case in CASES}
SPLITS = [{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[1:], "val": CASES[:1]}]
ATLASES = {"atlases": ["case_02"], "chosen_by": "user", "how": "named by --atlas"}
BY_PROGRAM = {
    "atlases": LABELLED,
    "chosen_by": "program",
    "how": "every labelled training case",
    "program_choice": LABELLED,
    "folds": {"0": ATLASES},
}
# Python's own words, which tell a user nothing.
NOISE = re.compile(
    r"Traceback|\b(Key|Type|Value|Attribute|Index|Assertion|Unicode\w*|Recursion|Overflow)Error\b|<class |object at 0x|"
    r"NoneType|unhashable|not subscriptable|has no attribute|argument must be"
)


def examples(usual, wanted=EXAMPLES):
    """Settings of a property with so many examples as usual, or as the environment wants."""
    return settings(
        max_examples=wanted or usual,
        deadline=None,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )


# What a file may hold

TEXTS = st.sampled_from(
    ["", " ", ".", "..", "../x", f"{OUTSIDE}/x", "a;b", "a b", "<script>alert(1)</script>", "$x", "$(touch x)", "`x`"]
    + ["=1+1", "a|b", "a\nb", "a\0b", "\u00e4", "\u540d", "\ud800", "x" * 300, "nul", "-rf", ".hidden", "0", "1"]
    + [
        "None",
        "background",
        "ignore",
        *CASES[:2],
        "case_00.nii.gz",
        "case_00_0000",
        "case_00_seg",
        "NibabelIO",
        ".nrrd",
    ]
)
NUMBERS = st.sampled_from([0, 1, 2, 3, 4, -1, 1.5, float("nan"), float("inf"), 10**30, -(10**30), 10**4000, 1e308])
SIMPLE = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(SIMPLE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
KEYS = TEXTS | st.sampled_from(
    ["dataset", "modality", "regions_class_order", "overwrite_image_reader_writer", "label", "folds", "program_choice"]
)


def places(content):
    """Every container in a JSON content with each of its keys."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


@st.composite
def changed(draw, content):
    """A JSON content with a few changes at any depth."""
    content = {"": copy.deepcopy(content)}
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(content))))
        inner = container[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if how == "add" and isinstance(inner, dict):
            inner[draw(KEYS)] = draw(VALUES)
        elif how == "add" and isinstance(inner, list):
            inner.append(draw(st.sampled_from(inner) | VALUES if inner else VALUES))
        elif how == "remove" and container is not content:
            del container[key]
        elif how == "rename" and isinstance(container, dict) and container is not content:
            container[draw(KEYS)] = container.pop(key)
        else:
            container[key] = draw(VALUES)
    return content[""]


def written(content):
    """The bytes of a JSON content; numbers of any size, and halves of characters, as JSON can hold them."""
    return json.dumps(content).encode()


def files_of(content):
    """The bytes of a file: the content as it is, changed, or no JSON at all."""
    whole = written(content)
    broken = [b"", b"{", b"null", b"NaN", b"[" * 100_000, b"\0" * 50, b"\xff\xfe", b"\xef\xbb\xbf" + whole]
    broken += [
        whole[:-1],
        whole.decode().encode("utf-16"),
        whole.replace(b"case", b"c\xe4se", 1),
        whole + whole,
        whole.replace(b"0", b"9" * 5000, 1),
    ]
    return st.just(whole) | changed(content).map(written) | changed(content).map(written) | st.sampled_from(broken)


# What a folder may hold


def hide(raw, case):
    (raw / "imagesTr" / f"._{case}_0000.nii.gz").write_bytes(b"x")
    (raw / "labelsTr" / ".DS_Store").write_bytes(b"x")


def shout(raw, case):
    image(raw, case).rename(raw / "imagesTr" / f"{case}_0000.NII.GZ")


def lose(raw, case):
    image(raw, case).unlink()


def link_image(raw, case):
    image(raw, case).unlink()
    image(raw, case).symlink_to(raw / "nowhere.nii.gz")


def link_label(raw, case):
    label(raw, case).unlink(missing_ok=True)
    label(raw, case).symlink_to(raw / "nowhere.nii.gz")


def link_in_circles(raw, case):
    image(raw, case).unlink()
    image(raw, case).symlink_to(image(raw, case))


def put_folder(raw, case):
    image(raw, case).unlink()
    image(raw, case).mkdir()


def add_channel(raw, case):
    shutil.copy(image(raw, case), raw / "imagesTr" / f"{case}_0001.nii.gz")


def add_labels(raw, case):
    for name in ("other.nii.gz", f"{case}_0000.nii.gz", f"{case}.nrrd"):
        (raw / "labelsTr" / name).write_bytes(b"x")


def damage_label(raw, case):
    label(raw, case).write_bytes(b"x")


def swap(raw, case):
    shutil.copy(image(raw, case), label(raw, case))


def renamed(name):
    def rename(raw, case):
        os.rename(image(raw, case), os.path.join(os.fsencode(raw / "imagesTr"), name + b"_0000.nii.gz"))

    return rename


NAMES = [b"a;b", b"a b", b"<script>", b"$x", b"`x`", b"=1", b"a|b", b"a\nb", b"\xe5\x90\x8d", b"\xff", b"nul", b"-rf"]
CHANGES = [
    hide,
    shout,
    lose,
    link_image,
    link_label,
    link_in_circles,
    put_folder,
    add_channel,
    add_labels,
    damage_label,
]
CHANGES += [swap, *map(renamed, [*NAMES, b"x_seg"])]
FOLDERS = st.lists(st.tuples(st.sampled_from(CHANGES), st.sampled_from(CASES)), max_size=2, unique_by=lambda c: c[1])


def image(raw, case):
    return raw / "imagesTr" / f"{case}_0000.nii.gz"


def label(raw, case):
    return raw / "labelsTr" / f"{case}.nii.gz"


# Where all this happens


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A data set, planned and preprocessed; whoever uses it works on a copy."""
    root = tmp_path_factory.mktemp("template")
    raw = root / "nnUNet_raw" / NAME
    for folder in (raw / "imagesTr", raw / "labelsTr", root / "nnUNet_results"):
        folder.mkdir(parents=True)
    for other in (root / "nnUNet_raw" / "Dataset902_Other", root / "nnUNet_preprocessed" / "Dataset902_Other"):
        other.mkdir(parents=True)
        (other / "sentinel.txt").write_text("keep")
    (root / "sentinel.txt").write_text("keep")
    random = np.random.default_rng(0)
    for case in CASES:
        array, labels = draw_blobs((8, 9, 10), random)
        write_image(image(raw, case), array)
        if case in LABELLED:
            write_image(label(raw, case), labels)
    (raw / "dataset.json").write_bytes(written(DESCRIPTION))
    (raw / "splits_final.json").write_bytes(written(SPLITS))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        point_to(root, patch)
        plan()
    return root


def point_to(root, patch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        patch.setenv(name, str(root / name))


def plan(**options):
    chosen = {"configurations": [CONFIGURATION], "num_processes": [1], "num_processes_fingerprint": 1, **options}
    plan_and_preprocess(901, OneShotCPUPlanner, Options(progress=False, **chosen), log=lambda line: line.encode())


@pytest.fixture
def copied(template, tmp_path, monkeypatch):
    """A function that makes a fresh copy of the data set, planned or not, with its preprocessed cases or without."""
    root = tmp_path / "root"
    point_to(root, monkeypatch)

    def make(*, planned=True, preprocessed=False):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root, ignore=None if preprocessed else shutil.ignore_patterns(f"{PLANS}_*"))
        if not planned:
            shutil.rmtree(root / "nnUNet_preprocessed" / NAME)
        return root

    return make


@pytest.fixture
def quick_planner(monkeypatch):
    """nnU-Net's planner sizes networks by building them; the sizes play no part here."""
    monkeypatch.setattr(OneShotCPUPlanner, "static_estimate_VRAM_usage", staticmethod(lambda *_: 1))


def tree(root, *, without=None):
    """Every path below a folder, with what it holds."""
    found = {}
    for folder, folders, files in os.walk(root):
        if without is not None and str(without.name) in folders and Path(folder) == without.parent:
            folders.remove(without.name)
        for name in folders + files:
            path = os.path.join(folder, name)
            content = os.readlink(path) if os.path.islink(path) else os.path.isfile(path) and Path(path).read_bytes()
            found[path] = content
    return found


def outcome(run, root, *, mentions):
    """Whether something worked; else that it ended in one of our sentences. Nothing outside its folder is touched."""
    own = root / "nnUNet_preprocessed" / NAME
    before = tree(root, without=own)
    try:
        run()
        message = None
    except OneShotError as error:
        message = str(error)
    assert tree(root, without=own) == before
    assert not os.path.exists(OUTSIDE)
    left = {path.name for path in own.iterdir()} if own.is_dir() else set()
    assert not [name for name in left if name.startswith((".partial", ".previous")) or name.endswith(".lock")]
    if message is not None:
        assert message.endswith("."), message
        assert not NOISE.search(message), message
        assert any(mention in message for mention in mentions), message
        assert len(message) < 4000, message
    return message


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


@st.composite
def raw_datasets(draw, contents):
    """What is laid over the copied data set, and how it is planned; up to two parts are not as they should be."""
    odd = draw(
        st.sets(st.sampled_from(["description", "splits", "atlas file", "atlases", "folder", "planned"]), max_size=2)
    )
    description = {**DESCRIPTION, **({"dataset": LISTED} if draw(st.booleans()) else {})}
    if draw(st.integers(0, 3)) == 0:
        description |= {"labels": {"background": 0, "both": [1, 2], "right": 2}, "regions_class_order": [1, 2]}
    files = {"dataset.json": draw(files_of(description)) if "description" in odd else written(description)}
    if "splits" in odd:
        files["splits_final.json"] = draw(files_of(SPLITS))
    if "atlas file" in odd:
        atlas_file = draw(files_of(draw(st.sampled_from([ATLASES, BY_PROGRAM]))))
    else:
        atlas_file = draw(st.sampled_from([None, written(ATLASES)]))
    atlases = draw(st.sampled_from([None, ["case_02"]]))
    if "atlases" in odd:
        atlases = draw(st.lists(st.sampled_from(CASES) | TEXTS, min_size=1, max_size=3))
    changes = draw(FOLDERS) if "folder" in odd else []
    unlabelled = draw(st.lists(st.sampled_from(CASES), max_size=3)) if "folder" in odd else []
    planned = draw(st.booleans())
    prepared = {"oneshot_atlas.json": atlas_file}
    if planned and "planned" in odd:
        name = draw(st.sampled_from([f"{PLANS}.json", "oneshot_fingerprint.json"]))
        prepared[name] = draw(files_of(contents[name]))
    return files, prepared, planned, atlases, changes, unlabelled


def lay_over(root, files, prepared_files, changes=(), unlabelled=()):
    raw, folder = root / "nnUNet_raw" / NAME, root / "nnUNet_preprocessed" / NAME
    for where, laid in ((raw, files), (folder, prepared_files)):
        for name, content in laid.items():
            if content is not None:
                where.mkdir(exist_ok=True)
                (where / name).write_bytes(content)
    for case in unlabelled:
        label(raw, case).unlink(missing_ok=True)
    for change, case in changes:
        change(raw, case)


MENTIONS = [
    PLANS,
    "dataset.json",
    "splits_final.json",
    "oneshot_atlas.json",
    "imagesTr",
    "labelsTr",
    "--atlas",
    "case_",
]


def contents_of(root):
    """What planning wrote, by name."""
    return {path.name: load(path) for path in sorted((root / "nnUNet_preprocessed" / NAME).glob("*.json"))}


def check_planned(root, atlases):
    """What was planned is what the files say, read here without the package."""
    raw, folder = root / "nnUNet_raw" / NAME, root / "nnUNet_preprocessed" / NAME
    description = load(raw / "dataset.json")
    images = [path.name for path in (raw / "imagesTr").iterdir() if not path.name.startswith(".")]
    listed = description.get("dataset")
    cases = sorted({name[:-12] for name in images if name.endswith("_0000.nii.gz")} if listed is None else listed)
    paths = {case: label(raw, case) if listed is None else raw / str(listed[case].get("label")) for case in cases}
    labelled = [case for case in cases if paths[case].is_file()]
    fingerprint, chosen = load(folder / "oneshot_fingerprint.json"), load(folder / "oneshot_atlas.json")
    used = fingerprint["oneshot"]["atlases"]
    assert fingerprint["oneshot"]["cases"] == cases
    assert used and set(used) <= set(labelled)
    assert {path.name for path in (folder / "gt_segmentations").iterdir()} == {f"{c}.nii.gz" for c in labelled}
    splits = load(folder / "splits_final.json")
    if (raw / "splits_final.json").is_file():
        for given_fold, fold in zip(load(raw / "splits_final.json"), splits, strict=False):
            assert all(set(given_fold[part]) == set(fold[part]) for part in ("train", "val"))
    if atlases is not None:
        assert used == list(dict.fromkeys(atlases)) == chosen["atlases"] and chosen["chosen_by"] == "user"
    else:
        assert set(used) <= set(splits[0]["train"])
        assert set(used) <= set(chosen["atlases"]) or used == chosen["folds"]["0"]["atlases"]
    stored = load(folder / "dataset.json")
    assert stored["labels"] == description["labels"]
    manager = PlansManager(load(folder / f"{PLANS}.json")).get_label_manager(stored)
    declared = [value for value in description["labels"].values()]
    values = {member for value in declared for member in (value if isinstance(value, list) else [value])}
    assert {*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])} == values


def check_refused(root, planned):
    """After a refusal there are no plans but those that were there."""
    folder = root / "nnUNet_preprocessed" / NAME
    if folder.is_dir() and not planned:
        assert {path.name for path in folder.iterdir()} <= {"splits_final.json", "oneshot_atlas.json"}


def plan_any(data, template, copied, **options):
    """Plans what was drawn, and checks the result; gives the folder, or None after a refusal."""
    files, prepared_files, planned, atlases, changes, unlabelled = data.draw(raw_datasets(contents_of(template)))
    root = copied(planned=planned)
    lay_over(root, files, prepared_files, changes, unlabelled)
    if outcome(lambda: plan(atlases=atlases, **options), root, mentions=MENTIONS) is not None:
        check_refused(root, planned)
        return None
    check_planned(root, atlases)
    return root


@examples(30)
@given(st.data())
def test_any_data_set_is_planned_rightly_or_refused_in_a_sentence(template, copied, quick_planner, data):
    plan_any(data, template, copied, no_preprocessing=True)


@examples(4, EXAMPLES // 20)
@given(st.data())
def test_any_data_set_is_preprocessed_rightly_or_refused_in_a_sentence(template, copied, data):
    root = plan_any(data, template, copied)
    if root is not None:
        folder = root / "nnUNet_preprocessed" / NAME
        cases = load(folder / "oneshot_fingerprint.json")["oneshot"]["cases"]
        names = {f"{case}{suffix}" for case in cases for suffix in (".b2nd", "_seg.b2nd", ".pkl")}
        assert {path.name for path in (folder / f"{PLANS}_{CONFIGURATION}").iterdir()} == names
        assert load(folder / "oneshot_preprocessed.json")[f"{PLANS}_{CONFIGURATION}"] == cases


@st.composite
def prepared_datasets(draw, contents):
    """What is laid over the preprocessed data set, what is removed from it, and how it is opened."""
    contents = contents | {"dataset.json": DESCRIPTION, "splits_final.json": SPLITS, "oneshot_atlas.json": ATLASES}
    names = draw(st.sets(st.sampled_from(sorted(contents)), min_size=1, max_size=2))
    files = {name: draw(files_of(contents[name])) for name in sorted(names)}
    suffixes = st.sampled_from([".pkl", ".b2nd", "_seg.b2nd"])
    removed = draw(st.lists(st.tuples(st.sampled_from(CASES), suffixes), max_size=1))
    return files, removed, draw(st.sampled_from([0, 0, 0, 1, 2, 7, "all"]) | TEXTS)


@examples(40)
@given(st.data())
def test_any_preprocessed_data_set_is_opened_rightly_or_refused_in_a_sentence(template, copied, data):
    files, removed, number = data.draw(prepared_datasets(contents_of(template)))
    root = copied(preprocessed=True)
    folder = root / "nnUNet_preprocessed" / NAME
    lay_over(root, {}, files)
    for case, suffix in removed:
        (folder / f"{PLANS}_{CONFIGURATION}" / f"{case}{suffix}").unlink()
    opened = []

    def open_dataset():
        prepared = PreparedDataset.open(dataset=901, plans_name=PLANS, configuration=CONFIGURATION)
        config = OneShotConfig.from_plans(prepared.plans)
        fold = prepared.fold(number)
        opened.append((fold, resolve_roles(prepared, config, fold, lambda line: None)))
        shapes = [prepared.registration_image(case).shape for case in fold.train]
        assert shapes == [(1, 8, 9, 10)] * len(shapes)
        prepared.alignment(fold.train[0], fold.train[-1], shapes[0][1:], shapes[-1][1:])

    if outcome(open_dataset, root, mentions=[*MENTIONS, *files, "Fold "]) is None:
        ((fold, roles),) = opened
        assert set(roles.atlases) <= set(LABELLED) & set(fold.train)
        assert not set(roles.atlases) & {*roles.unlabelled, *roles.progress}
        assert {*fold.train, *fold.validation} <= set(CASES) and not set(fold.train) & set(fold.validation)
