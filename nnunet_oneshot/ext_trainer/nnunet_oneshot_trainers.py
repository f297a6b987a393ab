"""The one module that nnU-Net's trainer lookup imports: the classes themselves live in an installed package.

nnU-Net forgets every module of the folder that ``nnUNet_extTrainer`` names once it has found a class, so classes
defined here could not be pickled.
"""

from nnunet_oneshot.locks import end_spawned_workers_with_this_process
from nnunet_oneshot.mistakes import explain_mistakes
from nnunet_oneshot.trainers import *  # noqa: F403
from nnunet_oneshot.trainers import __all__

explain_mistakes(tuple(__all__))
end_spawned_workers_with_this_process()
