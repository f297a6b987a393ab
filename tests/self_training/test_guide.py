"""The guide through the commands: which models are refused, what is read, and where guided registrations go."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_data import draw_blobs, write_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.self_training.guide import StudentInTraining

PLANS, CONFIGURATION, TRAINER = "nnUNetOneShotCPUPlans", "3d_fullres", "OneShotDistillTrainer"


@pytest.fixture
def student(tiny_dataset):
    """A function that prepares a dataset and writes a trained model of fold 0: (dataset, folder of the model).

    Its weights are random: what is tested here is what becomes of its segmentations, not how good they are.
    """
    torch.set_num_threads(1)

    def make(*, configuration=CONFIGURATION, seed=0, **settings):
        dataset = tiny_dataset(**{"labelled": "all", "n_cases": 5, **settings})
        plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", configuration]
        assert main([*plan, "--no_pbar"]) == 0
        folder = dataset.results / f"{TRAINER}__{PLANS}__{configuration}"
        write_model(dataset, folder, configuration=configuration, seed=seed)
        return dataset, folder

    return make


def write_model(dataset, folder, *, configuration=CONFIGURATION, seed=0, fold=0):
    plans = json.loads((dataset.preprocessed / f"{PLANS}.json").read_text())
    dataset_json = json.loads((dataset.preprocessed / "dataset.json").read_text())
    settings = PlansManager(plans).get_configuration(configuration)
    manager = PlansManager(plans).get_label_manager(dataset_json)
    torch.manual_seed(seed)
    network = get_network_from_plans(
        settings.network_arch_class_name,
        settings.network_arch_init_kwargs,
        settings.network_arch_init_kwargs_req_import,
        len(dataset_json["channel_names"]),
        manager.num_segmentation_heads,
        deep_supervision=False,
    )
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": TRAINER,
        "init_args": {"configuration": configuration, "fold": fold},
        "inference_allowed_mirroring_axes": None,
    }
    (folder / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))


def register(dataset, *arguments, configuration=CONFIGURATION):
    return main(["register", "-d", str(dataset.id), "-c", configuration, "-p", PLANS, *map(str, arguments)])


def propagate(dataset, out, *arguments, configuration=CONFIGURATION):
    options = ["propagate", "-d", str(dataset.id), "-c", configuration, "-p", PLANS, "-o", str(out)]
    return main([*options, *map(str, arguments)])


def files(dataset, pattern="**/*"):
    """Content of the registrations' files, by path."""
    base = dataset.preprocessed / "oneshot_registrations"
    return {str(p.relative_to(base)): p.read_bytes() for p in sorted(base.glob(pattern)) if p.is_file()}


def test_guided_registrations_stay_apart_and_resume(student, capsys):
    dataset, model = student()
    assert register(dataset) == 0
    before = files(dataset)
    assert register(dataset, "--guide", model) == 0
    assert "is guided by the segmentations of" in capsys.readouterr().out
    after = files(dataset)
    guided = {name: content for name, content in after.items() if name not in before}
    assert {name: after[name] for name in before} == before
    assert len(guided) == len(before) and all(f"{CONFIGURATION}_guided/" in name for name in guided)
    assert {name.rpartition(".")[2] for name in guided} == {"csv", "json", "npz", "png"}
    record = json.loads(next(content for name, content in guided.items() if name.endswith(".json")))
    assert 0 <= record["quality"]["guide_dice_after"] <= 1
    assert record["parameters"]["guide_weight"] == 0.3
    assert str(model) not in json.dumps(record)

    removed = next(p for p in dataset.preprocessed.glob("oneshot_registrations/*_guided/**/*.npz"))
    removed.unlink()
    assert register(dataset, "--guide", model) == 0
    assert f"1 of {len(guided) // 3} pairs" in capsys.readouterr().out
    assert register(dataset, "--guide", model) == 0
    assert "are cached in" in capsys.readouterr().out
    assert register(dataset) == 0
    assert "are cached in" in capsys.readouterr().out


