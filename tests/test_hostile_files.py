"""Every file that is read, and every setting: whatever stands there is taken rightly or ends in one of our sentences.

A valid file of each kind is damaged in many ways, most of them drawn with a fixed seed, and read through the function
that reads it in use. ``NNUNET_ONESHOT_EXAMPLES`` sets how many ways are drawn for each kind of file.
"""

import copy
import dataclasses
import errno
import json
import os
import pickle
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hostile_values import nested

import nnunet_oneshot.registries  # noqa: F401  (loads the names that settings may have)
from nnunet_oneshot.checkpoints import load_data, loading_checkpoint
from nnunet_oneshot.config import OVERRIDES_VARIABLE, OneShotConfig, environment_overrides, merge_settings
from nnunet_oneshot.data.fingerprint import images_unchanged, load_fingerprint
from nnunet_oneshot.data.options import Options
from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.roles import resolve_roles
from nnunet_oneshot.distillation.teacher_file import load_teacher, save_teacher
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.evaluation.methods import parse_settings
from nnunet_oneshot.evaluation.runs import claim_folder, finished_records, rows_of
from nnunet_oneshot.inference import read_model
from nnunet_oneshot.io import Each, Maybe, load_json_checked
from nnunet_oneshot.planners import OneShotCPUPlanner
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.sources import axes_in, read_sources
from nnunet_oneshot.registration.dataset.summary import write_summary
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.self_training.guide import Student
from nnunet_oneshot.strict_json import parse_json
from nnunet_oneshot.trainers.base import SETTINGS_FILE, OneShotTrainer

DRAWN = int(os.environ.get("NNUNET_ONESHOT_EXAMPLES", 0)) or 120
PLANS, CONFIGURATION = "nnUNetOneShotCPUPlans", "3d_fullres"
ATLAS, CASE = "case_00", "case_01"
# Python's own words, which tell a user nothing.
NOISE = re.compile(
    r"Traceback|\b(Key|Type|Attribute|Index|Assertion|Recursion)Error\b|object at 0x|NoneType|has no attr"
)
COUNTED: dict[str, int] = {}


INFINITE, NAN = float("inf"), float("nan")
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    1e-320,
    2**32,
    2**64,
    10**400,
    NAN,
    INFINITE,
    -INFINITE,
    "",
    " ",
    "0",
    "x",
]
VALUES += [
    "..",
    "../../x",
    "a\0b",
    "\ud800",
    "x" * 400,
    [],
    [1],
    [1, 2],
    [2, 1],
    [NAN],
    [INFINITE, 0],
    ["a"],
    ["a", "a"],
]
VALUES += [[None], [[1]], [1, 2, 3], [0.2, 0.1], {}, {"a": 1}, {"seed": {}}, nested(60), nested(800)]


def places(content):
    """Every container in a JSON content with each of its keys."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def no_json(whole):
    """Bytes that are no JSON of any file, or hardly."""
    first = whole.index(b'"')
    entry = whole[first : whole.index(b'"', first + 1) + 1] + b": 1, "
    kinds = [b"", b"{", b"null", b"3", b'"text"', b"[]", b"{}", b"[[]]", b"[null]", b"NaN", b"\0" * 50, b"\xff\xfe\xfd"]
    kinds += [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b'{"a":' * 60 + b"1" + b"}" * 60]
    kinds += [whole[:-3], whole + whole, whole.decode().encode("utf-16"), b"\xef\xbb\xbf" + whole, b"1" * 5000]
    return [*kinds, whole[:first] + entry + entry + whole[first:], whole[: len(whole) // 2] + b"\xff" + whole[first:]]


def damaged_json(content, number, seed):
    """Bytes of a JSON file: no JSON, and the content changed at places that are drawn."""
    draw = random.Random(seed)
    yield from no_json(json.dumps(content).encode())
    for _ in range(number):
        changed = {"": copy.deepcopy(content)}
        container, key = draw.choice(list(places(changed)))
        how = draw.choice(["value", "value", "value", "remove", "rename"])
        if how == "value" or container is changed:
            container[key] = draw.choice(VALUES)
        elif how == "remove" or isinstance(container, list):
            del container[key]
        else:
            container[f"{key}x"] = container.pop(key)
        yield json.dumps(changed[""]).encode()


def damaged_bytes(whole, number, seed):
    """A binary file emptied, cut, lengthened, and with bytes flipped at places that are drawn."""
    draw = random.Random(seed)
    yield from (b"", b"x" * 100, whole[:-1], whole[: len(whole) // 2], whole[:60], whole + b"x" * 50, whole[30:])
    for _ in range(number):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(content)


def tree(root):
    """Every path below a folder, with what it holds."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(root.rglob("*"))}


