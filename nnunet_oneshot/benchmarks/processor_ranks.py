"""``nnUNetv2_train -num_gpus N`` on processors: ``python -m nnunet_oneshot.benchmarks.processor_ranks 999 ...``.

It takes the command's arguments. Gloo and the processor stand in for NCCL and the GPUs; all else is nnU-Net's.
"""

from __future__ import annotations

from functools import wraps

import torch
from nnunetv2.run import run_training as command
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def on_processors() -> None:
    """Puts gloo and the processor in the place of nccl and CUDA, for trainings that this process begins as a rank."""
    trainer = trainer_module.nnUNetTrainer
    make = trainer.__init__

    def begin(rank: int, number: int) -> None:
        distributed.init_process_group("gloo", rank=rank, world_size=number)

    @wraps(make)
    def make_on_processor(self, *args, **named) -> None:
        make(self, *args, **named)
        self.device, self.grad_scaler = torch.device("cpu"), None

    command.setup_ddp = begin
    torch.cuda.set_device = lambda device: None
    trainer_module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    trainer.__init__ = make_on_processor
    torch.set_num_threads(1)


# The ranks are started anew: each imports this module under the second name.
if __name__ in ("__main__", "__mp_main__"):
    on_processors()
if __name__ == "__main__":
    command.run_training_entry()
