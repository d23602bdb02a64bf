"""Real files through real decoding: a sample has the same pixels on any rank, with any threads, after any resume."""

import gc
import os
import queue
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data import prefetcher
from pipeline.data.decode.dali_pipeline import DeviceCopies, Graph
from pipeline.data.loader import Batch, Loader, evaluation_batches
from pipeline.errors import ConfigError, DataError
from tests.support.data_sets import ROOT, drawn_jpeg, real_jpegs, same, write_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> DataConfig:
    """30 drawn JPEGs of several sizes in shards of 7, and 13 to evaluate."""
    folder = tmp_path_factory.mktemp("drawn")
    images = [drawn_jpeg(n, 32 + n, 80 - n) for n in range(30)]
    write_set(folder / "train", images, per_shard=7)
    write_set(folder / "val", images[:13], per_shard=5)
    return DataConfig(path=str(folder), image_size=24, global_batch=12, micro_batch=2, window_shards=2, threads=1)


def change(data: DataConfig, **fields) -> DataConfig:
    return DataConfig(**{name: getattr(data, name) for name in data.__slots__} | fields)


def loader(data: DataConfig, *, seed: int = 5, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(data, seed=seed, rank=rank, world_size=world_size, device=CPU)


def collect(data: DataConfig, start: int, stop: int, *, ranks: int = 1, seed: int = 5) -> dict[int, Batch]:
    """The batches of these steps on all ranks, by position."""
    batches: dict[int, Batch] = {}
    for rank in range(ranks):
        one = loader(data, seed=seed, rank=rank, world_size=ranks)
        for micro_batches in one.steps(start, stop):
            batches |= {batch.position: batch for batch in micro_batches}
        one.close()
    return batches


def test_a_batch_is_what_the_loop_expects(drawn):
    batch = collect(drawn, 0, 1)[0]
    assert batch.images.shape == (2, 3, 24, 24)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert batch.valid.tolist() == [True, True]
    assert 0.05 < batch.images.std() < 3


def test_the_decoder_is_built_with_the_share_of_the_hardware_that_was_set(drawn):
    graph = Graph(change(drawn, hw_decoder_load=0.625), CPU, lambda: None, batch_size=2, ahead=1)  # pyright: ignore
    built = graph._pipeline.serialize()
    argument = built.index(b"hw_decoder_load")
    assert struct.pack("<f", 0.625) in built[argument : argument + 50]


def test_images_come_in_the_dtype_that_was_asked_for(drawn):
    halved = Loader(drawn, seed=5, rank=0, world_size=1, device=CPU, dtype=torch.bfloat16)
    batch = next(next(halved.steps(0, 1)))
    halved.close()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, collect(drawn, 0, 1)[0].images.bfloat16())


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_pixels_do_not_depend_on_the_world_size(drawn, ranks):
    assert same(collect(drawn, 0, 6), collect(drawn, 0, 6, ranks=ranks))


@pytest.mark.parametrize(("threads", "prefetch"), [(3, 1), (2, 8)])
def test_pixels_do_not_depend_on_threads_or_read_ahead(drawn, threads, prefetch):
    assert same(collect(drawn, 0, 4), collect(change(drawn, threads=threads, prefetch=prefetch), 0, 4))


def test_pixels_of_real_photographs_do_not_depend_on_ranks_threads_or_resume(tmp_path):
    write_set(tmp_path / "train", real_jpegs(24), per_shard=5)
    data = DataConfig(path=str(tmp_path), image_size=112, global_batch=8, micro_batch=2, window_shards=2, threads=1)
    whole = collect(data, 0, 5)
    assert same(whole, collect(change(data, threads=2), 0, 5, ranks=2))
    assert same({at: whole[at] for at in range(24, 40, 2)}, collect(data, 3, 5, ranks=4))


@settings(max_examples=12)
@given(start=st.integers(0, 40), ranks=st.sampled_from([1, 2, 3, 6]))
def test_it_resumes_at_any_step_on_any_number_of_ranks(drawn, start, ranks):
    resumed = collect(drawn, start, start + 1, ranks=ranks)
    straight = collect(drawn, max(0, start - 1), start + 1)
    assert same(resumed, {at: straight[at] for at in resumed})


def test_a_saved_state_continues_exactly_on_another_number_of_ranks(drawn):
    before = loader(drawn, world_size=3, rank=2)
    for step, micro_batches in enumerate(before.steps(0, 9)):
        list(micro_batches)
        if step == 3:
            break
    state = before.state_dict()
    before.close()
    after, batches = loader(drawn, world_size=2, rank=0), {}
    after.load_state_dict(state)
    for micro_batches in after.steps(after.step, 6):
        batches |= {batch.position: batch for batch in micro_batches}
    after.close()
    straight = collect(drawn, 0, 6)
    assert min(batches) == 4 * 12
    assert same(batches, {at: straight[at] for at in batches})


