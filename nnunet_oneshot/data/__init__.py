"""Data sets with unlabelled cases: checks, splits, the choice of the atlas, planning and preprocessing."""
