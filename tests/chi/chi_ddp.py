"""Two DDP ranks with `chi.attach`, run by test_attach.py: exact counts, no collective added, equal widths."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pipeline import chi
from pipeline.chi.indicators import gradient_sums
from pipeline.config import ModelConfig
from pipeline.snn import losses
from pipeline.snn.networks import sew_resnet

STEPS = 6


def train(attached: bool, policy: str, no_sync: bool) -> tuple[Counter, Any, list]:
    """Collectives called while training, the pilot, and the last gradient's sums on this rank."""
    torch.manual_seed(0)
    network = sew_resnet.build(ModelConfig(arch="sew_tiny", T=2), num_classes=10, image_size=8)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pilot = chi.attach(model, optimizer, policy=policy, steps=STEPS, interval=2) if attached else None
    sums: list = []
    optimizer.register_step_pre_hook(
        lambda *_: sums.append(torch.stack([gradient_sums(p.grad) for p in network.parameters() if p.grad is not None]))
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.profiler.profile() as profile:
        for step in range(STEPS):
            # Unequal batches: a rank with more samples counts more.
            images = torch.rand(4 + 2 * dist.get_rank(), 3, 8, 8, generator=generator)
            labels = torch.randint(10, (len(images),), generator=generator)
            if no_sync and step % 2:
                with model.no_sync():
                    losses.cross_entropy(model(images), labels).backward()
            losses.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    calls = Counter({event.key: event.count for event in profile.key_averages() if "allreduce" in event.key})
    return calls, pilot, sums


def main() -> None:
    dist.init_process_group("gloo")
    plain, _, expected = train(False, "chi", False)
    assert plain.total() >= STEPS, "the profiler sees DDP's collectives"
    for policy in ("chi", "ds_atgo"):
        calls, pilot, sums = train(True, policy, False)
        assert calls == plain, (calls, plain)
        seen = [None, None]
        readings = (pilot.indicators.to_lists(), pilot.neurons.widths.tolist(), pilot.indicators.network_chi.item())
        dist.all_gather_object(seen, readings)
        assert seen[0] == seen[1], seen
        assert len(set(pilot.neurons.widths.tolist())) == 6
        if policy == "chi":
            assert torch.equal(sums[0], expected[0]), "the first gradient is the same as without the pilot"
        # Coverage over both ranks: the sum of counts over the sum of neuron-steps.
        coverage = pilot.indicators.coverage
        assert ((coverage > 0) & (coverage < 1)).all()
    _, pilot, _ = train(True, "chi", True)
    assert ((pilot.indicators.firing_rate > 0) & (pilot.indicators.firing_rate < 1)).all()
    if dist.get_rank() == 0:
        print("both ranks agree", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
