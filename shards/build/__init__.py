"""Data sets that anyone can build: pictures from a package, captions made for them."""
