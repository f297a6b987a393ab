"""The trainer that the others derive from: nnU-Net's, with one-shot cases, splits, validation and checkpoints."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from batchgenerators.utilities.file_and_folder_operations import join, maybe_mkdir_p
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_trainer_module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint, saving_checkpoint
from nnunet_oneshot.config import BLOCK, OVERRIDES_VARIABLE, OneShotConfig, differences, settings_in_force
from nnunet_oneshot.data.fingerprint import fingerprint_standing_in
from nnunet_oneshot.data.plans import check_plans
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.roles import CaseRoles, resolve_roles
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import load_json_checked, require_env, save_json_atomic, writing
from nnunet_oneshot.locks import end_workers_with_this_process, free, take_or_refuse
from nnunet_oneshot.names import check_name
from nnunet_oneshot.precision import Float32Loss, processor_autocast, uses_bfloat16
from nnunet_oneshot.ranks import Ranks
from nnunet_oneshot.registry import load_modules
from nnunet_oneshot.seeding import derive_seed, seed_everything
from nnunet_oneshot.synthesis.data_loader import wrap_workers
from nnunet_oneshot.synthesis.mirroring import decide_mirror_axes
from nnunet_oneshot.versions import versions

CUDA = torch.device("cuda")
# Beside the checkpoints: settings in force, atlases and versions of a training.
SETTINGS_FILE = "oneshot_settings.json"
LOCK_FILE = "training.lock"

_Network = TypeVar("_Network", bound=torch.nn.Module)


class OneShotTrainer(nnUNetTrainer):
    """nnU-Net's trainer for one labelled volume; the trainers that users name differ in loaders and losses.

    Network, schedule, augmentation, validation and files are nnU-Net's. In training only the atlases' labels are read;
    final validation scores the validation cases that have one.
    """

    epochs: ClassVar[int] = 1000
    # nnU-Net's, which sets them later than in its constructor.
    network: torch.nn.Module
    dataset_class: Any

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        require_env("nnUNet_preprocessed", "nnUNet_results")
        _check_supported(plans, configuration)
        load_modules()
        self.config = OneShotConfig.from_plans(plans)
        self.ranks = Ranks()
        _check_batch(PlansManager(plans).get_configuration(configuration), self.ranks.count)
        if self.ranks.own:
            # One run of Weights & Biases for all; this process is that of its rank alone.
            os.environ["nnUNet_wandb_enabled"] = "0"
        with writing(os.environ["nnUNet_results"]):
            super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs
        self._roles: CaseRoles | None = None
        self._scored_cases: list[str] | None = None

    def build_loaders(self, training, validation, initial_patch_size, seeds) -> tuple:
        """The training and the progress loader.

        Args:
            training: Transforms of training patches.
            validation: Transforms of progress patches.
            initial_patch_size: Size of a patch before augmentation crops it.
            seeds: Seeds of both loaders.
        """
        raise NotImplementedError

    def initialize(self) -> None:
        self.prepared.check()
        # With one scale nnU-Net's weights of deep supervision are 0 / 0, and the loss is not a number.
        if len(self.configuration_manager.pool_op_kernel_sizes) < 3:
            self.enable_deep_supervision = False
        seed_everything(self.config.seed)
        super().initialize()
        self.network = self.place(self.network)

    def run_training(self) -> None:
        with self.ranks.telling_lost():
            super().run_training()

    def on_train_start(self) -> None:
        # Two trainings in one folder would overwrite each other's checkpoints.
        self._take_lock("training")
        end_workers_with_this_process()
        self._check_settings()
        # nnU-Net copies its fingerprint to the results, and stops where there is none.
        own = BLOCK in self.plans_manager.plans
        with fingerprint_standing_in(nnunet_trainer_module, self.prepared.base) if own else nullcontext():
            super().on_train_start()
        self._keep_settings()

    def on_train_end(self) -> None:
        super().on_train_end()
        free(join(self.output_folder, LOCK_FILE))

    def place(self, network: _Network) -> _Network:
        """A network on the device of training, in the memory format that is fastest there."""
        # Measured on a processor: a quarter to a third faster in 3D with few features, slower in 2D.
        is_3d = len(self.configuration_manager.patch_size) == 3
        if self.device.type == "cpu" and is_3d:
            return network.to(self.device).to(memory_format=torch.channels_last_3d)
        return network.to(self.device)

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        return Float32Loss(loss) if uses_bfloat16(self.device, self.config.precision) else loss

    # nnU-Net's own steps see to mixed precision on CUDA and have none on a processor. Their backward pass falls into
    # the context too; of what runs there it changes nothing, as all convolutions are in bfloat16 already.
    def train_step(self, batch: dict) -> dict:
        with processor_autocast(self.device, self.config.precision):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        with processor_autocast(self.device, self.config.precision):
            return super().validation_step(batch)

    @cached_property
    def prepared(self) -> PreparedDataset:
        """The dataset that is trained on."""
        plans = self.plans_manager.plans
        return PreparedDataset(
            Path(self.preprocessed_dataset_folder_base),
            plans,
            plans["plans_name"],
            self.dataset_json,
            self.configuration_name,
        )

    def do_split(self) -> tuple[list[str], list[str]]:
        fold = self._fold()
        return fold.train, (fold.validation if self._scored_cases is None else self._scored_cases)

    @property
    def roles(self) -> CaseRoles:
        """Atlases, unlabelled and progress cases of the fold, decided and logged when first asked for."""
        if self._roles is None:
            fold = self._fold()
            self._roles = self.ranks.once(
                lambda: resolve_roles(self.prepared, self.config, fold, self.print_to_log_file)
            )
        return self._roles

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        axes, sentence = decide_mirror_axes(
            self.config.mirror_axes,
            dim=len(self.configuration_manager.patch_size),
            load_atlas_segs=self._load_atlas_segs,
            load_images=self._load_images,
            ignore_label=self.label_manager.ignore_label,
            mixed_orders=len(self.prepared.orders([*self.roles.atlases, *self.roles.unlabelled])) > 1,
        )
        self.print_to_log_file(sentence)
        # nnU-Net's predictor wants None rather than an empty tuple.
        self.inference_allowed_mirroring_axes = axes or None
        return rotation, dummy_2d, initial_patch_size, axes

    def get_dataloaders(self) -> tuple:
        rotation, dummy_2d, initial_patch_size, axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        labels, configuration = self.label_manager, self.configuration_manager
        scales = self._get_deep_supervision_scales()
        targets = {
            "foreground_labels": labels.foreground_labels,
            "regions": labels.foreground_regions if labels.has_regions else None,
            "ignore_label": labels.ignore_label,
        }
        masks = configuration.use_mask_for_norm
        training = self.get_training_transforms(
            configuration.patch_size, rotation, scales, axes, dummy_2d, use_mask_for_norm=masks, **targets
        )
        validation = self.get_validation_transforms(scales, **targets)
        # A resumed run goes on with other patches than those it started with.
        seed = self.ranks.seed(self.config.seed)
        *seeds, own = [derive_seed(seed, self.current_epoch, stream) for stream in range(3)]
        loaders = self.build_loaders(training, validation, initial_patch_size, seeds)
        # Whatever was drawn until here (a teacher, registrations that were not cached) leaves training as it is.
        seed_everything(own)
        processes = get_allowed_n_proc_DA()
        numbers = (processes, max(1, processes // 2) if processes else 0)
        pin = self.device.type == "cuda"
        return tuple(wrap_workers(*arguments, pin) for arguments in zip(loaders, numbers, seeds, strict=True))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        self._take_lock("training or validation")
        try:
            with self.ranks.telling_lost():
                self._validate(save_probabilities)
        finally:
            free(join(self.output_folder, LOCK_FILE))

    def _take_lock(self, what: str) -> None:
        lock = join(self.output_folder, LOCK_FILE)
        self.ranks.once(lambda: take_or_refuse(lock, what))

    def print_to_log_file(self, *args, **options) -> None:
        # nnU-Net lets all ranks print what is the same in all of them.
        if self.local_rank == 0:
            super().print_to_log_file(*args, **options)

    def _validate(self, save_probabilities: bool) -> None:
        fold = self._fold()
        if not fold.scored:
            reason = "none of its validation cases has a label" if fold.validation else "it has no validation case"
            self.print_to_log_file(
                f"Final validation: there is nothing to score for fold {self.fold}, since {reason}. The model is "
                f"complete: predict images with nnUNetv2_predict and look at the results."
            )
            maybe_mkdir_p(join(self.output_folder, "validation"))
            # nnUNetv2_export_model_to_zip wants the file of every fold.
            nothing: dict[str, Any] = {"foreground_mean": {}, "mean": {}, "metric_per_case": []}
            if self.local_rank == 0:
                save_json_atomic(nothing, join(self.output_folder, "validation", "summary.json"))
            return
        if len(fold.scored) < len(fold.validation):
            self.print_to_log_file(
                f"Final validation: {len(fold.scored)} of {len(fold.validation)} cases have a label and are scored."
            )
        self._scored_cases = fold.scored
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._scored_cases = None

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with saving_checkpoint(filename) as temporary:
            super().save_checkpoint(str(temporary))

    def _keep_settings(self) -> None:
        """Stores what is in force beside the checkpoints."""
        if self.local_rank == 0 and (self.current_epoch == 0 or self._stored_settings() is None):
            now = {"settings": settings_in_force(self.config), "atlases": list(self.roles.atlases)}
            save_json_atomic({**now, "versions": versions()}, join(self.output_folder, SETTINGS_FILE))

    def _check_settings(self) -> None:
        """Refuses to go on with a training under other settings, or with another atlas."""
        stored = self._stored_settings()
        if self.current_epoch == 0 or stored is None:
            return
        changed = self._changed_settings(stored)
        atlases = list(self.roles.atlases)
        if stored.get("atlases") != atlases:
            changed.append(f"the atlas was {stored.get('atlases')}, is {atlases}")
        if changed:
            raise OneShotError(
                f"The training in {self.output_folder} was started with other settings: {'; '.join(changed)}. Set them "
                f"back in the plans or in {OVERRIDES_VARIABLE}, or train again without --c."
            )

    def _stored_settings(self) -> dict | None:
        path = join(self.output_folder, SETTINGS_FILE)
        if not os.path.isfile(path):
            return None
        stored = load_json_checked(path, "the settings of the training")
        return stored if isinstance(stored, dict) else None

    def _changed_settings(self, stored: dict) -> list[str]:
        settings = stored.get("settings")
        return differences(settings, settings_in_force(self.config)) if isinstance(settings, dict) else []

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Reads a checkpoint's file; its content, which nnU-Net's own method takes too, is given by no command."""
        if not self.was_initialized:
            self.initialize()
        advice = "Delete it and resume with --c from the checkpoint before it, or train again without --c."
        with loading_checkpoint(filename_or_checkpoint, advice=advice):
            # nnU-Net would run the code that a file names.
            load_data(filename_or_checkpoint)
            super().load_checkpoint(filename_or_checkpoint)
        if changed := self._changed_settings(self._stored_settings() or {}):
            self.print_to_log_file(f"Warning: this training was started with other settings: {'; '.join(changed)}.")
        for state in self.optimizer.state.values():
            # nnU-Net loads Adam's counts of steps onto the device, from where it would fetch them at every step.
            if "step" in state:
                state["step"] = state["step"].cpu()

    def _fold(self) -> Fold:
        self.prepared.check()
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        # It may write splits_final.json.
        return self.ranks.once(lambda: self.prepared.fold(self.fold))

    def _load_images(self) -> tuple[list, list]:
        """Images of the atlases, and of enough unlabelled cases to see how scans of the dataset lie."""
        read = self.prepared.image
        return [read(case) for case in self.roles.atlases], [read(case) for case in self.roles.unlabelled[:64]]

    def _load_atlas_segs(self) -> list:
        return [self.prepared.segmentation(case) for case in self.roles.atlases]


