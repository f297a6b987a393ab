"""Label propagation as a baseline: the atlas's labels warped to a case, written in the case's original grid."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.config import OneShotConfig, with_guide
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.headers import carry_geometry
from nnunet_oneshot.data.orientation import aligned_by_headers, edges_in_common_order, in_common_order
from nnunet_oneshot.data.partial import averaged_probabilities
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.raw import RawDataset, find_images
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.data.verify import check_images, declared_labels, detail_of
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS, MethodOptions
from nnunet_oneshot.inference import likeliest
from nnunet_oneshot.io import load_json_checked, save_json_atomic, temporary_folder, writing
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar
from nnunet_oneshot.registration.files.register_pair import quality_warnings
from nnunet_oneshot.registration.pair.quality import outlier_scores, telling_similarity
from nnunet_oneshot.registration.pair.registrar import register_arrays
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import sample_label_probabilities, warp_label_probabilities
from nnunet_oneshot.self_training.fusion import fused_probabilities
from nnunet_oneshot.self_training.guide import SegmentingGuide, Student, guided_by
from nnunet_oneshot.self_training.posterior import posterior_labels, posterior_probabilities

# Our registration, the same with labels corrected by each image's intensities, and its affine stage alone.
OWN_METHODS = ("registration", "corrected", "affine")
GUIDED_METHODS = ("registration", "corrected")
# Robust standard deviations below the median of at least so many pairs of an atlas.
_OUTLIER, _COMPARABLE = 3.5, 4


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
    student: str | Path | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Warps the labels of a fold's atlases to its validation cases, or to new images, and scores what has a label.

    With several atlases the warped label probabilities are averaged.

    Args:
        dataset: Name or number of the dataset.
        configuration: Such as ``3d_fullres``.
        plans_name: Such as ``nnUNetOneShotPlans``.
        out: Folder of the segmentations, of ``propagation.json`` (method, atlases, seconds, and for each case and atlas
            the figures of the registration) and, where validation cases are labelled, of nnU-Net's ``summary.json``.
        fold: Whose atlases are warped and, without ``images``, to whose validation cases.
        images: Folder of images in nnU-Net's naming.
        method: One of `propagation_methods`: ``"registration"`` (ours), ``"corrected"`` (ours, and the labels then
            corrected by the image's intensities as in training), ``"affine"`` (the first stage) or a peer such as
            ``"syn"`` (ANTs).
        guide: Folder of a trained model whose segmentations guide the registration; None is what the plans say.
        student: Folder of a trained model whose probabilities are fused with the corrected labels; see
            `nnunet_oneshot.self_training.fusion`. None fuses nothing.
        device: Where the registration runs.
        log: Receives each line that is shown.

    Returns:
        The content of ``propagation.json``.

    Raises:
        OneShotError: Something does not exist or cannot be used, or there is nothing to propagate to. All that is read
            is checked before anything is written.
    """
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    if method not in propagation_methods():
        raise OneShotError(f"Method {method!r} is not known: choose one of {propagation_methods()}.")
    if guide is not None and method not in GUIDED_METHODS:
        raise OneShotError(f"Method {method!r} takes no guide: give --guide with one of {list(GUIDED_METHODS)}.")
    config = with_guide(OneShotConfig.from_plans(prepared.plans), guide)
    place = usable_device(device)
    own = prepared.fold(fold)
    fused = None if student is None else _student_to_fuse(student, prepared, own, method, place)
    files = None if images is None else _checked_images(prepared, Path(images), log)
    if images is None:
        _check_references(prepared, own.scored)
    choice = resolve_atlases(prepared.base, config, own, prepared.image_in_common_order, kept=prepared.kept)
    log(f"Atlas: {', '.join(choice.atlases)} ({choice.how})")
    out = Path(out).absolute()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    registrar = DatasetRegistrar(prepared, config, choice.atlases, place, log)
    if files is None:
        propagator, cases = _to_validation_cases(registrar, method, own)
    else:
        propagator, cases = _to_images(registrar, method, own, files)
    propagator.fused = fused
    names = []
    for case, image, properties in cases:
        propagator.write(case, image, properties, out)
        log(f"{case}: labels written{propagator.told(case)}")
        names.append(case)
    for warning in propagator.warnings():
        log(f"Warning: {warning}")
    report = {
        "method": method,
        "atlases": list(choice.atlases),
        "fold": fold,
        "guide": config.registration.guide if method in GUIDED_METHODS else None,
        "student": None if student is None else str(student),
        "trust": propagator.trust,
        "cases": names,
        "quality": propagator.quality,
        "seconds": round(time.monotonic() - start, 2),
    }
    save_json_atomic(report, out / "propagation.json")
    if images is None:
        _score(prepared, own, out, log)
    return report


