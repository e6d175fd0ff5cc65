"""(seed, step, rank) → tokens, a pure function: sources, tokenizers, shards, mixing."""
