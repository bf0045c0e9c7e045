"""Whole slides: store, reader, tissue and tiles, features. `docs/pathology.md` is the guide."""
