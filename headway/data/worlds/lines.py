"""Items of a world as JSON lines."""

import json
from collections.abc import Iterator

import numpy as np

from headway.data.worlds.world import World, WorldSplit, generate

BLOCK = 1024
"""Items that are drawn at once."""


def lines(world: World, split: WorldSplit, n: int, seed: int = 0) -> Iterator[str]:
    """Yield the first n items of a split: `prompt` and `answer`, words with blanks between them;
    `tokens` and `targets` (−1 is ignored), numbers of words; `meta`, what was drawn."""
    words = world.words
    for begin in range(0, n, BLOCK):
        index_B = np.arange(begin, min(begin + BLOCK, n), dtype=np.uint64)
        state = generate(world, split, index_B, seed)
        items = world.render(state, world.oracle(state))
        rows = zip(*(values.tolist() for values in items), strict=True)
        for row, (tokens, targets, n_prompt, answer) in enumerate(rows):
            length = len(tokens) - tokens.count(-1)
            item = {
                "prompt": " ".join([words[i] for i in tokens[:n_prompt]]),
                "answer": " ".join([words[i] for i in answer if i >= 0]),
                "tokens": tokens[:length],
                "targets": targets[:length],
                "meta": world.meta(state, row),
            }
            yield json.dumps(item, ensure_ascii=False) + "\n"
