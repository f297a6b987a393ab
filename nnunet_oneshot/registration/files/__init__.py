"""Two image files, without any nnU-Net folder."""
