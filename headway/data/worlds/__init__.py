"""Synthetic worlds: tasks whose every item is drawn from a key, and answered by an oracle."""
