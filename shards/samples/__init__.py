"""Samples: decoded pictures, captions, attack overlays, bad samples."""
