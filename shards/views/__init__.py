"""Views of a sample: what is drawn anew of a picture and of a caption each time that they are read."""
