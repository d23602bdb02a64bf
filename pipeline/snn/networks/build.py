"""The network that a configuration names. Everything that needs a network gets it here."""

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn.networks import ms_resnet, sew_resnet
from pipeline.snn.networks.archs import ARCHS, TABLE
from pipeline.snn.networks.network import Network


def build(model: ModelConfig, *, num_classes: int, in_channels: int = 3, image_size: int) -> Network:
    """The network of `model.arch`, with fresh weights from torch's default generator.

    Args:
        model: the configuration.
        num_classes: K, at least 1.
        in_channels: C of the images: 3 for colour, 1 for grey, 2 for event frames.
        image_size: H = W of the images, in pixels; at least the network's total stride.

    Raises:
        ConfigError: unknown architecture, neuron or connection; an image smaller than the network's stride.
    """
    if model.arch in TABLE:
        family = {"sew": sew_resnet, "ms": ms_resnet}[TABLE[model.arch].family]
        return family.build(model, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    raise ConfigError(f"model.arch={model.arch!r} is not allowed; use one of {', '.join(ARCHS)}")