def refusal(run, mention):
    """Why something was refused, in a sentence that names the file or setting; None where it was taken."""
    try:
        run()
    except OneShotError as error:
        message = str(error)
        assert mention in message and message.rstrip().endswith((".", "}")), message
        assert not NOISE.search(message) and len(message) < 4000, message
        return message
    return None


# Settings

FIELDS = [
    (block.name if block.default_factory is not dataclasses.MISSING else None, name)
    for block in dataclasses.fields(OneShotConfig)
    for name in (
        [one.name for one in dataclasses.fields(block.default_factory)]
        if block.default_factory is not dataclasses.MISSING
        else [block.name]
    )
]


def by_plans(block, monkeypatch):
    return OneShotConfig.from_plans({"plans_name": "P", "oneshot": block})


def by_variable(block, monkeypatch):
    monkeypatch.setenv(OVERRIDES_VARIABLE, json.dumps(block))
    return OneShotConfig.from_plans({"plans_name": "P"})


def by_option(block, monkeypatch):
    """As ``benchmark --set KEY=VALUE`` reads it."""
    ((key, value),) = block.items()
    if isinstance(value, dict) and value:
        ((inner, value),) = value.items()
        key = f"{key}.{inner}"
    settings = merge_settings(environment_overrides(), parse_settings([f"{key}={json.dumps(value)}"]))
    return OneShotConfig.from_plans({"plans_name": "P", "oneshot": settings})


@pytest.mark.parametrize("door", [by_plans, by_variable, by_option])
@pytest.mark.parametrize(("block", "name"), FIELDS)
def test_every_setting_with_every_value_is_taken_or_named(door, block, name, monkeypatch):
    refused = 0
    for value in VALUES:
        # Objects of settings are a field's own form; the name in them is what is wrong then.
        mention = name if not isinstance(value, dict) else ""
        whole = {name: value} if block is None else {block: {name: value}}
        if door is not by_plans and value in (nested(60), nested(800)):
            mention = ""
        try:
            written = json.dumps(whole)
        except RecursionError:
            continue
        found = []
        message = refusal(lambda whole=whole, found=found: found.append(door(whole, monkeypatch)), mention)
        refused += message is not None
        count("settings")
        if message is None:
            read = json.dumps(found[0].to_dict())
            assert "NaN" not in read and "Infinity" not in read, written
    assert refused >= len(VALUES) // 3


def count(kind):
    COUNTED[kind] = COUNTED.get(kind, 0) + 1


# Files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A planned and preprocessed data set, with a registration, a model, a benchmark and sentinels beside them."""
    from tiny_data import draw_blobs, write_image

    root = tmp_path_factory.mktemp("home")
    raw = root / "nnUNet_raw" / "Dataset901_Tiny"
    for folder in (raw / "imagesTr", raw / "labelsTr", root / "nnUNet_results", root / "elsewhere"):
        folder.mkdir(parents=True)
    (root / "elsewhere" / "sentinel.txt").write_text("keep")
    numbers = np.random.default_rng(0)
    for case in (ATLAS, CASE, "case_02"):
        image, label = draw_blobs((8, 9, 10), numbers)
        write_image(raw / "imagesTr" / f"{case}_0000.nii.gz", image)
        if case == ATLAS:
            write_image(raw / "labelsTr" / f"{case}.nii.gz", label)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "left": 1, "right": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    with pytest.MonkeyPatch.context() as patch:
        point_to(root, patch)
        torch.set_num_threads(1)
        options = Options(configurations=(CONFIGURATION,), num_processes=[1], progress=False)
        plan_and_preprocess(901, OneShotCPUPlanner, options, log=lambda line: None)
        prepared = opened()
        roles_of(prepared)
        furnish(root, prepared)
    return root


