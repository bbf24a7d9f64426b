"""Mamba-EMA inside other programs' frames. Each module needs its program; nothing else of the package needs them."""
