"""The trainer that the others derive from: nnU-Net's, with one-shot cases, splits, validation and checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join, maybe_mkdir_p
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_trainer_module
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_oneshot.checkpoints import (
    load_data,
    loading_checkpoint,
    other_checkpoints,
    resume_advice,
    saving_checkpoint,
)
from nnunet_oneshot.config import BLOCK, OVERRIDES_VARIABLE, OneShotConfig, differences, settings_in_force
from nnunet_oneshot.data.fingerprint import fingerprint_standing_in
from nnunet_oneshot.data.plans import check_plans
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.roles import CaseRoles, resolve_roles
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.devices import check_operations
from nnunet_oneshot.errors import INTERRUPTED, OneShotError
from nnunet_oneshot.io import load_json_checked, require_env, save_json_atomic, writing
from nnunet_oneshot.locks import end_workers_with_this_process, ending_workers_at_once, free, take_or_refuse
from nnunet_oneshot.marginal import merged_outputs
from nnunet_oneshot.memory import release_freed_memory
from nnunet_oneshot.names import check_name
from nnunet_oneshot.precision import Float32Loss, processor_autocast, uses_bfloat16
from nnunet_oneshot.progress import Progress
from nnunet_oneshot.ranks import Ranks
from nnunet_oneshot.registry import load_modules
from nnunet_oneshot.seeding import derive_seed, seed_everything
from nnunet_oneshot.synthesis.data_loader import PatchError, wrap_workers
from nnunet_oneshot.synthesis.mirroring import decide_mirror_axes
from nnunet_oneshot.trainers.cascade import CascadeTrainer
from nnunet_oneshot.versions import versions

CUDA = torch.device("cuda")
# Beside the checkpoints: settings in force, atlases and versions of a training.
SETTINGS_FILE = "oneshot_settings.json"
LOCK_FILE = "training.lock"
_STEPS_BETWEEN_RELEASES = 10

_Network = TypeVar("_Network", bound=torch.nn.Module)


class OneShotTrainer(CascadeTrainer):
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
        self.link_stages()
        self._roles: CaseRoles | None = None
        self._scored_cases: list[str] | None = None
        self._progress = Progress(0, "", show=False)
        self._begun = time.monotonic()
        self._steps = 0

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
        check_operations(self.device)
        fold = self._fold()
        self.prepared.check_previous([*fold.train, *fold.validation])
        # With one scale nnU-Net's weights of deep supervision are 0 / 0, and the loss is not a number.
        if len(self.configuration_manager.pool_op_kernel_sizes) < 3:
            self.enable_deep_supervision = False
        seed_everything(self.config.seed)
        super().initialize()
        self.network = self.place(self.network)

    def on_train_start(self) -> None:
        # Two trainings in one folder would overwrite each other's checkpoints.
        self._take_lock("training")
        end_workers_with_this_process()
        self._check_settings()
        self._begun = time.monotonic()
        # nnU-Net copies its fingerprint to the results, and stops where there is none.
        own = BLOCK in self.plans_manager.plans
        with fingerprint_standing_in(nnunet_trainer_module, self.prepared.base) if own else nullcontext():
            super().on_train_start()
        self._keep_settings()

    def run_training(self) -> None:
        try:
            with ending_workers_at_once(), self.ranks.telling_lost(), self._telling_faults("training"):
                super().run_training()
        except KeyboardInterrupt:
            checkpoints = [join(self.output_folder, f"checkpoint_{name}.pth") for name in ("latest", "best")]
            how = "goes on from the last checkpoint with --c" if any(map(isfile, checkpoints)) else "begins anew"
            self.print_to_log_file(f"Interrupted in epoch {self.current_epoch}. The same command {how}.")
            raise SystemExit(INTERRUPTED) from None

    def plot_network_architecture(self) -> None:
        # Where the package is missing, nnU-Net tells of it as of a failure.
        if find_spec("hiddenlayer") is not None:
            super().plot_network_architecture()

    def print_plans(self) -> None:
        with redirect_stdout(StringIO()):
            super().print_plans()
        chosen = self.configuration_manager
        self.print_to_log_file(
            f"Training {self.configuration_name} of {self.plans_manager.plans_name}: patch {list(chosen.patch_size)}, "
            f"batch {self.batch_size}, {self.num_epochs} epochs. Plans and settings are in {self.log_file}."
        )

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

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._progress = Progress(
            self.num_iterations_per_epoch,
            f"Epoch {self.current_epoch}",
            later=(self.num_epochs - self.current_epoch - 1) * self.num_iterations_per_epoch,
            show=self.local_rank == 0,
            begun=self._begun,
        )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._progress.close()
        super().on_train_epoch_end(train_outputs)

    # nnU-Net's own steps see to mixed precision on CUDA and have none on a processor. Their backward pass falls into
    # the context too; of what runs there it changes nothing, as all convolutions are in bfloat16 already.
    def train_step(self, batch: dict) -> dict:
        self._progress.update()
        self._release_memory()
        with processor_autocast(self.device, self.config.precision), self._merging_hidden(batch):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        self._release_memory()
        with processor_autocast(self.device, self.config.precision), self._merging_hidden(batch):
            return super().validation_step(batch)

    def _release_memory(self) -> None:
        """Called in each step: on a processor, gives back now and then what earlier ones have freed."""
        if self.device.type == "cpu" and self._steps % _STEPS_BETWEEN_RELEASES == 0:
            release_freed_memory()
        self._steps += 1

    def hidden_labels(self, batch: dict) -> list[tuple[int, ...]]:
        """For each sample of a batch the labels that its label map does not show."""
        cases = batch.get("atlases") or batch.get("keys", ())
        return [self.prepared.hidden_labels.get(str(case), ()) for case in cases]

    @contextmanager
    def _merging_hidden(self, batch: dict) -> Iterator[None]:
        """While it lasts, the network's outputs for partly labelled samples are those of `merged_outputs`."""
        hidden = self.hidden_labels(batch)
        if not any(hidden):
            yield
            return
        hook = self.network.register_forward_hook(lambda _, __, outputs: merged_outputs(outputs, hidden))
        try:
            yield
        finally:
            hook.remove()

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
            self.previous_stage,
        )

    @contextmanager
    def _telling_faults(self, what: str) -> Iterator[None]:
        """Turns the end of a worker, of a disk's space or of a folder into an `OneShotError` that says how to go on."""
        try:
            yield
        except PatchError as error:
            raise OneShotError(
                f"The {what} in {self.output_folder} stopped. {error} {self._next_step(what)}"
            ) from error
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise OneShotError(
                f"The {what} in {self.output_folder} stopped ({place}{error.strerror or error}): its folders must be "
                f"there, be writable and have space left. {self._next_step(what)}"
            ) from error

    def _next_step(self, what: str) -> str:
        return resume_advice(self.output_folder) if what == "training" else "Then give the same command again."

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
            "is_cascaded": self.is_cascaded,
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
            with self.ranks.telling_lost(), self._telling_faults("validation"):
                self._validate(save_probabilities)
                fold = self._fold()
                cases = sorted({*fold.train, *fold.validation})
                self.ranks.once(lambda: self.segment_for_next_stages(self.prepared, cases))
        finally:
            free(join(self.output_folder, LOCK_FILE))

    def _take_lock(self, what: str) -> None:
        lock = join(self.output_folder, LOCK_FILE)
        self.ranks.once(lambda: take_or_refuse(lock, what))

    def print_to_log_file(self, *args, **options) -> None:
        # nnU-Net lets all ranks print what is the same in all of them.
        if self.local_rank == 0:
            super().print_to_log_file(*map(_readable, args), **options)

    def _validate(self, save_probabilities: bool) -> None:
        fold = self._fold()
        if not fold.scored:
            kind = "complete label" if fold.partial else "label"
            reason = f"none of its validation cases has a {kind}" if fold.validation else "it has no validation case"
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
                f"Final validation: {len(fold.scored)} of {len(fold.validation)} cases have a "
                f"{'complete label' if fold.partial else 'label'} and are scored."
            )
        self._scored_cases = fold.scored
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._scored_cases = None
        self.print_to_log_file(
            f"This mean validation Dice is that of real images: {len(fold.scored)} validation cases of fold "
            f"{self.fold}, whose labels served nothing else."
        )

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
        if stored["atlases"] != atlases:
            changed.append(f"the atlas was {stored['atlases']}, is {atlases}")
        if changed:
            raise OneShotError(
                f"The training in {self.output_folder} was started with other settings: {'; '.join(changed)}. Set them "
                f"back in the plans or in {OVERRIDES_VARIABLE}, or train again without --c."
            )

    def _stored_settings(self) -> dict | None:
        path = join(self.output_folder, SETTINGS_FILE)
        if not os.path.isfile(path):
            return None
        return load_json_checked(path, "the settings of the training", {"settings": dict, "atlases": [str]})

    def _changed_settings(self, stored: dict) -> list[str]:
        return differences(stored["settings"], settings_in_force(self.config))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Reads a checkpoint's file; its content, which nnU-Net's own method takes too, is given by no command."""
        if not self.was_initialized:
            self.initialize()
        others = other_checkpoints(filename_or_checkpoint)
        advice = (
            "Delete it and " + (f"resume with --c from {others[0]}, or " if others else "") + "train again without --c."
        )
        with loading_checkpoint(filename_or_checkpoint, advice=advice):
            # nnU-Net would run the code that a file names.
            load_data(filename_or_checkpoint)
            super().load_checkpoint(filename_or_checkpoint)
        stored = self._stored_settings()
        if stored is not None and (changed := self._changed_settings(stored)):
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


def _readable(part: Any) -> Any:
    """A part of a line of the log; numbers of numpy in a list are shown as numbers."""
    if not isinstance(part, list):
        return part
    return [round(float(value), 4) if isinstance(value, np.floating) else value for value in part]


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
    if (first := chosen.previous_stage_name) is not None:
        check_name(first, "previous_stage", f"configuration {configuration} of plans {name}")
        if first == configuration or first not in plans["configurations"]:
            others = sorted(set(plans["configurations"]) - {configuration})
            raise OneShotError(
                f"Configuration {configuration!r} of plans {name!r} names {first!r} as its previous stage: expected "
                f"another configuration of these plans, {others}. Correct it, or plan the dataset again."
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
