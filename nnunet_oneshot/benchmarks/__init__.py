"""What backs the claims of the documentation; each module is run with ``python -m``."""
