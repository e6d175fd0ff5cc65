"""The inference engine: many requests at once, a cache in pages, sampling."""
