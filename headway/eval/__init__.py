"""The evaluation room: sampling, bits per byte, multiple choice."""
