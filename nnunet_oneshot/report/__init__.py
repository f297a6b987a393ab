"""One self-contained page about a dataset's registrations and training; parts of it serve the demonstration's page."""
