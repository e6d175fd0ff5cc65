"""Rates of this machine and of its links, measured; the cost model reads them."""
