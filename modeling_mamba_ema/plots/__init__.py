"""Pictures of what the model gives back."""

from .pictures import plot_attention, plot_trajectory
from .training_pictures import plot_error_by_position, plot_learning_curve, plot_predictions

__all__ = [
    "plot_attention",
    "plot_error_by_position",
    "plot_learning_curve",
    "plot_predictions",
    "plot_trajectory",
]