def test_another_training_or_weight_is_another_registration(student, monkeypatch, capsys):
    dataset, model = student(n_cases=3)
    assert register(dataset, "--guide", model, "--no_figures") == 0
    first = files(dataset, "*_guided/**/*")
    moved = model.with_name("moved")
    shutil.copytree(model, moved)
    capsys.readouterr()
    assert register(dataset, "--guide", moved, "--no_figures") == 0
    assert "are cached in" in capsys.readouterr().out
    write_model(dataset, model, seed=1)
    assert register(dataset, "--guide", model, "--no_figures") == 0
    both = files(dataset, "*_guided/**/*")
    assert len(both) == 2 * len(first) and first.items() <= both.items()
    capsys.readouterr()
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"guide_weight": 0.5}}))
    assert register(dataset, "--guide", model, "--no_figures") == 0
    assert "2 of 2 pairs" in capsys.readouterr().out


def test_labels_of_other_cases_stay_closed(student, monkeypatch):
    import nnunet_oneshot.data.preprocessed as preprocessed

    dataset, model = student()
    opened, original = set(), preprocessed.open_array

    def open_array(folder, case, suffix="", **options):
        opened.add((case, suffix))
        return original(folder, case, suffix, **options)

    monkeypatch.setattr(preprocessed, "open_array", open_array)
    for label in (*dataset.preprocessed.glob("gt_segmentations/*"), *dataset.raw.glob("labelsTr/*")):
        # The names tell which cases are labelled; what they hold must not matter.
        label.write_bytes(b"no label")
    assert register(dataset, "--guide", model) == 0
    atlas = json.loads((dataset.preprocessed / "oneshot_atlas.json").read_text())["atlases"]
    assert {case for case, suffix in opened if suffix == "_seg"} == set(atlas)
    assert {case for case, suffix in opened if suffix == ""} == set(dataset.cases)


def test_settings_choose_the_guide_as_the_option_does(student, monkeypatch, tmp_path, capsys):
    dataset, model = student(n_cases=3)
    assert propagate(dataset, tmp_path / "option", "--guide", model) == 0
    before = files(dataset)
    assert propagate(dataset, tmp_path / "plain") == 0
    assert len(files(dataset)) > len(before)
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"guide": str(model)}}))
    capsys.readouterr()
    assert propagate(dataset, tmp_path / "setting") == 0
    assert "are cached in" in capsys.readouterr().out
    reports = [json.loads((tmp_path / n / "propagation.json").read_text()) for n in ("option", "setting", "plain")]
    assert [report["guide"] for report in reports] == [str(model), str(model), None]


def test_regions_ignore_label_and_new_images(student, tmp_path):
    labels = {"background": 0, "both": [1, 2], "right": 2, "ignore": 3}
    dataset, model = student(n_cases=3, labels=labels, regions_class_order=[1, 2])
    (tmp_path / "in").mkdir()
    image, _ = draw_blobs((16, 18, 14), np.random.default_rng(7))
    write_image(tmp_path / "in" / "new_0000.nii.gz", image)
    assert propagate(dataset, tmp_path / "out", "--guide", model, "-i", tmp_path / "in") == 0
    assert (tmp_path / "out" / "new.nii.gz").is_file()
    assert register(dataset, "--guide", model) == 0


