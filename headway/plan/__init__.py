"""What a config costs, from formulas alone: parameters, FLOPs, bytes in memory and on the
network."""
