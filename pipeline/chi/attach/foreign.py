"""Neurons of other libraries in a model: which there are, and our surrogate in place of theirs."""
