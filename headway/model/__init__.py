"""The mathematics: plain PyTorch, one process, any device; knows nothing of ranks."""
