"""Studies: one file each of at most 150 lines, from claim over arms to verdict; `headway study`.
What several of them read lies beside them: designs (arms.py), layers that are no options
(lever_layers.py), recorded routes (routes.py), the law of a ladder (ladder_law.py)."""
