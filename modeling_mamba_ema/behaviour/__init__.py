"""How a model behaves: for groups of speakers, in noise and bad recordings, and on what is no speech."""

from .conditions import CONDITIONS, NO_SPEECH
from .measures import RECORDING, correlations, measure, measure_changes, measure_groups, recording_facts
from .page import add_to_card, write_report
