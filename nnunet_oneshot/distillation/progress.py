"""What a distilling training logs each epoch beside nnU-Net's values, through nnU-Net's own logger."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_oneshot.io import atomic_path, writing

# Panels below nnU-Net's in progress.png: the values in them, and the label of the axis.
PANELS = {
    ("hint", "reconstruction"): "loss",
    ("trust",): "trust in each label",
    ("real_share", "guided_share"): "share",
    ("rounds",): "rounds",
}
VALUES = tuple(name for panel in PANELS for name in panel)
_SIZE = (30, 18)  # of nnU-Net's panels, inches


class ProgressLogger(LocalLogger):
    """nnU-Net's local logger with one more value of each of `VALUES` an epoch, and their panels in ``progress.png``.

    ``hint`` and ``reconstruction`` are losses; ``trust`` is the weight of each label of the student as a guide, a list;
    ``real_share`` of the patches show the real image, and ``guided_share`` of the registrations are those that the
    student guided; ``rounds`` have been held. What there is none of is not a number.
    """

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(verbose)
        self.my_fantastic_logging.update({name: [] for name in VALUES})

    def load_checkpoint(self, checkpoint: dict[str, list[Any]]) -> None:
        super().load_checkpoint(checkpoint)
        # A training that an earlier version began has no values of its first epochs.
        before = len(self.my_fantastic_logging["train_losses"])
        for name in VALUES:
            self.my_fantastic_logging.setdefault(name, [float("nan")] * before)

    def plot_progress_png(self, output_folder: str) -> None:
        super().plot_progress_png(output_folder)
        from PIL import Image

        path = Path(output_folder) / "progress.png"
        with Image.open(path) as stock, Image.open(self._panels()) as own:
            whole = Image.new("RGB", (max(stock.width, own.width), stock.height + own.height), "white")
            whole.paste(stock, (0, 0))
            whole.paste(own, (0, stock.height))
        with writing(path), atomic_path(path) as temporary:
            whole.save(temporary)

    def _panels(self) -> io.BytesIO:
        """A PNG of our panels, one below the other."""
        import matplotlib.pyplot as plt

        width, height = _SIZE
        figure, axes = plt.subplots(len(PANELS), 1, figsize=(width, height * len(PANELS)))
        for ax, (names, label) in zip(axes, PANELS.items(), strict=True):
            for name in names:
                for index, values in enumerate(self._curves(name)):
                    ax.plot(values, linewidth=4, marker=".", label=name if name != "trust" else f"trust {index + 1}")
            ax.set_xlabel("epoch")
            ax.set_ylabel(label)
            ax.legend(loc=(0, 1), ncol=4)
        figure.tight_layout()
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        plt.close(figure)
        picture.seek(0)
        return picture

    def _curves(self, name: str) -> np.ndarray:
        """The values of all epochs, (curves, epochs): one curve, or one for each label."""
        rows = [np.atleast_1d(value) for value in self.my_fantastic_logging[name]]
        number = max((len(row) for row in rows), default=1)
        return np.stack([row if len(row) == number else np.full(number, np.nan) for row in rows], axis=1)