def test_a_step_that_was_not_taken_whole_is_an_error_and_not_the_next_steps_data(drawn):
    one = loader(drawn)
    steps = one.steps(3, 9)
    first = next(steps)
    assert [next(first).position for _ in range(2)] == [36, 38]
    with pytest.raises(
        RuntimeError, match=r"step 4 was asked for while 4 of the 6 micro-batches of step 3 were not tak"
    ):
        next(steps)
    again = {batch.position: batch for batch in next(one.steps(3, 9))}  # what the error tells to do
    one.close()
    assert same(again, collect(drawn, 3, 4))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("global_batch", {"global_batch": 24}),
        ("micro_batch", {"micro_batch": 4}),
        ("window_shards", {"window_shards": 3}),
    ],
)
def test_a_state_of_another_batch_or_window_is_refused(drawn, name, fields):
    with pytest.raises(ConfigError, match=f"was made with {name}=.*this run has"):
        loader(change(drawn, **fields)).load_state_dict(loader(drawn).state_dict())


def test_a_state_of_another_seed_or_data_set_is_refused(drawn, tmp_path):
    with pytest.raises(ConfigError, match="was made with seed=6"):
        loader(drawn).load_state_dict(loader(drawn, seed=6).state_dict())
    write_set(tmp_path / "train", [drawn_jpeg(n) for n in range(30)], per_shard=7)
    with pytest.raises(ConfigError, match="was made with data_identity="):
        loader(drawn).load_state_dict(loader(change(drawn, path=str(tmp_path))).state_dict())


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(drawn):
    with pytest.raises(ConfigError, match=r"global_batch=12 does not divide over 5 ranks.*multiple of 10"):
        loader(drawn, world_size=5)


def test_epochs_crop_differently_and_seeds_order_differently(drawn):
    epochs = collect(drawn, 0, 10)
    images = torch.cat([epochs[at].images for at in sorted(epochs)])
    assert not torch.equal(images[:30].sum((1, 2, 3)).sort().values, images[30:60].sum((1, 2, 3)).sort().values)
    assert not same(collect(drawn, 0, 1), collect(drawn, 0, 1, seed=6))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_an_evaluation_counts_every_sample_once(drawn, ranks):
    labels, counts = torch.zeros(4, dtype=torch.int64), set()
    for rank in range(ranks):
        batches = list(evaluation_batches(drawn, rank=rank, world_size=ranks, device=CPU))
        counts.add(len(batches))
        for batch in batches:
            labels += torch.bincount(batch.labels[batch.valid], minlength=4)
    assert len(counts) == 1
    assert labels.tolist() == [4, 3, 3, 3]


def test_a_kept_batch_is_not_overwritten_by_later_ones(drawn):
    one = loader(drawn)
    kept, sums = [], []
    for micro_batches in one.steps(0, 12):
        for batch in micro_batches:
            kept.append(batch.images)
            sums.append(batch.images.sum().item())
    one.close()
    assert [images.sum().item() for images in kept] == sums


def test_a_missing_shard_ends_the_run_with_its_name(drawn, tmp_path):
    write_set(tmp_path / "train", [drawn_jpeg(n) for n in range(12)], per_shard=4)
    (tmp_path / "train" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar cannot be opened .*data_prep verify"):
        collect(change(drawn, path=str(tmp_path)), 0, 1)


def test_a_loader_that_is_left_early_leaves_nothing_behind(drawn):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        one = loader(change(drawn, prefetch=6))
        next(next(one.steps(0, 1000)))
        one.close()
        next(evaluation_batches(drawn, rank=0, world_size=1, device=CPU))
    gc.collect()
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files + 2


def test_memory_is_steady_over_twenty_epochs(drawn):
    one, steps = loader(drawn), 20 * 30 // 12
    peaks = []
    for micro_batches in one.steps(0, 2 * steps):
        for batch in micro_batches:
            batch.images.sum()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    one.close()
    assert peaks[-1] - peaks[steps] < 4 << 10  # KiB, over the second twenty epochs


ENDLESS = """
import sys, torch
from pipeline.config import DataConfig
from pipeline.data.loader import Loader
data = DataConfig(path=sys.argv[1], image_size=24, global_batch=12, micro_batch=2, threads=2)
for step in Loader(data, seed=0, rank=0, world_size=1, device=torch.device("cpu")).steps(0, 10**9):
    for batch in step: print("running", flush=True)
"""


def test_sigkill_leaves_no_process_and_no_shared_memory(drawn):
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, drawn.path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()  # threads only: nothing to orphan
    process.kill()
    process.wait()
    assert set(os.listdir("/dev/shm")) <= before


def test_a_crash_that_forgets_to_close_ends_with_its_code(drawn):
    crashing = ENDLESS.replace('print("running", flush=True)', "raise SystemExit(7)")
    process = subprocess.run(
        [sys.executable, "-c", crashing, drawn.path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=150,  # a busy machine takes long to start it
    )
    assert process.returncode == 7, process.stderr.decode()


def test_the_decoder_s_thread_takes_the_gpu_of_its_rank(monkeypatch):
    """A new thread has the first GPU: seven other ranks would open contexts there."""
    taken = []

    def set_device(device):
        taken.append(device)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    thread = object.__new__(prefetcher._DecoderThread)
    thread._device, thread._done = torch.device("cuda", 3), queue.SimpleQueue()
    thread._copies = DeviceCopies(torch.device("cpu"), torch.float32)
    thread._work()
    assert taken == [torch.device("cuda", 3)]
    assert str(thread._done.get_nowait()) == "no GPU"
