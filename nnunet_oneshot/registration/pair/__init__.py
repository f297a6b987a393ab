"""Two volumes as tensors: affine map, search, velocity field and quality. Knows no file and no nnU-Net."""
