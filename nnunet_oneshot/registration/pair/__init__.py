"""Registers two volumes given as tensors: affine map, search, velocity field, quality. Needs no files, no nnU-Net."""