def test_student_sees_images_as_preprocessed_and_not_as_registered(student, monkeypatch, tmp_path):
    from nnunet_oneshot.data.preprocessed import load_image
    from nnunet_oneshot.self_training.guide import Student

    dataset, model = student(n_cases=3)
    seen, original = [], Student.probabilities
    monkeypatch.setattr(Student, "probabilities", lambda self, image: seen.append(image) or original(self, image))
    # Stands for what registration does to its images alone.
    monkeypatch.setattr(PreparedDataset, "with_outline", lambda self, image: image + 5)
    assert register(dataset, "--guide", model, "--no_figures") == 0
    folder = str(dataset.preprocessed / f"{PLANS}_{CONFIGURATION}")
    (atlas,) = json.loads((dataset.preprocessed / "oneshot_atlas.json").read_text())["atlases"]
    others = [case for case in dataset.cases if case != atlas]
    assert len(seen) == len(others)
    assert all(np.array_equal(image, load_image(folder, case)) for image, case in zip(seen, others, strict=True))

    (tmp_path / "in").mkdir()
    shutil.copyfile(dataset.image(others[0]), tmp_path / "in" / "new_0000.nii.gz")
    seen.clear()
    assert propagate(dataset, tmp_path / "out", "--guide", model, "-i", tmp_path / "in") == 0
    assert len(seen) == 1 and np.allclose(seen[0], load_image(folder, others[0]), atol=1e-5)


def test_two_dimensional_configuration_of_volumes(student):
    dataset, model = student(n_cases=3, configuration="2d")
    assert register(dataset, "--guide", model, configuration="2d") == 0
    assert files(dataset, "*2d_guided/**/*.npz")


def test_atlas_maps_follow_the_order_of_the_heads(student):
    from nnunet_oneshot.self_training.guide import Student

    labels = {"background": 0, "both": [1, 2], "right": 2, "ignore": 3}
    dataset, model = student(n_cases=3, labels=labels, regions_class_order=[1, 2])
    own = Student(model, opened(dataset), fold=0, device=torch.device("cpu"))
    maps = own.atlas_maps(np.array([-1, 0, 1, 2, 3]).reshape(1, 5, 1, 1))
    assert maps[:, :, 0, 0].tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 0]]
    shape = (1, 12, 12, 12)
    probabilities = own.probabilities(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert probabilities.shape == (2, *shape[1:])
    assert 0 <= probabilities.min() <= probabilities.max() <= 1


def opened(dataset):
    return PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration=CONFIGURATION)


def edited(model, name, **changes):
    path = model / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edited_configuration(model, **changes):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"][CONFIGURATION].update(changes)
    edited(model, "plans.json", configurations=plans["configurations"])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def edited_checkpoint(model, **arguments):
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["init_args"].update(arguments)
    torch.save(checkpoint, path)


def test_a_student_in_training_is_copied(student):
    dataset, _ = student(n_cases=3)
    prepared = opened(dataset)
    settings = prepared.configuration_manager
    network = get_network_from_plans(
        settings.network_arch_class_name,
        settings.network_arch_init_kwargs,
        settings.network_arch_init_kwargs_req_import,
        1,
        prepared.label_manager.num_segmentation_heads,
        deep_supervision=True,
    )

    def copied():
        return StudentInTraining(
            network,
            prepared,
            mirror_axes=None,
            device=torch.device("cpu"),
            precision="float32",
            trust=np.ones(2),
        )

    # Away from the border, where nnU-Net's window weighs next to nothing and rounds what it has in half precision.
    inner = (slice(None), *[slice(4, -4)] * 3)
    image = np.random.default_rng(0).normal(size=(1, *settings.patch_size)).astype(np.float32)
    guide = copied()
    with torch.no_grad():
        output = network.eval()(torch.from_numpy(image)[None])[0]
    expected = output.softmax(1)[0, 1:].numpy()[inner]
    digest = guide.digest
    assert np.allclose(guide.probabilities(image)[inner], expected, atol=5e-3)
    assert network.decoder.deep_supervision
    with torch.no_grad():
        network.decoder.seg_layers[-1].bias.add_(torch.arange(3.0))
    assert np.allclose(guide.probabilities(image)[inner], expected, atol=5e-3)
    assert not np.allclose(copied().probabilities(image)[inner], expected, atol=0.1)
    assert guide.digest == digest != copied().digest


