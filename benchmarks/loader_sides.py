"""The sides of `benchmarks.loader`: each an endless iterator over batches of 224² random-resized crops, on the CPU."""

import io
import math
import random
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.decode.augment import Windows, random_windows
from pipeline.data.decode.dali_pipeline import MEAN, STD, Fed, Graph, ImageViews
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest, read_samples

BATCH, SIZE = 64, 224
CPU = torch.device("cpu")


def config(path: str, threads: int, cache: str = "") -> DataConfig:
    return DataConfig(
        path=path, image_size=SIZE, global_batch=BATCH, micro_batch=BATCH, threads=threads, cache_dir=cache
    )


def ours(path: str, threads: int, cache: str = "", **options: Any) -> Generator[torch.Tensor, None, None]:
    """This project's loader, with further options of `DataConfig`."""
    loader = Loader(replace(config(path, threads, cache), **options), seed=0, rank=0, world_size=1, device=CPU)
    try:
        for micro_batches in loader.steps(0, 1 << 40):
            for batch in micro_batches:
                yield batch.images
    finally:
        loader.close()


def from_memory(path: str) -> Callable[[], Fed]:
    """Gives batches of the set's images; they are read, and their windows drawn, beforehand."""
    folder = Path(path) / "train"
    encoded, sizes = [], []
    for shard in Manifest.load(folder).shards:
        content = np.fromfile(folder / shard.tar, dtype=np.uint8)
        for record in read_samples(folder, shard):
            encoded.append(content[record["offset"] : record["offset"] + record["length"]].copy())
            sizes.append((record["height"], record["width"]))
    numbers = np.tile(np.random.default_rng(0).permutation(len(encoded)), 5)
    windows = random_windows(
        0,
        np.arange(len(numbers)) // len(encoded),
        numbers,
        np.array(sizes, dtype=np.int64)[numbers],
        area_min=0.08,
        aspect=4 / 3,
        flip=True,
        image_size=SIZE,
    )
    starts = (at * BATCH for _ in count() for at in range(len(numbers) // BATCH))

    def feed() -> Fed:
        chosen = slice(at := next(starts), at + BATCH)
        return [encoded[n] for n in numbers[chosen]], ImageViews(Windows(*(part[chosen] for part in windows)), [])

    return feed


def bare_dali(path: str, threads: int) -> Generator[torch.Tensor, None, None]:
    """The same graph fed with the same images from memory: the most that DALI can do."""
    graph = Graph(config(path, threads), CPU, from_memory(path), batch_size=BATCH, ahead=3)
    while True:
        yield graph.run()


def decode_only(path: str, threads: int) -> Generator[object, None, None]:
    """The first of the graph's three steps alone, for the profile."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    feed = from_memory(path)

    def source() -> list:
        encoded, views = feed()
        return [encoded, views.windows.anchors, views.windows.shapes]

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=3)  # pyright: ignore
    def graph():
        inputs = fn.external_source(source=source, num_outputs=3, batch=True, no_copy=True)
        return fn.decoders.image_slice(
            *inputs,  # pyright: ignore
            axes=[0, 1],
            output_type=types.RGB,  # pyright: ignore
            jpeg_fancy_upsampling=True,
        )

    pipeline = graph()
    pipeline.build()
    while True:
        yield pipeline.run()


def native_dali(path: str, threads: int, *, fancy: bool = True) -> Generator[torch.Tensor, None, None]:
    """DALI's own reader of WebDataset tars and random crops; `fancy` chroma upsampling is as in our graph."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    tars = sorted(str(tar) for tar in (Path(path) / "train").glob("*.tar"))

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=3)  # pyright: ignore
    def graph():
        encoded, _ = fn.readers.webdataset(  # pyright: ignore
            paths=tars,
            index_paths=[tar.removesuffix("tar") + "idx" for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=400,
        )
        images = fn.decoders.image_random_crop(
            encoded,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
            device="cpu",
            jpeg_fancy_upsampling=fancy,
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)  # pyright: ignore
        return fn.crop_mirror_normalize(
            images,  # pyright: ignore
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,  # pyright: ignore
            output_layout="HWC",
            mean=list(MEAN),
            std=list(STD),
        )

    pipeline = graph()
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        yield torch.from_dlpack(images.as_tensor())


def random_resized_crop(image: Image.Image) -> torch.Tensor:
    """torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, done with Pillow."""
    image = image.convert("RGB")
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _decode(encoded: bytes) -> torch.Tensor:
    return random_resized_crop(Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")))


def webdataset_pillow(path: str, threads: int) -> Generator[torch.Tensor, None, None]:
    """webdataset and Pillow in a torch DataLoader with one worker per core."""
    import webdataset

    tars = sorted(str(tar) for tar in (Path(path) / "train").glob("*.tar"))
    samples = webdataset.WebDataset(tars, resampled=True, shardshuffle=False)  # pyright: ignore
    samples = samples.shuffle(200).to_tuple("jpg").map_tuple(_decode).batched(BATCH, collation_fn=_stack)
    yield from webdataset.WebLoader(samples, batch_size=None, num_workers=threads, prefetch_factor=2)  # pyright: ignore


def _stack(samples: list[tuple[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([sample[0] for sample in samples])


class ImageFolder(torch.utils.data.Dataset):
    """An image folder with one file per image."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return _decode(self.paths[number].read_bytes())


def folder_pillow(path: str, threads: int) -> Generator[torch.Tensor, None, None]:
    """An image folder and Pillow in a torch DataLoader with one worker per core."""
    images = ImageFolder(Path(path) / "folder")
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=1 << 30)
    yield from torch.utils.data.DataLoader(images, BATCH, sampler=sampler, num_workers=threads, prefetch_factor=2)


def native_default(path: str, threads: int) -> Generator[torch.Tensor, None, None]:
    """`native_dali` with plain chroma upsampling, its default: less work, but other pixels than on a GPU."""
    return native_dali(path, threads, fancy=False)
