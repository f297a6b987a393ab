"""Tiny networks and the plans they are built from."""

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

ARCHITECTURES = ["PlainConvUNet", "ResidualEncoderUNet"]


def configuration(dim: int, architecture: str = "PlainConvUNet", features: tuple[int, ...] = (4, 6, 8)):
    """A nnU-Net configuration of a tiny network, as plans describe it."""
    n = len(features)
    blocks = {"n_conv_per_stage": [1] * n} if architecture == "PlainConvUNet" else {"n_blocks_per_stage": [1] * n}
    return ConfigurationManager(
        {
            "patch_size": [16] * dim,
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.unet.{architecture}",
                "arch_kwargs": {
                    "n_stages": n,
                    "features_per_stage": list(features),
                    "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                    "kernel_sizes": [[3] * dim] * n,
                    "strides": [[1] * dim] + [[2] * dim] * (n - 1),
                    "n_conv_per_stage_decoder": [1] * (n - 1),
                    "conv_bias": True,
                    "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                    **blocks,
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    )


def student(dim: int, architecture: str = "PlainConvUNet", *, deep_supervision: bool = True, channels: int = 1):
    """The network a trainer would build from `configuration`, with three outputs."""
    manager = configuration(dim, architecture)
    return get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        channels,
        3,
        deep_supervision=deep_supervision,
    )
