"""Run on each of several ranks by test_attach_ranks.py: `chi.attach` beside the same script without it.

In every setting the weights after a few steps are the same with and without, in a group of two ranks to the last bit,
and what is measured equals a plain count over the ranks. Prints a line for each setting.
"""

import contextlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pipeline import chi
from tests.chi.attach_nets import Net, PlainCount

STEPS = 3


class Ways(nn.Module):
    """A net with a parameter that is never used, and one that is used in every other step."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.net, self.never, self.late = Net("ours"), nn.Linear(5, 5), nn.Linear(5, 5)
        if compiled:  # in forward order: a compiled pass does not show which weights feed what
            net = self.net
            for name in ("a", "norm", "first", "b", "second", "c"):
                net._modules[name] = net._modules.pop(name)

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        logits = self.net(x)
        return self.late(logits) if late else logits


class Setting:
    """One way to train on several ranks."""

    compiled: str
    late: bool
    no_sync: bool
    hook: bool
    by_hand: bool
    sharded: bool

    def __init__(self, group: dist.ProcessGroup | None, **ddp) -> None:
        self.group, self.ddp = group, ddp
        for option in ("compiled", "late", "no_sync", "hook", "by_hand", "sharded"):
            setattr(self, option, ddp.pop(option, False))

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Ways(self.compiled)  # pyright: ignore
        if not self.late:
            del model.never, model.late
        if self.by_hand:
            return model
        if self.sharded:
            fully_shard(model.net.a)
            return fully_shard(model)  # pyright: ignore
        if self.compiled == "inside":
            model = torch.compile(model, backend="aot_eager")
        ddp = DistributedDataParallel(model, process_group=self.group, **self.ddp)
        if self.hook:
            ddp.register_comm_hook(self.group, default_hooks.fp16_compress_hook)
        return torch.compile(ddp, backend="aot_eager") if self.compiled == "outside" else ddp  # pyright: ignore

    def backward(self, model: nn.Module, step: int) -> None:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        for part in range(1 + bool(self.no_sync)):
            size = 4 + 2 * dist.get_rank()  # a rank with more samples counts more
            x, y = torch.randn(size, 32, generator=generator), torch.randint(5, (size,), generator=generator)
            held = contextlib.nullcontext() if part == self.no_sync else model.no_sync()  # pyright: ignore
            with held:
                logits = model(x, late=step % 2 == 1) if self.late else model(x)
                functional.cross_entropy(logits, y).backward()
        if self.by_hand:
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad, group=self.group)
                parameter.grad /= dist.get_world_size(self.group)

    def run(self, attached: bool) -> tuple[list[Tensor], int]:
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        group = self.group or (dist.group.WORLD if self.by_hand else None)
        given = {"process_group": group} if self.by_hand else {}
        # Under a compiled pass a hook would see tracing: counted by another network.
        plain = PlainCount(model) if attached and not self.compiled else None
        pilot = chi.attach(model, optimizer, policy="fixed", **given) if attached else None  # pyright: ignore
        calls = 0
        for step in range(STEPS):
            with torch.profiler.profile() as profile:
                self.backward(model, step)
            calls += collectives(profile)
            gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            with torch.profiler.profile() as profile:
                optimizer.step()
            calls += collectives(profile)
            if pilot is not None:
                self.check(pilot, plain, gradients)
            optimizer.zero_grad()
        return [whole(parameter).detach().clone() for parameter in model.parameters()], calls

    def check(self, pilot: chi.Pilot, plain: PlainCount | None, gradients: dict[str, Tensor]) -> None:
        assert pilot.indicators is not None
        values = pilot.indicators.to_lists()
        same: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(same, (values, pilot.indicators.network_chi.item()), group=self.group)
        assert all(one == same[0] for one in same), same
        for row, layer in enumerate(pilot.layers):
            name = next(name for name in gradients if name.endswith(layer.parameters[0]))
            gradient = gradients[name].double()
            assert values["chi"][row] == (gradient != 0).sum().item() / gradient.numel(), (row, layer.parameters)
            assert abs(values["grad_norm"][row] - gradient.norm().item()) < 1e-6 * gradient.norm().item()
        if plain is not None:
            counts = torch.tensor(plain.take())
            dist.all_reduce(counts, group=self.group)
            steps, spikes, covered = counts.tolist()
            assert values["firing_rate"] == [a / b for a, b in zip(spikes, steps, strict=True)]
            assert values["coverage"] == [a / b for a, b in zip(covered, steps, strict=True)]
        else:
            assert all(0 < rate < 1 for rate in (*values["firing_rate"], *values["coverage"]))


def collectives(profile: torch.profiler.profile) -> int:
    return sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:"))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()  # pyright: ignore


def settings(world: int) -> dict[str, Callable[[], Setting]]:
    if world > 2:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine = groups[dist.get_rank() // 2]
        return {
            "DDP": lambda: Setting(None),
            "groups of two": lambda: Setting(mine),  # pyright: ignore
            "groups of two, averaged by hand": lambda: Setting(mine, by_hand=True),  # pyright: ignore
            "FSDP2": lambda: Setting(None, sharded=True),
        }
    return {
        "static graph": lambda: Setting(None, static_graph=True),
        "bucket views": lambda: Setting(None, gradient_as_bucket_view=True),
        "small buckets": lambda: Setting(None, bucket_cap_mb=0.001),
        "unused parameters": lambda: Setting(None, find_unused_parameters=True, late=True),
        "no_sync": lambda: Setting(None, no_sync=True),
        "a hook of its own": lambda: Setting(None, hook=True),
        "compiled inside": lambda: Setting(None, compiled="inside"),
        "compiled outside": lambda: Setting(None, compiled="outside"),
        "averaged by hand": lambda: Setting(None, by_hand=True),
        "FSDP2": lambda: Setting(None, sharded=True),
    }


def main() -> None:
    dist.init_process_group("gloo")
    chosen = sys.argv[1:]
    for name, make in settings(dist.get_world_size()).items():
        if chosen and name not in chosen:
            continue
        plain, before = make().run(attached=False)
        attached, after = make().run(attached=True)
        # More than two ranks are summed in an order that depends on the length of the bucket.
        eps = 0.0 if dist.get_world_size(make().group) == 2 else 1e-6
        for one, other in zip(plain, attached, strict=True):
            torch.testing.assert_close(one, other, rtol=eps, atol=eps)
        if dist.get_rank() == 0:
            print(f"{name}: {after - before} more collectives in {STEPS} steps", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
