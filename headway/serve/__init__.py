"""Inference for many requests at once: engine, paged cache, sampling, server."""
