"""Successive halving: eight designs; the better half goes on for twice the steps, three times.

    headway sweep examples/sweep_halving.py --dir halving --workers 4
    headway results halving --sort bits_per_byte

With `fork` a run leaves its checkpoint of the last step before its rate falls, and a longer one
goes on from there, bit for bit as if it had been trained alone: as many steps of warm-up, and a
rate that is constant up to its fall (`wsd`), let them begin alike."""

from itertools import product

RECIPE, STEPS = "demo", 400


def configs():
    steps, shared = STEPS, {"recipe": RECIPE, "fork": True, "optim.warmup_steps": 20}
    designs = product((1e-3, 2e-3, 4e-3, 8e-3), (2, 4))
    items = [{**shared, "optim.lr": lr, "model.moe.top_k": top_k} for lr, top_k in designs]
    while items:
        results = []
        for item in items:
            results.append((yield {**item, "optim.steps": steps}))
        results.sort(key=lambda result: result["bits_per_byte"])
        items = [result.item for result in results[: len(results) // 2]]
        steps *= 2
