"""The residual stream: a cache of activations, its decompositions, views of heads."""
