"""Optuna's ask and tell: learning rate and sparsity, four trials at a time.

    headway sweep examples/sweep_optuna.py --dir optuna --workers 4

The sampler has a seed, and the folder has the results: called again it asks the same questions,
gets stored answers, and goes on where it was stopped. Optuna's own storage is not needed."""

import optuna

RECIPE, STEPS, ROUNDS = "demo", 400, 8


def configs():
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True))
    for _ in range(ROUNDS):
        trials = [study.ask() for _ in range(4)]
        results = []
        for trial in trials:
            lr = trial.suggest_float("lr", 3e-4, 1e-2, log=True)
            top_k = trial.suggest_int("top_k", 2, 4)
            fields = {"optim.steps": STEPS, "optim.lr": lr, "model.moe.top_k": top_k}
            results.append((yield {"recipe": RECIPE, **fields}))
        for trial, result in zip(trials, results, strict=True):
            study.tell(trial, result["bits_per_byte"])  # infinite for a run that diverged
