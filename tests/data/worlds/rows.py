"""Items of a world for tests, as `headway worlds` writes them."""

import json

from headway.data.worlds.lines import lines


def rows(world, split="train", n=8, seed=0):
    world.check()
    return [json.loads(line) for line in lines(world, split, n, seed)]
