"""Token mixers, one file each: what fills the mixer slot of a block."""
