"""Which samples an epoch reads, and in which order."""
