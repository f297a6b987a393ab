"""What the student teaches itself in rounds: its segmentations as a guide, corrected labels, and what to trust."""
