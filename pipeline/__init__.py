"""chispike: distributed training of deep spiking networks, steered by χ."""

__version__ = "0.1.0"
