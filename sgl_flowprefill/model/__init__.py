"""The model that is served when none is named."""

from sgl_flowprefill.model.embedded import EmbeddedModel, embedded_model_path

__all__ = ["EmbeddedModel", "embedded_model_path"]