def point_to(root, patch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        patch.setenv(name, str(root / name))


def opened():
    return PreparedDataset.open(dataset=901, plans_name=PLANS, configuration=CONFIGURATION)


def roles_of(prepared):
    return resolve_roles(prepared, OneShotConfig.from_plans(prepared.plans), prepared.fold(0), lambda line: None)


def furnish(root, prepared):
    """Adds what later commands leave: a registration, a model, a benchmark's records, a training's settings."""
    cache = RegistrationCache(root / "registrations")
    shapes = prepared.shape(ATLAS), prepared.shape(CASE)
    figures = {"similarity_before": 0.3, "similarity_after": 0.5, "folding": 0.0, "affine_start": "moments"}
    pair = Registration(ATLAS, CASE, np.eye(4), np.ones((3, 2, 2, 2), np.float32), *shapes, figures)
    sources = read_sources(prepared, [CASE], atlases=[ATLAS], caches=[])[CASE]
    cache.save(pair, key="key", sources=sources, parameters={}, versions={})
    model = root / "model"
    (model / "fold_0").mkdir(parents=True)
    shutil.copy(prepared.base / f"{PLANS}.json", model / "plans.json")
    shutil.copy(prepared.base / "dataset.json", model)
    content = {"network_weights": {"w": torch.arange(300.0)}, "trainer_name": "OneShotDistillTrainer"}
    content["init_args"] = {"configuration": CONFIGURATION, "fold": 0}
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")
    save_teacher(str(model / "checkpoint_latest_teacher.pth"), *teacher(), epoch=3)
    settings = {"settings": OneShotConfig().to_dict(), "atlases": [ATLAS], "versions": {}}
    (model / SETTINGS_FILE).write_text(json.dumps(settings))
    run = root / "benchmark" / "runs" / "distill"
    run.mkdir(parents=True)
    record = {name: "x" for name in ("dataset", "plans", "fold", "command", "device", "segmentations")}
    record |= {"method": "distill", "atlas": ATLAS, "seed": 1, "epochs": None, "seconds": 1.5, "peak_memory_mb": 10}
    record |= {"resumed": False, "overrides": {}, "versions": {"torch": "2"}}
    record["scores"] = [{"case": CASE, "label": "left", "dice": 0.5, "hd95": 1.0, "nsd_2mm": None}]
    (run / "run.json").write_text(json.dumps(record))
    (root / "benchmark" / "benchmark.json").write_text(json.dumps(BENCHMARK))


BENCHMARK = {"dataset": "Dataset901_Tiny", "plans": PLANS, "epochs": 5, "settings": {"seed": 1}}


def teacher():
    module = torch.nn.Linear(7, 5)
    return module, torch.optim.AdamW(module.parameters(), lr=1e-3)


# How each file is read in use. What is read must not be wrong; that it is used rightly is tested where it is used.


def read_raw(root):
    raw = RawDataset(root / "nnUNet_raw" / "Dataset901_Tiny")
    return raw.label_manager, raw.channel_names, [raw.images(case) for case in raw.cases]


def read_prepared(root):
    prepared = opened()
    roles_of(prepared)
    assert prepared.registration_image(CASE).shape[0] == 1
    shapes = prepared.shape(CASE), prepared.shape(ATLAS)
    prepared.alignment(CASE, ATLAS, *shapes)
    configuration = prepared.configuration_manager
    assert configuration.batch_dice in (True, False) and len(configuration.pool_op_kernel_sizes) >= 0
    return prepared.label_manager, prepared.score_labels(), prepared.num_channels, prepared.spacing(CASE)


def read_prepared_case(root):
    prepared = opened()
    assert prepared.image(CASE).shape == (1, *prepared.shape(CASE))
    assert np.isfinite(prepared.spacing_of(prepared.properties(CASE))).all() and prepared.axes(CASE).shape == (3, 3)
    prepared.segmentation(CASE)


def read_fingerprint(root):
    prepared = opened()
    images_unchanged(RawDataset(root / "nnUNet_raw" / "Dataset901_Tiny"), prepared.base)
    load_fingerprint(prepared.base)


def read_registration(root):
    prepared, cache = opened(), RegistrationCache(root / "registrations")
    source = read_sources(prepared, [CASE], atlases=[ATLAS], caches=[cache])[CASE]
    assert axes_in(source).shape == (3, 3) and np.isfinite(axes_in(source)).all()
    shapes = prepared.shape(ATLAS), prepared.shape(CASE)
    if cache.state(ATLAS, CASE, "key", shapes) != "current":
        cache.quality(ATLAS, CASE)
        return
    pair = cache.load(ATLAS, CASE)
    assert np.isfinite(pair.affine).all() and (pair.atlas_shape, pair.case_shape) == shapes
    write_summary(cache, ATLAS, [CASE])
    os.remove(cache.folder / f"quality_{ATLAS}.csv")


def read_guide(root):
    Student(root / "model", opened(), fold=0, device=torch.device("cpu"))


def read_checkpoint(root):
    path = root / "model" / "fold_0" / "checkpoint_final.pth"
    with loading_checkpoint(path, advice="Train again."):
        content = load_data(path)
        assert torch.equal(content["network_weights"]["w"], torch.arange(300.0))


def read_teacher(root):
    load_teacher(str(root / "model" / "checkpoint_latest.pth"), *teacher(), epoch=3)


def read_settings(root):
    trainer = SimpleNamespace(output_folder=str(root / "model"), config=OneShotConfig())
    OneShotTrainer._changed_settings(trainer, OneShotTrainer._stored_settings(trainer))


def read_records(root):
    for record in finished_records(root / "benchmark"):
        json.dumps(rows_of(record))


BASE, CASES = "nnUNet_preprocessed/Dataset901_Tiny", f"{PLANS}_{CONFIGURATION}"
JSON_FILES = {
    "nnUNet_raw/Dataset901_Tiny/dataset.json": read_raw,
    f"{BASE}/{PLANS}.json": read_prepared,
    f"{BASE}/dataset.json": read_prepared,
    f"{BASE}/splits_final.json": read_prepared,
    f"{BASE}/oneshot_atlas.json": read_prepared,
    f"{BASE}/oneshot_preprocessed.json": read_prepared,
    f"{BASE}/oneshot_fingerprint.json": read_fingerprint,
    f"registrations/{ATLAS}/{CASE}.json": read_registration,
    "model/plans.json": lambda root: (read_model(root / "model"), read_guide(root)),
    "model/dataset.json": lambda root: (read_model(root / "model"), read_guide(root)),
    f"model/{SETTINGS_FILE}": read_settings,
    "benchmark/runs/distill/run.json": read_records,
    "benchmark/benchmark.json": lambda root: claim_folder(
        root / "benchmark" / "benchmark.json", BENCHMARK, "benchmark"
    ),
}
BINARY_FILES = {
    f"{BASE}/{CASES}/{CASE}.b2nd": read_prepared_case,
    f"{BASE}/{CASES}/{CASE}_seg.b2nd": read_prepared_case,
    f"{BASE}/{CASES}/{CASE}.pkl": read_prepared_case,
    f"registrations/{ATLAS}/{CASE}.npz": read_registration,
    "model/fold_0/checkpoint_final.pth": read_checkpoint,
    "model/checkpoint_latest_teacher.pth": read_teacher,
}
# How an error names these, where it is not by their file.
NAMED = {"benchmark/benchmark.json": "benchmark", "model/plans.json": "model", "model/dataset.json": "model"}


def read_damaged(home, name, contents, read):
    """Reads a file with each of some contents; gives the number of refusals. Nothing else is changed."""
    path = home / name
    whole = path.read_bytes()
    mention = NAMED.get(name, path.name.split(".")[0])
    refused = 0
    before = tree(home)
    try:
        for content in contents:
            path.write_bytes(content)
            refused += refusal(lambda: read(home), mention) is not None
            count(name)
    finally:
        path.write_bytes(whole)
    after = tree(home)
    assert after == before, [path for path in {*before, *after} if before.get(path) != after.get(path)]
    assert refusal(lambda: read(home), mention) is None
    return refused


@pytest.fixture(autouse=True)
def _at_home(request, monkeypatch):
    if "home" in request.fixturenames:
        point_to(request.getfixturevalue("home"), monkeypatch)


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_are_read_rightly_or_named(home, name):
    content = json.loads((home / name).read_text())
    assert read_damaged(home, name, damaged_json(content, DRAWN, seed=name), JSON_FILES[name]) >= 15


@pytest.mark.parametrize("name", BINARY_FILES)
def test_binary_files_are_read_rightly_or_named(home, name):
    contents = damaged_bytes((home / name).read_bytes(), DRAWN, seed=name)
    if name.endswith(".pkl"):
        # Bytes that nobody flipped on purpose may build any object of the standard library.
        contents = damaged_bytes((home / name).read_bytes(), 0, seed=name)
    assert read_damaged(home, name, contents, BINARY_FILES[name]) >= (0 if "registrations" in name else 4)


PROPERTIES = [None, [], 3, {}, {"spacing": [1, 1, 1]}, {"class_locations": {}}]
PROPERTIES += [
    {"class_locations": {}, "spacing": spacing} for spacing in (None, "x", [1, 1], [0, 1, 1], [1, NAN, 1], {})
]


@pytest.mark.parametrize("content", PROPERTIES)
def test_properties_of_another_shape_are_named(home, content):
    name = f"{BASE}/{CASES}/{CASE}.pkl"
    assert read_damaged(home, name, [pickle.dumps(content)], read_prepared_case) == 1


def test_as_many_were_read_as_the_docs_say():
    """Runs last in this file; with single tests chosen there is nothing to count."""
    if len(COUNTED) == 1 + len(JSON_FILES) + len(BINARY_FILES):
        print(sum(COUNTED.values()), COUNTED)
        assert sum(COUNTED.values()) >= 3000


# A disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_a_disk_refuses_any_command_is_told(capsys, code):
    def refused():
        raise OSError(code, os.strerror(code), "/results/x.png")

    assert exit_status(refused) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: The disk refuses /results/x.png") and os.strerror(code) in error


def test_other_errors_of_the_system_are_not_taken_for_the_disks():
    with pytest.raises(BrokenPipeError):
        exit_status(lambda: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, "Broken pipe")))


