"""Label propagation as a baseline: the atlas's labels warped to a case, written in the case's original grid."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.config import OneShotConfig, with_guide
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.orientation import aligned_by_headers, edges_in_common_order, in_common_order
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS, MethodOptions
from nnunet_oneshot.io import load_json_checked, save_json_atomic, writing
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar
from nnunet_oneshot.registration.pair.registrar import register_arrays
from nnunet_oneshot.registration.pair.similarities import SIMILARITIES
from nnunet_oneshot.registration.pair.warp import sample_label_probabilities, warp_label_probabilities
from nnunet_oneshot.self_training.guide import SegmentingGuide, guided_by
from nnunet_oneshot.self_training.posterior import posterior_labels

# Our registration, the same with labels corrected by each image's intensities, and its affine stage alone.
OWN_METHODS = ("registration", "corrected", "affine")
GUIDED_METHODS = ("registration", "corrected")


def propagation_methods() -> list[str]:
    """The methods that `propagate` knows: our own, and the registered peers."""
    return [*OWN_METHODS, *(name for name, method in REGISTRATION_METHODS.items() if not method.own)]


def propagate(
    *,
    dataset: str,
    configuration: str,
    plans_name: str,
    out: str | Path,
    fold: str = "0",
    images: str | Path | None = None,
    method: str = "registration",
    guide: str | Path | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Warps the labels of a fold's atlases to its validation cases, or to new images, and scores what has a label.

    With several atlases the warped label probabilities are averaged.

    Args:
        dataset: Name or number of the dataset.
        configuration: Such as ``3d_fullres``.
        plans_name: Such as ``nnUNetOneShotPlans``.
        out: Folder of the segmentations, of ``propagation.json`` (method, atlases, seconds) and, where validation
            cases are labelled, of nnU-Net's ``summary.json``.
        fold: Whose atlases are warped and, without ``images``, to whose validation cases.
        images: Folder of images in nnU-Net's naming.
        method: One of `propagation_methods`: ``"registration"`` (ours), ``"corrected"`` (ours, and the labels then
            corrected by the image's intensities as in training), ``"affine"`` (the first stage) or a peer such as
            ``"syn"`` (ANTs).
        guide: Folder of a trained model whose segmentations guide the registration; None is what the plans say.
        device: Where the registration runs.
        log: Receives each line that is shown.

    Returns:
        The content of ``propagation.json``.

    Raises:
        OneShotError: Something does not exist, or there is nothing to propagate to.
    """
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    if method not in propagation_methods():
        raise OneShotError(f"Method {method!r} is not known: choose one of {propagation_methods()}.")
    if guide is not None and method not in GUIDED_METHODS:
        raise OneShotError(f"Method {method!r} takes no guide: give --guide with one of {list(GUIDED_METHODS)}.")
    config = with_guide(OneShotConfig.from_plans(prepared.plans), guide)
    place = usable_device(device)
    own = prepared.fold(fold)
    choice = resolve_atlases(prepared.base, config, own, prepared.image_in_common_order)
    log(f"Atlas: {', '.join(choice.atlases)} ({choice.how})")
    out = Path(out).absolute()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    registrar = DatasetRegistrar(prepared, config, choice.atlases, place, log)
    if images is None:
        propagator, cases = _to_validation_cases(registrar, method, own)
    else:
        propagator, cases = _to_images(registrar, method, own, Path(images))
    names = []
    for case, image, properties in cases:
        propagator.write(case, image, properties, out)
        log(f"{case}: labels written")
        names.append(case)
    report = {
        "method": method,
        "atlases": list(choice.atlases),
        "fold": fold,
        "guide": config.registration.guide if method in GUIDED_METHODS else None,
        "cases": names,
        "seconds": round(time.monotonic() - start, 2),
    }
    save_json_atomic(report, out / "propagation.json")
    if images is None:
        _score(prepared, own, out, log)
    return report


# Case, preprocessed image (C, X, Y, Z) and what nnU-Net's export needs to return to the original grid.
_Preprocessed = tuple[str, np.ndarray, dict[str, Any]]


def _to_validation_cases(
    registrar: DatasetRegistrar, method: str, fold: Fold
) -> tuple[_Propagator, Iterator[_Preprocessed]]:
    """Propagation to the validation cases of a fold, whose registrations are cached."""
    prepared = registrar.prepared
    if not fold.validation:
        raise OneShotError(
            f"Fold {fold.number} of {prepared.name} has no validation cases to propagate to: choose another fold with "
            f"-f, or give images with -i."
        )
    cached = registrar.register(fold.validation, fold=fold.number) if method in GUIDED_METHODS else None
    cases = ((case, prepared.image(case), prepared.properties(case)) for case in fold.validation)
    return _Propagator(registrar, method, registrations=cached), cases


