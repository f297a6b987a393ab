"""A generated preprocessed dataset with registrations, to measure data loading on (`loader_speed`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from nnunet_oneshot.benchmarks import abdomens
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.data.splits import SPLITS_FILE
from nnunet_oneshot.io import save_json_atomic
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.pair.grid import RegistrationGrid
from nnunet_oneshot.registration.pair.pyramid import velocity_shape
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.synthesis.functional import random_velocity

CONFIGURATION = "3d_fullres"
ATLAS = "case_000"

# Displacements between abdomens: standard deviation and smoothness, voxels; rotation in radians.
_MAGNITUDE, _SMOOTHNESS, _ROTATION = 4.0, 12.0, 0.05


@dataclass(frozen=True)
class LoaderDataset:
    """A generated dataset, as nnU-Net's preprocessing leaves it.

    Attributes:
        shape: Voxels of each image.
        patch_size: Patch of the plans.
        batch_size: Batch size of the plans.
        labels: Number of foreground labels, at most ten organs.
        cases: Number of cases: the atlas, training cases and a validation case; at least 3.
        seed: The same seed gives the same files.
    """

    shape: Sequence[int]
    patch_size: Sequence[int]
    batch_size: int
    labels: int
    cases: int
    seed: int = 2026

    @property
    def identifiers(self) -> list[str]:
        """Names of the cases; the first is the atlas."""
        return [f"case_{number:03d}" for number in range(self.cases)]

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Content of ``dataset.json``."""
        return {
            "channel_names": {"0": "CT"},
            "labels": dict(list(abdomens.LABELS.items())[: self.labels + 1]),
            "numTraining": self.cases,
            "file_ending": ".nii.gz",
        }

    @property
    def plans(self) -> dict[str, Any]:
        """nnU-Net's plans: one 3D configuration with voxels of 1 mm and a U-Net of six stages."""
        strides = _strides(self.patch_size)
        network = {
            "n_stages": len(strides),
            "features_per_stage": [32, 64, 128, 256, 320, 320][: len(strides)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * len(strides),
            "strides": strides,
            "n_conv_per_stage": [2] * len(strides),
            "n_conv_per_stage_decoder": [2] * (len(strides) - 1),
        }
        configuration = {
            "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": self.batch_size,
            "batch_dice": True,
            "patch_size": list(self.patch_size),
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
            **{f"resampling_fn_{what}_kwargs": {} for what in ("data", "seg", "probabilities")},
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": network,
                "_kw_requires_import": ["conv_op"],
            },
        }
        return {
            "dataset_name": "Dataset997_LoaderSpeed",
            "plans_name": "nnUNetPlans",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "image_reader_writer": "SimpleITKIO",
            "configurations": {CONFIGURATION: configuration},
        }

    def write(self, preprocessed: Path) -> RegistrationCache:
        """Writes images, labels, plans and registrations below ``nnUNet_preprocessed``.

        Returns:
            The registrations of the atlas to every other case: smooth random velocity fields, slightly rotated.
        """
        base = preprocessed / self.plans["dataset_name"]
        folder = base / self.plans["configurations"][CONFIGURATION]["data_identifier"]
        for path in (folder, base / "gt_segmentations"):
            path.mkdir(parents=True)
        save_json_atomic(self.dataset_json, base / "dataset.json")
        save_json_atomic(self.plans, base / "nnUNetPlans.json")
        save_json_atomic([{"train": self.identifiers[:-1], "val": self.identifiers[-1:]}], base / SPLITS_FILE)
        # Never opened; it says which case is labelled.
        (base / "gt_segmentations" / f"{ATLAS}.nii.gz").touch()
        for number, name in enumerate(self.identifiers):
            self._write_case(folder / name, np.random.default_rng([self.seed, number]))
        registrations = RegistrationCache(base / "registrations")
        for number, name in enumerate(self.identifiers[1:]):
            pair = self._registration(name, np.random.default_rng([self.seed, self.cases + number]))
            registrations.save(pair, key="generated", sources={}, parameters={}, versions={})
        return registrations

    def _write_case(self, path: Path, rng: np.random.Generator) -> None:
        """A generated abdomen at full size, in the format of nnU-Net's preprocessing."""
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

        image, label = abdomens.make_abdomen(rng)
        factors = [n / m for n, m in zip(self.shape, image.shape, strict=True)]
        data = zoom(image.astype(np.float32), factors, order=1)[None]
        data += rng.standard_normal(data.shape, dtype=np.float32) * 12
        data = (data.clip(-1000, 300) - 60) / 90
        seg = zoom(np.where(label > self.labels, 0, label), factors, order=0)[None].astype(np.int8)
        labels = list(range(1, self.labels + 1))
        properties = {
            "spacing": [1.0, 1.0, 1.0],
            "class_locations": DefaultPreprocessor._sample_foreground_locations(seg, labels),
        }
        blocks, chunks = comp_blosc2_params(data.shape, tuple(self.patch_size), data.itemsize)
        blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, tuple(self.patch_size), seg.itemsize)
        nnUNetDatasetBlosc2.save_case(data, seg, properties, str(path), chunks, blocks, chunks_seg, blocks_seg)

    def _registration(self, case: str, rng: np.random.Generator) -> Registration:
        """A velocity field on the grid that registrations have by default, around a rotation."""
        shape = tuple(int(n) for n in self.shape)
        defaults = RegistrationConfig()
        grid = RegistrationGrid.over(shape, (1.0, 1.0, 1.0), defaults.max_voxels)
        velocity = random_velocity(
            velocity_shape(grid.shape, defaults.velocity_downsample),
            shape,
            magnitude=_MAGNITUDE,
            smoothness=_SMOOTHNESS,
            rng=rng,
        )
        affine = np.eye(4)
        affine[:3, :3] = _rotation(rng.normal(0, _ROTATION, 3)) * rng.normal(1, 0.05, 3)
        centre = (np.array(shape) - 1) / 2
        affine[:3, 3] = centre + rng.normal(0, 4, 3) - affine[:3, :3] @ centre
        quality = {"similarity_before": 0.2, "similarity_after": 0.5, "folding": 0.0, "affine_start": "moments"}
        return Registration(ATLAS, case, affine, velocity.numpy(), shape, shape, quality)


def _strides(patch_size: Sequence[int]) -> list[list[int]]:
    """Strides of at most six stages, each halving the axes that have at least eight voxels."""
    edges, strides = list(patch_size), [[1, 1, 1]]
    while len(strides) < 6 and max(edges) >= 8:
        strides.append([2 if edge >= 8 else 1 for edge in edges])
        edges = [edge // stride for edge, stride in zip(edges, strides[-1], strict=True)]
    return strides


def _rotation(angles: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(angles).as_matrix()
