"""The training room: optimisers, schedules, checkpoints and the loop."""
