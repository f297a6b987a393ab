"""One-shot segmentation for nnU-Net: registration, synthesis and distillation from one labelled volume."""

__version__ = "0.1.0"
