"""The side of training images by position: small ones at first cost less, and teach most of what large ones do."""

from pipeline.config import DataConfig


def image_size_at(data: DataConfig, epoch: int) -> int:
    """Side of the images of a step that begins in `epoch`, from 0, in pixels.

    From `image_size_start` it grows evenly over the epochs of `image_size_ramp`, in multiples of `image_size_step`, to
    `image_size`. A function of the epoch alone: the same on every rank, and after a resume.
    """
    if not data.image_size_start:
        return data.image_size
    begin, end = data.image_size_ramp
    share = min(1.0, max(0.0, (epoch - begin) / (end - begin)))
    side = data.image_size_start + share * (data.image_size - data.image_size_start)
    step = data.image_size_step
    return data.image_size if share == 1 else max(data.image_size_start, int(side // step * step))
