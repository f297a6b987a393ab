"""Tiny volumes as arrays."""

import numpy as np
from scipy.ndimage import gaussian_filter


def blobs(shape, seed=0):
    """A smooth random image with a bright ellipsoid in the middle, (1, *shape)."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.standard_normal(shape), 2)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    return (texture / texture.std() * 0.3 + 2.0 / (1 + np.exp(12 * (radius - 0.55))))[None].astype(np.float32)
