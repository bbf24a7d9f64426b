"""Corpora: audio files, the normal form of a corpus, and the synthetic one of the demo."""
