"""The network that a configuration names. Everything that needs a network gets it here."""

from pathlib import Path

from pipeline.config import ModelConfig
from pipeline.snn.networks import ms_resnet, own, own_source, sew_resnet
from pipeline.snn.networks.archs import TABLE
from pipeline.snn.networks.network import Network


def build(
    model: ModelConfig,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int,
    image_size_start: int = 0,
    image_size_step: int = 0,
    micro_batch: int = 2,
    run: Path | None = None,
) -> Network:
    """The network of `model.arch`, with fresh weights from torch's default generator.

    Args:
        model: the configuration.
        num_classes: K, at least 1.
        in_channels: C of the images: 3 for colour, 1 for grey, 2 for event frames.
        image_size: H = W of the images, in pixels; at least the network's total stride.
        image_size_start: side of the first images where they grow to image_size; 0 where they do not.
        image_size_step: their sides between the two are multiples of this; 0 where they do not grow.
        micro_batch: images of a training pass: a user's own network has to take as few.
        run: folder of a run: a user's own network is built from the copy of its file there, if there is one.

    Raises:
        ConfigError: unknown architecture, neuron or connection; an image smaller than the network's stride; a user's
            network that breaks the contract of own.py.
    """
    own_source.check(model.arch)
    source = own_source.find(model.arch, run)
    if source is None:
        smallest = image_size_start or image_size
        family = {"sew": sew_resnet, "ms": ms_resnet}[TABLE[model.arch].family]
        return family.build(model, num_classes=num_classes, in_channels=in_channels, image_size=smallest)
    sizes = (image_size, image_size_start) if image_size_start else (image_size,)
    if image_size_start and image_size_step:
        first = -(-image_size_start // image_size_step) * image_size_step
        sizes = tuple(dict.fromkeys((*sizes, *range(first, image_size, image_size_step))))
    return own.build(
        source,
        model,
        num_classes=num_classes,
        in_channels=in_channels,
        image_sizes=sizes,
        micro_batch=micro_batch,
    )
