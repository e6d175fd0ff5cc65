"""Fair comparisons of designs: equal budgets, paired seeds, statistics."""
