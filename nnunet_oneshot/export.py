"""Writes a trained model as one of stock nnU-Net, which predicts with it where this package is not installed.

The student is the plan's own network, so only the names change: checkpoints say ``nnUNetTrainer`` and hold what
prediction reads (weights, configuration, mirroring axes); teacher and optimiser stay behind, plans stay as they are.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint
from nnunet_oneshot.data.raw import dataset_name, find_images
from nnunet_oneshot.data.verify import check_images
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.inference import CHECKPOINT, load_predictor, read_model
from nnunet_oneshot.io import require_env, temporary_folder, writing
from nnunet_oneshot.names import check_name
from nnunet_oneshot.progress import tracked

STOCK_TRAINER = "nnUNetTrainer"
_KEPT = ("inference_allowed_mirroring_axes", "current_epoch")
# Two runs of the same network on the same device differ by rounding at most.
_TOLERANCE = 1e-3


def export_model(
    *,
    dataset: str,
    configuration: str,
    plans_name: str,
    trainer: str,
    out: str | Path,
    folds: Sequence[str] | None = None,
    images: str | Path | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> Path:
    """Exports a trained model and checks that it predicts what the original predicts.

    Args:
        dataset: Name or number of the dataset.
        configuration: Such as ``3d_fullres``.
        plans_name: Such as ``nnUNetOneShotPlans``.
        trainer: Name of the trainer the model was trained with.
        out: A path ending in ``.zip`` (written so that ``nnUNetv2_install_pretrained_model_from_zip`` installs it), or
            the model folder to be made; in an existing folder, ``nnUNetTrainer__PLANS__CONFIGURATION`` is made.
        folds: Folds to export; None is every finished one.
        images: Folder of images in nnU-Net's naming on which the models are compared; None is a generated image.
        device: Where the comparison runs.
        log: Receives each line that is shown.

    Returns:
        The folder or zip file that was written.

    Raises:
        OneShotError: There is no such trained model, the target exists, or the predictions differ.
    """
    for value, what, option in ((trainer, "trainer", "-tr"), (plans_name, "name of the plans", "-p")):
        check_name(value, what, option)
    check_name(configuration, "configuration", "-c")
    (results,) = require_env("nnUNet_results")
    usable_device(device)
    name = dataset_name(dataset, results)
    source = _trained_model(results / name, f"{trainer}__{plans_name}__{configuration}")
    folds = _finished_folds(source, folds)
    stock_name = f"{STOCK_TRAINER}__{plans_name}__{configuration}"
    out = Path(out).absolute()
    as_zip = out.suffix == ".zip"
    target = out / stock_name if out.is_dir() and not as_zip else out
    if target.exists():
        raise OneShotError(f"{target} exists already and is not overwritten: give -o another path.")
    with writing(target), temporary_folder(target.parent, "export") as working:
        model = working / name / stock_name
        _write_model(source, model, folds=folds, configuration=configuration)
        cases = _compare(source, model, folds=folds, images=images, device=device)
        if as_zip:
            _zip(working / name, working / "model.zip")
            os.replace(working / "model.zip", target)
        else:
            os.replace(model, target)
    log(f"Predictions of the exported and the original model agree on {cases}.")
    if as_zip:
        log(f"Wrote {target}. Install it with: nnUNetv2_install_pretrained_model_from_zip {target}")
    else:
        shown = " ".join(folds)
        log(f"Wrote {target}. Predict with: nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {target} -f {shown}")
    return target


def _trained_model(folder: Path, name: str) -> Path:
    if (folder / name).is_dir():
        return folder / name
    present = sorted(p.name for p in folder.glob("*__*__*")) if folder.is_dir() else []
    raise OneShotError(
        f"There is no trained model {name} in {folder}. Found: {present or 'none'}. Check -tr, -p and -c, or train it "
        f"with nnUNetv2_train."
    )


def _finished_folds(source: Path, folds: Sequence[str] | None) -> list[str]:
    finished = sorted(p.parent.name.removeprefix("fold_") for p in source.glob(f"fold_*/{CHECKPOINT}"))
    if folds is None:
        # nnU-Net's own choice too: a model trained on all cases is another model, not another fold.
        folds = [fold for fold in finished if fold != "all"] or finished
    missing = sorted(set(folds) - set(finished))
    if missing or not folds:
        raise OneShotError(
            f"{source} has no finished training ({CHECKPOINT}) for fold {', '.join(missing) or '0'}; finished: "
            f"{finished or 'none'}. Finish it with nnUNetv2_train, or give -f the finished folds."
        )
    return list(folds)


def _write_model(source: Path, model: Path, *, folds: Sequence[str], configuration: str) -> None:
    plans, dataset_json = read_model(source)
    for fold in folds:
        checkpoint = _load_checkpoint(source / f"fold_{fold}" / CHECKPOINT)
        # Built from plain types: an object of this package in the file could not be read without the package.
        stock = {
            "network_weights": checkpoint["network_weights"],
            "trainer_name": STOCK_TRAINER,
            "init_args": {
                "plans": plans,
                "configuration": configuration,
                "fold": fold if fold == "all" else int(fold),
                "dataset_json": dataset_json,
                "device": "cpu",
            },
            **{key: checkpoint[key] for key in _KEPT},
        }
        folder = model / f"fold_{fold}"
        folder.mkdir(parents=True)
        torch.save(stock, folder / CHECKPOINT)
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, model / name)


def _load_checkpoint(path: Path) -> dict:
    advice = "Train this fold again, or leave it out with -f."
    with loading_checkpoint(path, advice=advice):
        checkpoint = load_data(path)
        return {key: checkpoint.get(key) for key in _KEPT} | {"network_weights": checkpoint["network_weights"]}


def _compare(source: Path, model: Path, *, folds: Sequence[str], images: str | Path | None, device: str) -> str:
    """Predicts with both models; returns what was compared, or raises where they differ."""
    original, exported = (load_predictor(folder, folds, device) for folder in (source, model))
    compared = 0
    total = 1 if images is None else len(find_images(images, original.dataset_json["file_ending"]))
    for name, image, spacing in tracked(_test_images(original, images), total, "Comparing predictions"):
        logits = [_logits(p, image, spacing) for p in (original, exported)]
        difference = float((logits[0] - logits[1]).abs().max())
        if not difference <= _TOLERANCE:
            raise OneShotError(
                f"The exported model predicts something else than {source} on {name}: logits differ by "
                f"{difference:.3g} (at most {_TOLERANCE} was expected). Nothing was written."
            )
        compared += 1
    return f"{compared} image{'s' if compared != 1 else ''}" + ("" if images else " (generated)")


def _logits(predictor, image: np.ndarray, spacing: Sequence[float]) -> torch.Tensor:
    from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy

    previous = None
    if predictor.configuration_manager.previous_stage_name is not None:
        # Both models are shown the same, whatever it is.
        labels = [0, *predictor.label_manager.foreground_labels]
        previous = np.random.default_rng(0).choice(labels, (1, *image.shape[1:])).astype(np.int16)
    adapter = PreprocessAdapterFromNpy(
        [image],
        [previous],
        [{"spacing": list(spacing)}],
        [None],
        predictor.plans_manager,
        predictor.dataset_json,
        predictor.configuration_manager,
        num_threads_in_multithreaded=1,
    )
    return predictor.predict_logits_from_preprocessed_data(next(adapter)["data"])


def _test_images(predictor, images: str | Path | None):
    """Yields name, image (C, Z, Y, X) and spacing of everything the models are compared on."""
    if images is None:
        configuration = predictor.configuration_manager
        channels = len(predictor.dataset_json.get("channel_names") or predictor.dataset_json["modality"])
        shape, spacing = list(configuration.patch_size), list(configuration.spacing)
        if len(shape) == 2:
            shape, spacing = [2, *shape], [1.0, *spacing]
        # The plan's axes back in the order of the files.
        backward = predictor.plans_manager.transpose_backward
        shape, spacing = [shape[i] for i in backward], [spacing[i] for i in backward]
        image = np.random.default_rng(0).normal(100, 30, size=(channels, *shape)).astype(np.float32)
        yield "a generated image", image, spacing
        return
    dataset_json = predictor.dataset_json
    cases = find_images(images, dataset_json["file_ending"])
    if not cases:
        raise OneShotError(
            f"{images} holds no images named CASE_0000{predictor.dataset_json['file_ending']}: give -i a folder of "
            f"images in nnU-Net's naming, or leave it out."
        )
    plans_manager = predictor.plans_manager
    names = list((dataset_json.get("channel_names") or dataset_json["modality"]).values())
    check_images(
        cases,
        plans_manager.image_reader_writer_class,
        names,
        plans=plans_manager.plans,
        target_spacing=predictor.configuration_manager.spacing,
    )
    reader = plans_manager.image_reader_writer_class()
    for files in cases.values():
        image, properties = reader.read_images(files)
        yield Path(files[0]).name, image, properties["spacing"]


def _zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder.parent))
