"""Everything that is registered by name, in one place to look it up."""

from nnunet_oneshot.distillation.hints import HINTS
from nnunet_oneshot.evaluation.ablations import ABLATIONS
from nnunet_oneshot.evaluation.methods import BASELINES
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS
from nnunet_oneshot.registration.pair.similarities import SIMILARITIES

__all__ = ["ABLATIONS", "BASELINES", "HINTS", "REGISTRATION_METHODS", "SIMILARITIES"]
