"""Gradients → χ → widths. In your own training script: `from pipeline import chi; chi.attach(model, optimizer)`."""

from pipeline.chi.attach import Pilot, attach, prepare
from pipeline.snn.external_neurons import Surrogate

__all__ = ["Pilot", "Surrogate", "attach", "prepare"]
