"""Pictures of what the model gives back."""

from .attention import plot_attention, plot_poolings
from .comparison import plot_by_row, plot_pooling_comparison
from .style import write_picture
from .timeline import plot_timeline
from .training_pictures import plot_error_by_position, plot_learning_curve, plot_predictions, plot_risk_against_coverage
from .trajectory import plot_circumplex, plot_trajectory
