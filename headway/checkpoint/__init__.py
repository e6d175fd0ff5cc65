"""Checkpoints and run folders: writing them, finding them, reading a model back."""
