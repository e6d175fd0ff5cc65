"""Evaluation: bits per byte of a text, and sampled text."""
