"""Tar files, found samples and damage, and the index of a data set."""
