"""One self-contained page about a dataset's registrations and training; its parts serve the demonstration's page too."""
