"""(seed, step, rank) → tokens, a pure function: sources, tokenizers, memory-mapped shards, mixing."""
