"""SafeCLIP: pre-training CLIP on image-caption pairs that nobody can trust."""
