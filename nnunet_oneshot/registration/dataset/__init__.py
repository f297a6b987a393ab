"""The atlases of a prepared dataset and all its cases: what is registered, kept and shown, and which case to label."""
