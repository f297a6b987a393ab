"""A demonstration on generated anatomical phantoms: the dataset, the run through every command, and its report."""
