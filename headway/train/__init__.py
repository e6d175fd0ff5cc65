"""Training: sessions, objectives, the optimiser step and the pre-training loop."""
