"""Bytes of local and remote files: reads, cache, prefetch, atomic writes."""
