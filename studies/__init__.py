"""Studies: one file each, from claim over arms to verdict; `headway study list`."""
