"""What is arbitrary in a layer, and layers in the same gauge."""
