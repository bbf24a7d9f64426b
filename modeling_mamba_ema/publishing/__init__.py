"""Publishing a model on the Hub: model card, checksums, endpoint handler, upload."""
