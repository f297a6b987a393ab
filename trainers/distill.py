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
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from nnunet_oneshot.distillation.features import decoder_features
from nnunet_oneshot.distillation.progress import VALUES, ProgressLogger
from nnunet_oneshot.distillation.teacher import Distiller, build_teacher
from nnunet_oneshot.distillation.teacher_file import load_teacher, remove_teachers, saving_teacher
from nnunet_oneshot.marginal import merged_outputs
from nnunet_oneshot.precision import autocast
from nnunet_oneshot.progress import tracked
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
        self.logger.local_logger = ProgressLogger()
        self._resumed_from: str | None = None
        self._prepared_round = 0
        self._guides = True
        self._step_of_epoch = 0
        labels = self.label_manager
        self._trust = np.full(labels.num_segmentation_heads - (not labels.has_regions), np.nan)
        self._guided_share = 0.0
        self._shown: list[torch.Tensor] = []

    def initialize(self) -> None:
        super().initialize()
        # nnU-Net compiles the network's forward pass, which gives no features: the function that does is compiled.
        self._features = torch.compile(decoder_features) if self._do_i_compile() else decoder_features
        settings = self.config.distillation
        teacher = build_teacher(self.configuration_manager, self.prepared.num_channels)
        distiller = Distiller(teacher, settings, features=self._features)
        # As nnU-Net does with the network.
        self.distiller = self.place(SyncBatchNorm.convert_sync_batchnorm(distiller) if self.is_ddp else distiller)
        self.ranks.align(self.distiller)
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
        self._prepared_round, self._guided_share = self._round, 0.0
        if self._round == 0 or self._is_complete or not self._guides:
            return registrations, None
        self._trust = trust = trust_in(*self._compare(progress))
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
        guided = self.ranks.once(
            lambda: self.registrar.register_again(cases, first=registrations, guide=student, folder=folder)
        )
        pairs = [(atlas, case) for atlas in self.roles.atlases for case in cases if atlas != case]
        pairs = [pair for pair in pairs if pair not in self.rejected]
        chosen = kept_of(registrations, guided, pairs)
        self._guides = bool(chosen.kept)
        self._guided_share = len(chosen.kept) / max(1, len(pairs))
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
        self._shown.clear()
        self.distiller.train()
        self.teacher_scheduler.step(self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        self._progress.update()
        self._release_memory()
        data, real = (batch[key].to(self.device, non_blocking=True) for key in ("data", "real"))
        target = batch["target"]
        if isinstance(target, list):
            target = [part.to(self.device, non_blocking=True) for part in target]
        else:
            target = target.to(self.device, non_blocking=True)
        self._shown.append(batch["from_real"])
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
            total = segmentation = self.loss(merged_outputs(output, self.hidden_labels(batch)), target)
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
        taught = self.ranks.gathered([output for output in train_outputs if "hint" in output])
        hint, reconstruction = (
            np.mean([output[name] for output in taught]) if taught else np.nan for name in ("hint", "reconstruction")
        )
        self._log(hint=hint, reconstruction=reconstruction)
        if self.distiller.teaches:
            self.print_to_log_file(
                f"hint {hint:.4f} (weight {self._hint_weight():.4f}), reconstruction {reconstruction:.4f}"
            )

    def _log(self, **losses: float) -> None:
        """Gives nnU-Net's logger one value of each of `VALUES` for the epoch."""
        shown = torch.cat(self.ranks.gathered(self._shown)).float().mean() if self._shown else np.nan
        values = {
            **losses,
            "trust": self._trust.tolist(),
            "real_share": shown,
            "guided_share": self._guided_share,
            "rounds": self._prepared_round,
        }
        for name in VALUES:
            value = values[name]
            self.logger.log(name, value if isinstance(value, list) else float(value), self.current_epoch)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.local_rank == 0:
            remove_teachers(self.output_folder)

    def save_checkpoint(self, filename: str) -> None:
        epoch = self.current_epoch + 1
        # After the last epoch nothing goes on from the checkpoint.
        if self.local_rank != 0 or self.disable_checkpointing or epoch >= self.num_epochs:
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
        # As numbers: a mask's size would have to be fetched from a GPU at every use.
        chosen = from_real.nonzero()[:, 0].to(self.device)
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
        seed_everything(derive_seed(self.ranks.seed(self.config.seed), 3))
        wanted = _COMPARED_VOXELS // int(np.prod(self.configuration_manager.patch_size))
        number = int(np.clip(wanted, *_COMPARED_PATCHES))
        counts: dict[str, list[dict]] = {"data": [], "real": []}
        network, self.network = self.network, self.distiller.averaged.module.eval()
        try:
            with torch.no_grad():
                # Of each batch of the plans every rank has its part.
                batches = -(-number // self.configuration_manager.batch_size)
                for _ in tracked(range(batches), batches, "Comparing student and registrations"):
                    batch = self._with_previous(next(progress))
                    for name, found in counts.items():
                        # nnU-Net's step clears ignored voxels of the target that it is given.
                        target = copy.deepcopy(batch["target"])
                        found.append(self.validation_step({**batch, "data": batch[name], "target": target}))
        finally:
            self.network = network
        synthetic, real = (pooled_dice(self.ranks.gathered(counts[name])) for name in ("data", "real"))
        return synthetic, real

    def _with_previous(self, batch: dict) -> dict:
        """A batch whose real patches hold what the student sees of them: in a cascade also the first stage's labels."""
        if "previous" not in batch:
            return batch
        one_hot = [batch["previous"] == label for label in self.label_manager.foreground_labels]
        return {**batch, "real": torch.cat([batch["real"], *one_hot], dim=1)}

    def _train_teacher(self) -> None:
        """Trains the teacher alone, on the real patches that the student's loader gives."""
        settings = self.config.distillation
        number = max(1, round(settings.teacher_first * self.num_epochs * self.num_iterations_per_epoch))
        self.print_to_log_file(f"The teacher is trained alone for {number} iterations and then stays as it is.")
        self.distiller.train()
        schedule = PolyLRScheduler(self.teacher_optimizer, settings.teacher_learning_rate, number)
        losses = []
        for iteration in tracked(range(number), number, "Training the teacher"):
            schedule.step(iteration)
            real = next(self.dataloader_train)["real"].to(self.device, non_blocking=True)
            self.teacher_optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                reconstruction, _ = self.distiller.reconstruct(real)
            self._scaled(reconstruction).backward()
            self._step((self.distiller, self.teacher_optimizer))
            losses.append(reconstruction.detach())
        found = torch.stack(losses).tolist()
        last = found[-self.num_iterations_per_epoch :]
        self.print_to_log_file(f"Its reconstruction: {found[0]:.4f} at first, {np.mean(last):.4f} at last.")
        # The student begins with the patches that it would have begun with.
        self._renew_loaders()

    def _renew_loaders(self) -> None:
        """Puts new loaders in the place of both, whose worker processes are ended as nnU-Net ends them."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, MultiThreadedAugmenter):
                loader._finish()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()

    def _student(self) -> torch.nn.Module:
        """The network itself, without the wrappers of ``torch.compile`` and of several GPUs."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

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
            # Both networks run past nnU-Net's wrapper for several GPUs, which would average the gradients.
            self.ranks.average_gradients(module)
            if self.grad_scaler is not None:
                self.grad_scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), _GRADIENT_NORM)
            if self.grad_scaler is not None:
                self.grad_scaler.step(optimizer)
            else:
                optimizer.step()
        if self.grad_scaler is not None:
            self.grad_scaler.update()
