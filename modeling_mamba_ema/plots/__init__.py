"""Pictures of what a model gives back; those of a training, in `training_pictures`, need the extra `train`."""

from .attention import plot_attention, plot_poolings
from .comparison import plot_by_row, plot_pooling_comparison
from .style import write_picture
from .timeline import plot_timeline
from .trajectory import plot_circumplex, plot_trajectory