def test_a_student_in_training_is_not_compiled(student, monkeypatch):
    from torch._dynamo import OptimizedModule

    dataset, _ = student(n_cases=3)
    prepared = opened(dataset)
    settings = prepared.configuration_manager
    network = get_network_from_plans(
        settings.network_arch_class_name,
        settings.network_arch_init_kwargs,
        settings.network_arch_init_kwargs_req_import,
        1,
        prepared.label_manager.num_segmentation_heads,
        deep_supervision=True,
    )
    monkeypatch.setenv("nnUNet_compile", "true")
    guide = StudentInTraining(
        network, prepared, mirror_axes=None, device=torch.device("cpu"), precision="float32", trust=np.ones(2)
    )
    assert not isinstance(guide._predictor.network, OptimizedModule)
    assert os.environ["nnUNet_compile"] == "true"


def test_models_that_do_not_fit_are_refused(student, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, model = student(n_cases=3)
    damages = [
        (lambda m: shutil.rmtree(m), "is no folder"),
        (lambda m: (m / "plans.json").unlink(), "holds no plans.json"),
        (lambda m: (m / "fold_0").rename(m / "fold_1"), "no finished training of fold 0"),
        (lambda m: (m / "fold_0" / "checkpoint_final.pth").write_bytes(b"x" * 100), "is damaged"),
        (lambda m: edited_checkpoint(m, fold=1), "another fold"),
        (lambda m: edited_checkpoint(m, plans=Harmful()), "could run code"),
        (lambda m: edited_checkpoint(m, configuration="2d"), "another configuration"),
        (lambda m: edited(m, "plans.json", dataset_name="Dataset902_Other"), "another dataset"),
        (lambda m: edited(m, "plans.json", configurations={}), "without configuration 3d_fullres"),
        (lambda m: edited_configuration(m, spacing=[2.0, 1.0, 1.0]), "another spacing"),
        (lambda m: edited_configuration(m, normalization_schemes=["NoNormalization"]), "another normalization"),
        (lambda m: edited(m, "dataset.json", labels={"background": 0, "left": 1}), "of dataset.json"),
    ]
    for number, (damage, message) in enumerate(damages):
        copy = tmp_path / f"model_{number}"
        shutil.copytree(model, copy)
        damage(copy)
        assert register(dataset, "--guide", copy) == 1
        error = capsys.readouterr().err
        assert message in error and str(copy) in error
    assert not (dataset.preprocessed / "oneshot_registrations").exists()
    assert not (tmp_path / "ran").exists()


def test_methods_that_no_guide_can_change_are_refused(student, monkeypatch, tmp_path, capsys):
    dataset, model = student(n_cases=3)
    assert propagate(dataset, tmp_path / "out", "--method", "affine", "--guide", model) == 1
    assert "takes no guide" in capsys.readouterr().err
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"method": "network"}}))
    assert register(dataset, "--guide", model) == 1
    assert "a guide cannot change" in capsys.readouterr().err


def test_training_uses_the_guide_its_settings_name_but_not_its_own_folder(student, monkeypatch):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_oneshot.environment import TRAINER_FOLDER
    from nnunet_oneshot.errors import OneShotError
    from nnunet_oneshot.registration.dataset.register import DatasetRegistrar

    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    dataset, model = student(n_cases=4)
    registered = []

    class Stop(Exception):
        pass

    def stop(registrar, cases, *, fold):
        registered.append((registrar.config.registration.guide, fold))
        raise Stop

    monkeypatch.setattr(DatasetRegistrar, "register", stop)
    copy = model.with_name("first_round")
    shutil.copytree(model, copy)
    for guide, expected in ((None, Stop), (copy, Stop), (model, OneShotError)):
        settings = {} if guide is None else {"registration": {"guide": str(guide)}}
        monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(settings))
        trainer = recursive_find_trainer_class_by_name(TRAINER)(
            plans={**json.loads((model / "plans.json").read_text()), "continue_training": False},
            configuration=CONFIGURATION,
            fold=0,
            dataset_json=json.loads((model / "dataset.json").read_text()),
            device=torch.device("cpu"),
        )
        trainer.initialize()
        with pytest.raises(expected):
            trainer.get_dataloaders()
    assert registered == [(None, 0), (str(copy), 0)]
