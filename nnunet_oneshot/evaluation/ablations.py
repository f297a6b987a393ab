"""Ablations: settings that answer a question, each one registered entry.

``nnunet_oneshot benchmark --methods distill:no-hint`` runs a method with the settings of an entry of `ABLATIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_oneshot.registry import Registry


@dataclass(frozen=True)
class Ablation:
    """An entry of `ABLATIONS`.

    Attributes:
        meaning: What is changed or left out.
        settings: Of the ``oneshot`` block.
    """

    meaning: str
    settings: Mapping[str, Any]


ABLATIONS: Registry[Ablation] = Registry("ablation")


def _ablation(name: str, meaning: str, **settings: Any) -> None:
    ABLATIONS.add(name, Ablation(meaning, settings))


def _distillation(name: str, meaning: str, **settings: Any) -> None:
    _ablation(name, meaning, distillation=settings)


_distillation("no-hint", "No hint; no teacher is trained.", hint="none")
_distillation("hint-in-every-step", "Teacher and hint take part in every step.", hint_interval=1)
_distillation(
    "paper-hint",
    "The paper's hint at its weight and in every step: one cosine a level.",
    hint="global",
    hint_weight=1,
    hint_interval=1,
)
_distillation("raw-hint", "The hint for each voxel, without projection of the student's features.", hint="voxel_raw")
_distillation("one-level", "The hint at full resolution alone.", levels=1)
_distillation("hint-moves-teacher", "The hint moves the teacher and leaves the student alone.", detach="student")
_distillation("hint-moves-both", "The hint moves teacher and student.", detach="none")
_distillation(
    "teacher-first", "The teacher is trained first, half as long as the student, then frozen.", teacher_first=0.5
)
_distillation("no-warm-up", "The hint has its full weight from the start.", warmup_epochs=0)
_distillation("masked-teacher", "Half of the teacher's input is masked.", corruption=0.5)
_distillation("no-reconstruction", "The teacher learns nothing.", reconstruction_weight=0)
_distillation("fewer-real-patches", "Half as many real patches as by default.", real_share=0.25)
_distillation("more-real-patches", "Three of four patches are real.", real_share=0.75)
_distillation("no-real-patches", "Synthetic patches alone; rounds register their atlas again.", real_share=0)
_distillation("no-rounds", "The first registrations to the end.", rounds=[])
_distillation(
    "paper",
    "The paper's regime: its hint at its weight, synthetic patches alone, no rounds.",
    hint="global",
    hint_weight=1,
    hint_interval=1,
    real_share=0,
    rounds=[],
)
_distillation("one-round", "One round, half-way.", rounds=[0.5])
_distillation("four-rounds", "Four rounds.", rounds=[0.2, 0.4, 0.6, 0.8])
_distillation("stronger-guide", "The guide of the rounds has twice the weight.", guide_weight=4)
_distillation("no-correction", "Real patches have the labels that registration carries to them.", posterior_strength=0)
_ablation("no-logit-adjustment", "Cross-entropy is nnU-Net's from the start.", logit_adjustment=0)
_ablation("no-appearance", "No transfer of appearance from real images.", synthesis={"p_appearance": 0})
_ablation(
    "no-random-deformation",
    "The atlas is warped as it is registered.",
    synthesis={"p_scale": 0, "p_mix": 0, "p_random": 0},
)
_ablation("fewer-unlabelled", "A fifth of the unlabelled cases, at least one.", unlabelled_fraction=0.2)
_ablation(
    "network", "A registration network instead of the optimisation of each pair.", registration={"method": "network"}
)
