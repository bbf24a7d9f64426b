"""Pictures of what the model gives back."""

from .pictures import plot_attention, plot_trajectory

__all__ = ["plot_attention", "plot_trajectory"]
