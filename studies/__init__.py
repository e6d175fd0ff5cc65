"""Studies: one file per claim, from claim over arms to verdict. `python -m studies.NAME`."""