def _check_supported(plans: dict, configuration: str) -> None:
    """Refuses what the trainers do not do, before nnU-Net makes any folder."""
    check_plans(plans, "the plans file of -p")
    name = check_name(plans["plans_name"], "name of the plans", "the plans file")
    check_name(plans["dataset_name"], "dataset_name", f"plans {name}")
    check_name(configuration, "configuration", f"plans {name}")
    if configuration not in plans["configurations"]:
        raise OneShotError(
            f"Plans {name!r} have no configuration {configuration!r}: choose one of {sorted(plans['configurations'])}."
        )
    chosen = PlansManager(plans).get_configuration(configuration)
    check_name(chosen.data_identifier, "data_identifier", f"configuration {configuration} of plans {name}")
    if chosen.previous_stage_name is not None:
        raise OneShotError(
            f"Configuration {configuration!r} of plans {name!r} is the second stage of a cascade, which the one-shot "
            f"trainers do not support: train 3d_fullres or 3d_lowres."
        )


def _check_batch(configuration: ConfigurationManager, number: int) -> None:
    """Refuses batches that nnU-Net cannot divide among ``number`` GPUs, before it stops with less to read."""
    size = configuration.batch_size
    if number > 1 and (size < number or (size % number and configuration.batch_dice)):
        reason = "batch_dice needs equal parts" if size >= number else "each needs one sample or more"
        raise OneShotError(
            f"A batch of {size} samples cannot be divided among {number} GPUs ({reason}): give another -num_gpus, or "
            f"plan with another batch size."
        )
