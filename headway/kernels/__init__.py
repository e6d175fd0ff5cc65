"""Faster, never different: each file holds a plain reference, a fast path, and says where the fast
path applies.
"""
