"""A grid: does a finer mixture of experts want another learning rate?

    headway sweep examples/sweep_grid.py --dir grid --workers 4
    headway results grid --group n_experts,optim.lr

As many parameters are active in all designs: more experts are narrower, and more are chosen."""

from itertools import product

RECIPE, STEPS = "demo", 400


def configs():
    for split, lr, seed in product((1, 2, 4), (1e-3, 2e-3, 4e-3), (0, 1)):
        yield {
            "recipe": RECIPE,
            "optim.steps": STEPS,
            "optim.lr": lr,
            "run.seed": seed,
            "model.moe.n_experts": 8 * split,
            "model.moe.top_k": 2 * split,
            "model.moe.d_expert": 128 // split,
        }