# The reader itself

SHAPE = {"a": float, "b?": [{"c": Maybe(str)}], "d?": Each([int]), "e?": bool}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}', None),
        ('{"a": 1.5, "b": [], "d": {}, "other": null}', None),
        ('{"a": 1, "b": [{"c": null}, {"c": "x"}], "d": {"x": [1]}, "e": false}', None),
        ("null", "must hold a JSON object {...}, found null"),
        ("{}", 'lacks "a"'),
        ('{"a": NaN}', 'must hold a number as "a", found NaN'),
        ('{"a": true}', 'must hold a number as "a", found true'),
        ('{"a": 1, "b": [{"c": 3}]}', 'must hold text as "b"[0]["c"], found 3'),
        ('{"a": 1, "b": [{}]}', 'lacks "c" in "b"[0]'),
        ('{"a": 1, "d": {"x": [1.5]}}', 'must hold a whole number as "d"["x"][0], found 1.5'),
        ('{"a": 1, "e": 0}', 'must hold true or false as "e", found 0'),
        ('{"a": 1, "a": 2}', 'an object has the entry "a" more than once'),
        ('{"a": 1, "x": ' + "[" * 60 + "]" * 60 + "}", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_the_reader_names_the_place(tmp_path, text, said):
    path = tmp_path / "file.json"
    path.write_text(text)
    if said is None:
        assert load_json_checked(path, "the file", SHAPE) == json.loads(text)
        return
    with pytest.raises(OneShotError) as caught:
        load_json_checked(path, "the file", SHAPE)
    assert f"The file {path}" in str(caught.value) and said in str(caught.value)


def test_numbers_that_are_too_long_are_no_json():
    with pytest.raises(ValueError):
        parse_json("9" * 5000)
