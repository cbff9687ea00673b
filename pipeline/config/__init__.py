"""Config: schema, presets, files, and the data that a config names."""
