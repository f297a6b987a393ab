"""Experiment planners: nnU-Net's, sized for a training that holds student and teacher.

Plans made here name only nnU-Net's own classes, so that nnU-Net loads them without this package.
"""

from nnunet_oneshot.planners.cpu_planner import OneShotCPUPlanner
from nnunet_oneshot.planners.oneshot_planner import OneShotPlanner
from nnunet_oneshot.planners.resenc_planners import (
    OneShotResEncLPlanner,
    OneShotResEncMPlanner,
    OneShotResEncXLPlanner,
)

__all__ = [
    "OneShotCPUPlanner",
    "OneShotPlanner",
    "OneShotResEncLPlanner",
    "OneShotResEncMPlanner",
    "OneShotResEncXLPlanner",
]
