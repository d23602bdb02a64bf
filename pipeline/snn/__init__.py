"""Spiking networks: surrogate gradients, neurons and their kernels, SEW-ResNet."""
