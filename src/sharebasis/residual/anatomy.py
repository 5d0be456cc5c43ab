"""Where things are in a model: its layers by head, its sites, its unembedding."""

from __future__ import annotations

from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Classification
from sharebasis.residual.head_views import LayerViews, head_views, sublayers_of
from sharebasis.residual.sites import find_sites
from sharebasis.residual.unembedding import Unembedding


class Anatomy:
    """What has to be found in a model before its activations mean something."""

    def __init__(
        self, model: PreTrainedModel, classification: Classification | None = None
    ) -> None:
        """Args:
        model: dense, wrapped or compressed. Look again once modules were put in or out.
        classification: its sublayers; None classifies a model of the same class and config.

        Raises:
            SelectionError: its sublayers, or its embeddings, cannot be found.
        """
        classification = sublayers_of(model) if classification is None else classification
        self.model = model
        self.layers: tuple[LayerViews, ...] = head_views(model, classification)
        self.sites = find_sites(model, classification)
        self.unembedding = Unembedding.of(model)
