"""Gradients → χ → widths. A training script of one's own: `from pipeline import chi; chi.attach(model, optimizer)`."""

from pipeline.chi.attach import Pilot, attach
from pipeline.snn.external_neurons import Surrogate

__all__ = ["Pilot", "Surrogate", "attach"]
