"""What may become of the parts of a model."""