def _student_to_fuse(
    folder: str | Path, prepared: PreparedDataset, fold: Fold, method: str, device: torch.device
) -> Student:
    if method != "corrected":
        raise OneShotError(f"Method {method!r} takes no student to fuse with: give --student with --method corrected.")
    if prepared.label_manager.has_regions:
        raise OneShotError(
            f"{prepared.name} has regions, which --student does not fuse yet: propagate or predict without it."
        )
    return Student(folder, prepared, fold=fold.number, device=device, what="student")


# Case, preprocessed image (C, X, Y, Z) and what nnU-Net's export needs to return to the original grid.
_Preprocessed = tuple[str, np.ndarray, dict[str, Any]]


def _to_validation_cases(
    registrar: DatasetRegistrar, method: str, fold: Fold
) -> tuple[Propagator, Iterator[_Preprocessed]]:
    """Propagation to the validation cases of a fold, whose registrations are cached."""
    prepared = registrar.prepared
    if not fold.validation:
        raise OneShotError(
            f"Fold {fold.number} of {prepared.name} has no validation cases to propagate to: choose another fold with "
            f"-f, or give images with -i."
        )
    cached = registrar.register(fold.validation, fold=fold.number) if method in GUIDED_METHODS else None
    cases = ((case, prepared.image(case), prepared.properties(case)) for case in fold.validation)
    return Propagator(registrar, method, registrations=cached, files=_raw_files(prepared)), cases


def _to_images(
    registrar: DatasetRegistrar, method: str, fold: Fold, files: Mapping[str, Sequence[str]]
) -> tuple[Propagator, Iterator[_Preprocessed]]:
    """Propagation to new images, which are registered pair by pair."""
    cases = _preprocessed_images(registrar.prepared, files)
    student = None
    if method in GUIDED_METHODS:
        settings = dataclasses.replace(registrar.config.registration, method="refine")
        student = guided_by(settings, registrar.prepared, fold=fold.number, device=registrar.device)
        if student is not None:
            registrar.log(student.describe())
    return Propagator(registrar, method, student=student, files=files), cases


def _score(prepared: PreparedDataset, fold: Fold, out: Path, log: Callable[[str], None]) -> None:
    if not fold.scored:
        log("No validation case has a label: there is nothing to score.")
        return
    mean = score_folder(prepared, out, fold.scored)["foreground_mean"]["Dice"]
    log(f"Mean Dice over {len(fold.scored)} validation cases: {mean:.4f} ({out / 'summary.json'})")


