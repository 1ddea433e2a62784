"""One file per model family, named as the checkpoint's `model_type`."""
