"""Publishing a model on the Hub: model card, checksums, endpoint handler, upload."""

from .model_card import TrainingFacts
from .publish import PublishedFile, files_to_publish, prepare_release, publish, push_model