class Propagator:
    """Warps the labels of some atlases to one case after another.

    Args:
        registrar: The atlases' dataset, settings, atlases and device.
        method: One of `propagation_methods`.
        registrations: Registrations to the cases, or None: each case is registered when it comes, pair by pair.
        student: Guides what is registered pair by pair.
        files: The files of the cases, as far as they are known, whose headers the segmentations get.

    Attributes:
        quality: Case to atlas to the figures of the registration, of all that was written by a method of our own.
        fused: A student whose probabilities are fused with corrected labels, or None.
        trust: Case to label to the agreement by which they were fused.
    """

    def __init__(
        self,
        registrar: DatasetRegistrar,
        method: str,
        *,
        registrations: RegistrationCache | None = None,
        student: SegmentingGuide | None = None,
        files: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        settings = dataclasses.replace(registrar.config.registration, method="refine")
        if method == "affine":
            # No iteration of the deformable stage leaves the affine map.
            settings = dataclasses.replace(settings, refine_iterations=(0,))
        self.settings = settings
        self.prepared, self.config, self.device = registrar.prepared, registrar.config, registrar.device
        self.method, self.registrations, self.student = method, registrations, student
        self.files: Mapping[str, Sequence[str]] = files or {}
        self.quality: dict[str, dict[str, dict[str, Any]]] = {}
        self.fused: Student | None = None
        self.trust: dict[str, dict[str, float]] = {}
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

        # One after the other: of many labels of a large image, each takes gigabytes.
        found = ((atlas, self._probabilities(atlas, case, image, properties)) for atlas in self.atlases)
        probabilities = averaged_probabilities(found, self.labels, self.prepared.hidden_labels)
        if self.fused is not None:
            probabilities = self._fused(self.fused, case, probabilities, image)
        elif self.method == "corrected":
            probabilities = self._corrected(probabilities, image)
        logits = probabilities_to_logits(probabilities, self.labels, self.prepared.label_manager)
        source = next(iter(self.files.get(case, ())), None)
        with writing(out), temporary_folder(out, case) as folder:
            export_prediction_from_logits(
                torch.from_numpy(logits),
                properties,
                self.prepared.configuration_manager,
                self.prepared.plans_manager,
                self.prepared.dataset_json,
                str(folder / case),
                num_threads_torch=torch.get_num_threads(),
            )
            for file in sorted(folder.iterdir()):
                carry_geometry(source, file)
                os.replace(file, out / file.name)

    def told(self, case: str) -> str:
        """The end of the line that tells of a case: how alike the images are before and after registration."""
        found = self.quality.get(case, {})
        told = []
        for atlas, quality in found.items():
            labels = quality.get("similarity_at_labels")
            told.append(
                f"{quality['similarity_before']:.3f} -> {quality['similarity_after']:.3f}"
                + (f" ({labels:.3f} at the labels)" if labels is not None else "")
                + (f" with {atlas}" if len(found) > 1 else "")
            )
        return f"; squared local correlation {', '.join(told)}" if told else ""

    def warnings(self) -> list[str]:
        """What is doubtful about the registrations, judged by themselves and beside the others of their atlas."""
        if self.method not in OWN_METHODS:
            return []
        pairs = [(atlas, case) for case, found in self.quality.items() for atlas in found]
        usual = [] if self.method == "affine" else self._cached_pairs()
        figures = [self.quality[case][atlas] for atlas, case in pairs] + [quality for _, quality in usual]
        names = [atlas for atlas, _ in pairs] + [atlas for atlas, _ in usual]
        low = poor_by_comparison(names, figures)
        found = []
        for (atlas, case), quality, is_low in zip(pairs, figures, low, strict=False):
            reasons = quality_warnings(quality, affine=self.settings.affine)
            if is_low:
                reasons.append(
                    f"its similarity after registration, {telling_similarity(quality):.3f}, is far below that of the "
                    f"other images."
                )
            if reasons:
                found.append(f"{case}: the registration of {atlas} is doubtful: {' '.join(reasons)} Look at it.")
        return found

    def _cached_pairs(self) -> list[tuple[str, dict[str, Any]]]:
        """Atlas and figures of the registrations to training cases that are kept, for comparison with new images."""
        if self.registrations is not None:
            return []
        cache = RegistrationCache(self.prepared.kept / FOLDER / self.prepared.folder.name)
        pairs = [(atlas, case) for atlas in self.atlases for case in self.prepared.identifiers if case != atlas]
        return [(a, cache.quality(a, c)) for a, c in pairs if cache.path(a, c, ".json").is_file()]

    def _corrected(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Masks of the most probable labels, corrected by the image (C, X, Y, Z), in the place of (labels, X, Y, Z)."""
        settings = self.config.distillation
        corrected = posterior_labels(
            torch.from_numpy(image)[None],
            torch.from_numpy(likeliest(probabilities))[None, None],
            blur=settings.posterior_blur,
            strength=settings.posterior_strength,
        )
        for place, own in enumerate(probabilities):
            own[:] = corrected[0, 0].numpy() == place
        return probabilities

    def _fused(self, student: Student, case: str, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Fuses corrected labels with a student, in the place of (labels, X, Y, Z); keeps how far both agree."""
        settings = self.config.distillation
        carried = posterior_probabilities(
            torch.from_numpy(image),
            torch.from_numpy(likeliest(probabilities)),
            self.labels,
            blur=settings.posterior_blur,
            strength=settings.posterior_strength,
            out=torch.from_numpy(probabilities),
        )
        fused, trust = fused_probabilities(carried.numpy(), student.probabilities(image))
        self.trust[case] = {str(label): float(t) for label, t in zip(self.labels[1:], trust, strict=True)}
        return fused

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
            options = MethodOptions(self.settings, self.config.seed, device=str(self.device))
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
                atlas_labels=atlas_segmentation,
            )
        self.quality.setdefault(case, {})[atlas] = dict(registration.quality)
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
        return probabilities.astype(np.float32, copy=False)
    places = {label: index for index, label in enumerate(labels)}
    regions = [np.atleast_1d(region) for region in label_manager.foreground_regions]
    heads = [probabilities[[places[int(label)] for label in region]].sum(axis=0) for region in regions]
    return np.stack(heads).astype(np.float32) - 0.5


def poor_by_comparison(atlases: Sequence[str], qualities: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which registrations are far worse than the others of their atlas; none where an atlas has fewer than four."""
    pairs = [
        Registration(atlas, "", np.eye(4), np.zeros((3, 1, 1, 1), np.float32), (), (), dict(quality))
        for atlas, quality in zip(atlases, qualities, strict=True)
    ]
    if not pairs:
        return []
    counts = Counter(atlases)
    scores = outlier_scores(pairs)
    return [
        score < -_OUTLIER and counts[atlas] >= _COMPARABLE
        for atlas, score in zip(atlases, scores.tolist(), strict=True)
    ]


def score_folder(prepared: PreparedDataset, folder: Path, cases: Sequence[str]) -> dict[str, Any]:
    """Writes nnU-Net's ``summary.json`` for those segmentations in ``folder`` whose cases are named; returns it.

    Raises:
        OneShotError: A reference holds values that are not declared.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder

    manager = prepared.label_manager
    ending = prepared.file_ending
    target = folder / "summary.json"
    with writing(folder), temporary_folder(folder, "scored") as temporary:
        scored, references = Path(temporary) / "scored", Path(temporary) / "references"
        # nnU-Net scores every file of a folder, and validation cases without a label have none to be scored against.
        for case in cases:
            for place in (scored, references):
                place.mkdir(exist_ok=True)
            shutil.copyfile(folder / f"{case}{ending}", scored / f"{case}{ending}")
            _put_reference(prepared, case, references)
        compute_metrics_on_folder(
            str(references),
            str(scored),
            str(Path(temporary) / "summary.json"),
            prepared.plans_manager.image_reader_writer_class(),
            ending,
            manager.foreground_regions if manager.has_regions else manager.foreground_labels,
            manager.ignore_label,
            num_processes=1,
        )
        summary = load_json_checked(Path(temporary) / "summary.json", "the scores", {"metric_per_case": [dict]})
    for case in summary["metric_per_case"]:
        case["prediction_file"] = str(folder / Path(case["prediction_file"]).name)
        case["reference_file"] = str(prepared.labels_folder / Path(case["reference_file"]).name)
    save_json_atomic(summary, target, sort_keys=True)
    return summary


def read_reference(prepared: PreparedDataset, case: str) -> tuple[np.ndarray, dict[str, Any], bool]:
    """Reads the label that a case is scored against.

    Returns:
        The label (1, X, Y, Z), the reader's properties, and whether values were rounded to whole numbers.

    Raises:
        OneShotError: The label cannot be read, or holds values that are not declared.
    """
    path = prepared.labels_folder / f"{case}{prepared.file_ending}"
    try:
        label, properties = prepared.plans_manager.image_reader_writer_class().read_seg(str(path))
    # Readers raise whatever the underlying library raises.
    except Exception as error:
        raise OneShotError(
            f"Case {case}: the label {path} cannot be read ({detail_of(error)}), so that nothing can be scored against "
            f"it. Replace it, and run `nnunet_oneshot plan_and_preprocess` again."
        ) from error
    whole = declared_labels(label, prepared.label_manager, f"Case {case}: the label {path}")
    return whole, properties, not np.array_equal(whole, label)


def _check_references(prepared: PreparedDataset, cases: Sequence[str]) -> None:
    for case in cases:
        read_reference(prepared, case)


def _put_reference(prepared: PreparedDataset, case: str, folder: Path) -> None:
    """Puts the label of a case into a folder, its values whole numbers."""
    name = f"{case}{prepared.file_ending}"
    label, properties, rounded = read_reference(prepared, case)
    if rounded:
        writer = prepared.plans_manager.image_reader_writer_class()
        writer.write_seg(label[0].astype(np.int32), str(folder / name), properties)
    else:
        shutil.copyfile(prepared.labels_folder / name, folder / name)


def _raw_files(prepared: PreparedDataset) -> dict[str, list[str]]:
    """The files of the training cases, where the raw data set is still at hand."""
    root = os.environ.get("nnUNet_raw")
    try:
        raw = RawDataset(Path(root) / prepared.name) if root else None
    except OneShotError:
        # Segmentations then get the geometry that preprocessing kept.
        return {}
    return {case: raw.images(case) for case in raw.cases} if raw is not None else {}


def _checked_images(prepared: PreparedDataset, folder: Path, log: Callable[[str], None]) -> dict[str, list[str]]:
    """The images of a folder, each read and checked."""
    ending = prepared.file_ending
    files = find_images(folder, ending) if folder.is_dir() else {}
    if not files:
        raise OneShotError(
            f"{folder} holds no images named CASE_0000{ending}: give -i a folder of images in nnU-Net's naming."
        )
    names = prepared.dataset_json.get("channel_names") or prepared.dataset_json["modality"]
    reader = prepared.plans_manager.image_reader_writer_class
    spacing = prepared.configuration_manager.spacing
    for warning in check_images(files, reader, list(names.values()), plans=prepared.plans, target_spacing=spacing):
        log(f"Warning: {warning}")
    return files


def _preprocessed_images(prepared: PreparedDataset, files: Mapping[str, Sequence[str]]) -> Iterator[_Preprocessed]:
    """Yields case, preprocessed image (C, X, Y, Z) and properties of every image."""
    preprocessor = prepared.configuration_manager.preprocessor_class(verbose=False)
    for case, names in files.items():
        image, _, properties = preprocessor.run_case(
            list(names), None, prepared.plans_manager, prepared.configuration_manager, prepared.dataset_json
        )
        yield case, image.astype(np.float32), properties