def _to_images(
    registrar: DatasetRegistrar, method: str, fold: Fold, folder: Path
) -> tuple[_Propagator, Iterator[_Preprocessed]]:
    """Propagation to new images, which are registered pair by pair."""
    cases = _preprocessed_images(registrar.prepared, folder)
    student = None
    if method in GUIDED_METHODS:
        settings = dataclasses.replace(registrar.config.registration, method="refine")
        student = guided_by(settings, registrar.prepared, fold=fold.number, device=registrar.device)
        if student is not None:
            registrar.log(student.describe())
    return _Propagator(registrar, method, student=student), cases


def _score(prepared: PreparedDataset, fold: Fold, out: Path, log: Callable[[str], None]) -> None:
    if not fold.scored:
        log("No validation case has a label: there is nothing to score.")
        return
    mean = score_folder(prepared, out, fold.scored)["foreground_mean"]["Dice"]
    log(f"Mean Dice over {len(fold.scored)} validation cases: {mean:.4f} ({out / 'summary.json'})")


class _Propagator:
    """Warps the labels of some atlases to one case after another.

    Args:
        registrar: The atlases' dataset, settings, atlases and device.
        method: One of `propagation_methods`.
        registrations: Registrations to the cases, or None: each case is registered when it comes, pair by pair.
        student: Guides what is registered pair by pair.
    """

    def __init__(
        self,
        registrar: DatasetRegistrar,
        method: str,
        *,
        registrations: RegistrationCache | None = None,
        student: SegmentingGuide | None = None,
    ) -> None:
        settings = dataclasses.replace(registrar.config.registration, method="refine")
        if method == "affine":
            # No iteration of the deformable stage leaves the affine map.
            settings = dataclasses.replace(settings, refine_iterations=(0,))
        self.settings = settings
        self.prepared, self.config, self.device = registrar.prepared, registrar.config, registrar.device
        self.method, self.registrations, self.student = method, registrations, student
        self.labels = [int(label) for label in self.prepared.label_manager.all_labels]
        self.atlases = {
            atlas: (
                self.prepared.registration_image(atlas),
                self.prepared.segmentation(atlas),
                self.prepared.spacing(atlas),
            )
            for atlas in registrar.atlases
        }

    def write(self, case: str, image: np.ndarray, properties: dict[str, Any], out: Path) -> None:
        """Writes the segmentation of one preprocessed image (C, X, Y, Z) in its original grid."""
        from nnunetv2.inference.export_prediction import export_prediction_from_logits

        probabilities = np.mean([self._probabilities(atlas, case, image, properties) for atlas in self.atlases], axis=0)
        if self.method == "corrected":
            probabilities = self._corrected(probabilities, image)
        logits = probabilities_to_logits(probabilities, self.labels, self.prepared.label_manager)
        with writing(out):
            export_prediction_from_logits(
                torch.from_numpy(logits),
                properties,
                self.prepared.configuration_manager,
                self.prepared.plans_manager,
                self.prepared.dataset_json,
                str(out / case),
                num_threads_torch=torch.get_num_threads(),
            )

    def _corrected(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Masks (labels, X, Y, Z) of the most probable labels, corrected by the image (C, X, Y, Z)."""
        settings = self.config.distillation
        corrected = posterior_labels(
            torch.from_numpy(image)[None],
            torch.from_numpy(probabilities.argmax(0))[None, None],
            blur=settings.posterior_blur,
            strength=settings.posterior_strength,
        )
        return (corrected[0, 0].numpy() == np.arange(len(self.labels))[:, None, None, None]).astype(np.float32)

    def _probabilities(self, atlas: str, case: str, image: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
        """Warped label masks (labels, X, Y, Z) of one atlas on a preprocessed image (C, X, Y, Z)."""
        atlas_image, atlas_segmentation, atlas_spacing = self.atlases[atlas]
        outlined = self.prepared.with_outline(image)
        axes, spacing = self.prepared.axes_of(properties), self.prepared.spacing_of(properties)
        if self.method not in OWN_METHODS:
            # Peers know no headers: they get the atlas in the order of the case's axes.
            turned = axes.T @ self.prepared.axes(atlas)
            atlas_image, atlas_segmentation = (
                np.ascontiguousarray(in_common_order(volume, turned)) for volume in (atlas_image, atlas_segmentation)
            )
            atlas_spacing = edges_in_common_order(atlas_spacing, turned)
            metric = SIMILARITIES[self.settings.similarity].affine_metric
            options = MethodOptions(self.settings, metric, self.config.seed, device=str(self.device))
            register = REGISTRATION_METHODS[self.method].register
            found = register((outlined, spacing), (atlas_image, atlas_spacing), None, options)
            return sample_label_probabilities(atlas_segmentation, torch.from_numpy(found.places()), self.labels)
        if self.registrations is not None:
            registration = self.registrations.load(atlas, case)
        else:
            registration = register_arrays(
                atlas_image,
                outlined,
                atlas_spacing=atlas_spacing,
                case_spacing=spacing,
                initial=aligned_by_headers(
                    axes,
                    self.prepared.axes(atlas),
                    fixed=(image.shape[1:], spacing),
                    moving=(atlas_image.shape[1:], atlas_spacing),
                ),
                guide=self._guide(atlas_segmentation, image),
                config=self.settings,
                device=self.device,
            )
        return warp_label_probabilities(registration, atlas_segmentation, self.labels)

    def _guide(self, atlas_segmentation: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if self.student is None:
            return None
        return self.student.atlas_maps(atlas_segmentation), self.student.probabilities(image)


def probabilities_to_logits(probabilities: np.ndarray, labels: Sequence[int], label_manager: Any) -> np.ndarray:
    """Label probabilities as the output of a network's heads, for nnU-Net's export.

    Args:
        probabilities: (len(labels), X, Y, Z), each 0 to 1.
        labels: Values in the order of the first axis, 0 included.
        label_manager: nnU-Net's; decides between labels and regions.

    Returns:
        (heads, X, Y, Z) float32. For labels, the probabilities: the largest wins, after resampling too. For regions,
        the probability of any of their labels minus 0.5: positive where the region is more likely than not.
    """
    if not label_manager.has_regions:
        return probabilities.astype(np.float32)
    places = {label: index for index, label in enumerate(labels)}
    regions = [np.atleast_1d(region) for region in label_manager.foreground_regions]
    heads = [probabilities[[places[int(label)] for label in region]].sum(axis=0) for region in regions]
    return np.stack(heads).astype(np.float32) - 0.5


def score_folder(prepared: PreparedDataset, folder: Path, cases: Sequence[str]) -> dict[str, Any]:
    """Writes nnU-Net's ``summary.json`` for those segmentations in ``folder`` whose cases are named; returns it."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder

    manager = prepared.label_manager
    ending = prepared.file_ending
    target = folder / "summary.json"
    with writing(folder), tempfile.TemporaryDirectory(prefix=".scored-", dir=folder) as scored:
        # nnU-Net scores every file of a folder, and validation cases without a label have none to be scored against.
        for case in cases:
            shutil.copyfile(folder / f"{case}{ending}", Path(scored) / f"{case}{ending}")
        compute_metrics_on_folder(
            str(prepared.labels_folder),
            scored,
            str(Path(scored) / "summary.json"),
            prepared.plans_manager.image_reader_writer_class(),
            ending,
            manager.foreground_regions if manager.has_regions else manager.foreground_labels,
            manager.ignore_label,
            num_processes=1,
        )
        summary = load_json_checked(Path(scored) / "summary.json", "the scores")
    for case in summary["metric_per_case"]:
        case["prediction_file"] = str(folder / Path(case["prediction_file"]).name)
    save_json_atomic(summary, target, sort_keys=True)
    return summary


def _preprocessed_images(prepared: PreparedDataset, folder: Path) -> Iterator[_Preprocessed]:
    """Yields case, preprocessed image (C, X, Y, Z) and properties of every image of a folder."""
    from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

    files = []
    if folder.is_dir():
        files = create_lists_from_splitted_dataset_folder(str(folder), prepared.file_ending, num_processes=1)
    if not files:
        raise OneShotError(
            f"{folder} holds no images named CASE_0000{prepared.file_ending}: give -i a folder of images in nnU-Net's "
            f"naming."
        )
    preprocessor = prepared.configuration_manager.preprocessor_class(verbose=False)
    for names in files:
        case = Path(names[0]).name.removesuffix(f"_0000{prepared.file_ending}")
        if len(names) != prepared.num_channels:
            raise OneShotError(
                f"{case} in {folder} has {len(names)} channel files: {prepared.name} has {prepared.num_channels}."
            )
        image, _, properties = preprocessor.run_case(
            names, None, prepared.plans_manager, prepared.configuration_manager, prepared.dataset_json
        )
        yield case, image.astype(np.float32), properties
