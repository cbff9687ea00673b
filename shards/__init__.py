"""The ground: files, samples, order and masks. Knows no model and no process group."""
