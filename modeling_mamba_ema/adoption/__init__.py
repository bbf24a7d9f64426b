"""Trained models of other publishers, converted into models of this package with the same numbers."""

from .adopt import Adoption, adopt
from .wavlm import convert_wavlm
