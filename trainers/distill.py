"""The full method: the student learns from synthetic patches and from a teacher that reconstructs the real ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch._dynamo import OptimizedModule

from nnunet_oneshot.distillation.features import decoder_features
from nnunet_oneshot.distillation.teacher import Distiller, build_teacher
from nnunet_oneshot.distillation.teacher_file import load_teacher, remove_teachers, saving_teacher
from nnunet_oneshot.precision import autocast
from nnunet_oneshot.registration.dataset.cache import FOLDER, GuidedRegistrations, RegistrationCache, kept_of
from nnunet_oneshot.seeding import derive_seed, seed_everything
from nnunet_oneshot.self_training.agreement import pooled_dice, trust_in
from nnunet_oneshot.self_training.averaging import average_of
from nnunet_oneshot.self_training.guide import StudentInTraining
from nnunet_oneshot.self_training.posterior import posterior_target
from nnunet_oneshot.synthesis.data_loader import OneShotDataLoader
from nnunet_oneshot.trainers.base import CUDA
from nnunet_oneshot.trainers.synthesis import OneShotSynthesisTrainer

_GRADIENT_NORM = 12  # nnU-Net's
_COMPARED_PATCHES = (20, 100)
_COMPARED_VOXELS = 40_000_000


class OneShotDistillTrainer(OneShotSynthesisTrainer):
    """Reconstruction-guided distillation (arXiv 2408.03616).

    The teacher reconstructs the real patch; the student segments the synthetic patch aligned with it and is drawn
    towards the teacher's features. A share of the patches are the real ones themselves, with the propagated labels
    corrected by their intensities. At the shares of the training that the settings name as ``rounds`` the student's
    average segments unlabelled images, and the atlas is registered to them again, guided by these segmentations.
    The checkpoints hold the student alone; teacher and average lie in a file beside each until
    the training has ended.

    Attributes:
        distiller: The teacher and what it is trained with, once `initialize` has been called.
        teacher_optimizer: Of the distiller, likewise.
        teacher_scheduler: Of its learning rate, likewise.
    """

    distiller: Distiller
    teacher_optimizer: torch.optim.Optimizer
    teacher_scheduler: PolyLRScheduler
    # nnU-Net's, which are exchanged here.
    network: torch.nn.Module
    dataloader_train: Any
    dataloader_val: Any

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._resumed_from: str | None = None
        self._prepared_round = 0
        self._guides = True
        self._step_of_epoch = 0

    def initialize(self) -> None:
        super().initialize()
        # nnU-Net compiles the network's forward pass, which gives no features: the function that does is compiled.
        self._features = torch.compile(decoder_features) if self._do_i_compile() else decoder_features
        settings = self.config.distillation
        teacher = build_teacher(self.configuration_manager, self.num_input_channels)
        self.distiller = self.place(Distiller(teacher, settings, features=self._features))
        self.teacher_optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=settings.teacher_learning_rate)
        self.teacher_scheduler = PolyLRScheduler(
            self.teacher_optimizer, settings.teacher_learning_rate, self.num_epochs
        )
        if settings.rounds:
            # After the optimiser is made: the average is not trained.
            self.distiller.follow(average_of(self._student(), settings.average_decay))

    @property
    def real_share(self) -> float:
        return self.config.distillation.real_share

    @property
    def _is_complete(self) -> bool:
        """Whether no epoch is left, as where a training that had ended is resumed."""
        return self.current_epoch >= self.num_epochs

    @property
    def _round(self) -> int:
        """How many times the student has been asked to guide the registration, this epoch included."""
        return sum(share * self.num_epochs <= self.current_epoch for share in self.config.distillation.rounds)

    def training_registrations(
        self, registrations: RegistrationCache, progress: OneShotDataLoader
    ) -> tuple[RegistrationCache | GuidedRegistrations, Sequence[str] | None]:
        """From the first round on those that the student guides; a resumed training asks the student again."""
        self._prepared_round = self._round
        if self._round == 0 or self._is_complete or not self._guides:
            return registrations, None
        trust = trust_in(*self._compare(progress))
        # A student that knows no label yet is asked again in the next round.
        if not trust.any():
            self.print_to_log_file("The student and the registrations agree on no label well enough yet for a guide.")
            return registrations, None
        student = StudentInTraining(
            self.distiller.averaged.module,
            self.prepared,
            mirror_axes=self.inference_allowed_mirroring_axes,
            device=self.device,
            precision=self.config.precision,
            trust=trust,
        )
        cases, folder = self._round_cases, join(self.output_folder, FOLDER)
        guided = self.registrar.register_again(cases, first=registrations, guide=student, folder=folder)
        pairs = [(atlas, case) for atlas in self.roles.atlases for case in cases if atlas != case]
        pairs = [pair for pair in pairs if pair not in self.rejected]
        chosen = kept_of(registrations, guided, pairs)
        self._guides = bool(chosen.kept)
        ended = "" if self._guides else " There is no further round."
        compared = "held-out" if self.roles.held_out else "training (none is held out)"
        self.print_to_log_file(
            f"Weight of the averaged student's labels as a guide: {trust.tolist()}, its Dice on synthetic or real "
            f"patches of {compared} cases, whichever is smaller (0 below 0.5). {len(chosen.kept)} of {len(pairs)} "
            f"registrations that it guided are kept, those in which images are about as alike as before.{ended}"
        )
        return chosen, cases

    @property
    def _round_cases(self) -> list[str]:
        """The unlabelled cases that rounds register again, the same in all of them."""
        cases = self.usable(self.roles.unlabelled)
        wanted = self.config.distillation.round_cases
        if len(cases) <= wanted:
            return cases
        drawn = np.random.default_rng(self.config.seed).choice(len(cases), wanted, replace=False)
        return [cases[number] for number in sorted(drawn)]

    def on_train_start(self) -> None:
        if self._resumed_from is not None and not self._is_complete:
            load_teacher(self._resumed_from, self.distiller, self.teacher_optimizer, self.current_epoch)
        super().on_train_start()
        if self.distiller.teaches and self.config.distillation.teacher_first:
            if self.current_epoch == 0:
                self._train_teacher()
            self.distiller.teacher.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self._round != self._prepared_round:
            self._renew_loaders()
        super().on_train_epoch_start()
        self._step_of_epoch = 0
        self.distiller.train()
        self.teacher_scheduler.step(self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        data, real = (batch[key].to(self.device, non_blocking=True) for key in ("data", "real"))
        target = batch["target"]
        if isinstance(target, list):
            target = [part.to(self.device, non_blocking=True) for part in target]
        else:
            target = target.to(self.device, non_blocking=True)
        target = self._corrected(target, real, batch["from_real"])
        self.optimizer.zero_grad(set_to_none=True)
        self.teacher_optimizer.zero_grad(set_to_none=True)
        teaches = self.distiller.teaches and self._step_of_epoch % self.config.distillation.hint_interval == 0
        self._step_of_epoch += 1
        if teaches:
            with self._autocast():
                reconstruction, teacher_features = self.distiller.reconstruct(real)
            # One network after the other where that can be, so that the activations of only one are held.
            if reconstruction.requires_grad and not self.distiller.moves_teacher:
                self._scaled(reconstruction).backward()
        with self._autocast():
            output, features = self._features(self._student(), data)
            total = segmentation = self.loss(output, target)
            if teaches:
                hint = self.distiller.hint(features, teacher_features, hint_weight=self._hint_weight())
                total = segmentation + hint
        if teaches and self.distiller.moves_teacher:
            total = total + reconstruction
        self._scaled(total).backward()
        self._step((self.network, self.optimizer), (self.distiller, self.teacher_optimizer))
        if self.config.distillation.rounds:
            self.distiller.averaged.update_parameters(self._student())
        losses = {"loss": segmentation}
        if teaches:
            losses.update(hint=hint, reconstruction=reconstruction)
        return {name: value.detach().cpu().numpy() for name, value in losses.items()}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        # nnU-Net collates what all steps have.
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        if not self.distiller.teaches:
            return
        taught = [output for output in train_outputs if "hint" in output]
        hint, reconstruction = (np.mean([output[name] for output in taught]) for name in ("hint", "reconstruction"))
        self.print_to_log_file(
            f"hint {hint:.4f} (weight {self._hint_weight():.4f}), reconstruction {reconstruction:.4f}"
        )

    def on_train_end(self) -> None:
        super().on_train_end()
        remove_teachers(self.output_folder)

    def save_checkpoint(self, filename: str) -> None:
        epoch = self.current_epoch + 1
        # After the last epoch nothing goes on from the checkpoint.
        if self.disable_checkpointing or epoch >= self.num_epochs:
            super().save_checkpoint(filename)
            return
        with saving_teacher(filename, self.distiller, self.teacher_optimizer, epoch):
            super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        # Validation needs no teacher: its file is read when training starts.
        self._resumed_from = filename_or_checkpoint

    def _corrected(self, target: torch.Tensor | list[torch.Tensor], real: torch.Tensor, from_real: torch.Tensor):
        """The target with the labels of samples that show the real image corrected by its intensities.

        The labels of synthetic samples are exact as they are.
        """
        settings = self.config.distillation
        if not settings.posterior_strength or not from_real.any():
            return target
        chosen = from_real.to(self.device)
        with torch.no_grad():
            levels = target if isinstance(target, list) else [target]
            corrected = posterior_target(
                real[chosen],
                [level[chosen] for level in levels],
                num_heads=self.label_manager.num_segmentation_heads,
                has_regions=self.label_manager.has_regions,
                blur=settings.posterior_blur,
                strength=settings.posterior_strength,
            )
            result = [level.clone() for level in levels]
            for level, part in zip(result, corrected, strict=True):
                level[chosen] = part
        return result if isinstance(target, list) else result[0]

    def _compare(self, progress: OneShotDataLoader) -> tuple[np.ndarray, np.ndarray]:
        """Dice of the averaged student with the warped labels on synthetic and on real patches of held-out cases, (K,).

        The same patches whenever it is asked: as many as `_COMPARED_VOXELS` make, within `_COMPARED_PATCHES`.
        """
        seed_everything(derive_seed(self.config.seed, 3))
        wanted = _COMPARED_VOXELS // int(np.prod(self.configuration_manager.patch_size))
        number = int(np.clip(wanted, *_COMPARED_PATCHES))
        counts: dict[str, list[dict]] = {"data": [], "real": []}
        network, self.network = self.network, self.distiller.averaged.module.eval()
        try:
            with torch.no_grad():
                for _ in range(-(-number // self.batch_size)):
                    batch = next(progress)
                    for name, found in counts.items():
                        # nnU-Net's step clears ignored voxels of the target that it is given.
                        target = copy.deepcopy(batch["target"])
                        found.append(self.validation_step({"data": batch[name], "target": target}))
        finally:
            self.network = network
        return pooled_dice(counts["data"]), pooled_dice(counts["real"])

    def _train_teacher(self) -> None:
        """Trains the teacher alone, on the real patches that the student's loader gives."""
        settings = self.config.distillation
        number = max(1, round(settings.teacher_first * self.num_epochs * self.num_iterations_per_epoch))
        self.print_to_log_file(f"The teacher is trained alone for {number} iterations and then stays as it is.")
        self.distiller.train()
        schedule = PolyLRScheduler(self.teacher_optimizer, settings.teacher_learning_rate, number)
        losses = []
        for iteration in range(number):
            schedule.step(iteration)
            real = next(self.dataloader_train)["real"].to(self.device, non_blocking=True)
            self.teacher_optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                reconstruction, _ = self.distiller.reconstruct(real)
            self._scaled(reconstruction).backward()
            self._step((self.distiller, self.teacher_optimizer))
            losses.append(reconstruction.item())
        last = losses[-self.num_iterations_per_epoch :]
        self.print_to_log_file(f"Its reconstruction: {losses[0]:.4f} at first, {np.mean(last):.4f} at last.")
        # The student begins with the patches that it would have begun with.
        self._renew_loaders()

    def _renew_loaders(self) -> None:
        """Puts new loaders in the place of both, whose worker processes are ended as nnU-Net ends them."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, MultiThreadedAugmenter):
                loader._finish()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()

    def _student(self) -> torch.nn.Module:
        """The network itself, without the wrapper of ``torch.compile``."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network

    def _hint_weight(self) -> float:
        return self.distiller.hint_weight(self.current_epoch / self.num_epochs)

    def _autocast(self):
        return autocast(self.device, self.config.precision)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def _step(self, *pairs: tuple[torch.nn.Module, torch.optim.Optimizer]) -> None:
        """One step of each module's optimiser with gradients clipped as nnU-Net does.

        A module without gradients is left out, since a gradient scaler does not bear one.
        """
        for module, optimizer in pairs:
            if all(parameter.grad is None for parameter in module.parameters()):
                continue
            if self.grad_scaler is not None:
                self.grad_scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), _GRADIENT_NORM)
            if self.grad_scaler is not None:
                self.grad_scaler.step(optimizer)
            else:
                optimizer.step()
        if self.grad_scaler is not None:
            self.grad_scaler.update()
