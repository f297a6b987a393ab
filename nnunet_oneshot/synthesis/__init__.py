"""Labelled training patches made from registrations of the atlas: deformation, appearance, mirroring, data loader."""
