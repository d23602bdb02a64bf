"""`chi.attach` in every way people write a training step, for every kind of neurons: equal to a plain count."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from pipeline import chi
from tests.chi.attach_nets import KINDS, Net, PlainCount

STEPS, BATCH, SCALE = 3, 12, 1024.0


def batch(step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(BATCH, 32, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def loss_of(model: nn.Module, step: int, part: int = 0) -> Tensor:
    x, y = batch(step, part)
    return functional.cross_entropy(model(x), y)


class Script:
    """A training script, and what its gradients were in each step."""

    def __init__(self, kind: str, **optimizer) -> None:
        torch.manual_seed(1)
        self.net = Net(kind)
        self.edit()
        self.plain = PlainCount(self.net)
        self.optimizer = self.optimizer_of(**optimizer)
        self.gradients: list[dict[str, Tensor]] = []
        self.scale = 1.0

    def edit(self) -> None:
        """Changes the network before training."""

    def optimizer_of(self, **settings) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, **settings)

    def keep(self) -> None:
        """What the optimizer is about to use."""
        named = self.net.named_parameters()
        self.gradients.append({name: p.grad.double() / self.scale for name, p in named if p.grad is not None})

    def step(self, step: int) -> None:
        self.clear()
        self.backward(step)
        self.keep()
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, step: int) -> None:
        loss_of(self.net, step).backward()


class Accumulation(Script):
    def backward(self, step: int) -> None:
        for part in range(3):
            (loss_of(self.net, step, part) / 3).backward()


class ClearedByTheModel(Accumulation):
    """A gradient of other losses is thrown away before each step, by the model's own way; blocks are checkpointed."""

    def clear(self) -> None:
        loss_of(self.net, 70).backward()
        self.plain.take()
        self.net.zero_grad()

    def backward(self, step: int) -> None:
        x, y = batch(step)
        for _ in range(2):
            functional.cross_entropy(checkpoint(self.net, x.requires_grad_(), use_reentrant=False), y).backward()  # pyright: ignore


class Checkpointed(Script):
    reentrant = False

    def backward(self, step: int) -> None:
        x, y = batch(step)
        logits = checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)
        functional.cross_entropy(logits, y).backward()  # pyright: ignore[reportArgumentType]


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Autocast(Script):
    def backward(self, step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.net, step)
        loss.backward()


class Scaled(Script):
    """GradScaler; its first step overflows and is left out."""

    def __init__(self, kind: str, **optimizer) -> None:
        super().__init__(kind, **optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def step(self, step: int) -> None:
        if step == 0:
            self.optimizer.zero_grad()
            self.scaler.scale(loss_of(self.net, 77) * float("inf")).backward()
            self.plain.take()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.clear()
        self.scaler.scale(loss_of(self.net, step)).backward()
        self.scale = self.scaler.get_scale()
        self.keep()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class ScaledFused(Scaled):
    def __init__(self, kind: str) -> None:
        super().__init__(kind, fused=True)


class ScaledByTheModel(Scaled):
    def clear(self) -> None:
        for parameter in self.net.parameters():
            parameter.grad = None


class Closure(Script):
    def step(self, step: int) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.net, step)
            loss.backward()
            self.keep()
            return loss

        self.optimizer.step(closure)  # pyright: ignore


class ClosureByName(Closure):
    def optimizer_of(self, **settings) -> torch.optim.Optimizer:
        class Named(torch.optim.SGD):
            def step(self, closure=None):
                return super().step(closure=closure)

        return Named(self.net.parameters(), lr=0.1)


class Lbfgs(Closure):
    """Several closures a step: the last one is measured."""

    def optimizer_of(self, **settings) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)

    def step(self, step: int) -> None:
        before = len(self.gradients)
        kept = self.plain.take

        def closure() -> Tensor:
            kept()
            self.optimizer.zero_grad()
            loss = loss_of(self.net, step)
            loss.backward()
            self.keep()
            return loss

        self.optimizer.step(closure)  # pyright: ignore
        assert len(self.gradients) > before + 1
        self.gradients[before:] = self.gradients[-1:]


class WeightNorm(Script):
    def edit(self) -> None:
        self.net.b = nn.utils.parametrizations.weight_norm(self.net.b)  # pyright: ignore


class OldWeightNorm(Script):
    def edit(self) -> None:
        self.net.b = nn.utils.weight_norm(self.net.b)  # pyright: ignore[reportDeprecated]


class Frozen(Script):
    """The first layer does not train, so no gradient reaches its neurons."""

    def edit(self) -> None:
        for module in (self.net.a, self.net.norm):
            module.requires_grad_(False)


class SharedWeight(Script):
    """Both layers are fed by one weight."""

    def edit(self) -> None:
        self.net.b.weight = self.net.a.weight


class OtherForwards(Script):
    """Passes in training mode that have no backward pass: accuracy on a batch, a teacher, a gradient for the input."""

    def backward(self, step: int) -> None:
        with torch.no_grad():
            loss_of(self.net, 50)
        loss_of(self.net, 51)
        x, y = batch(step, 5)
        torch.autograd.grad(functional.cross_entropy(self.net(x.requires_grad_()), y), x)
        self.plain.take()
        super().backward(step)


class Averaged(Script):
    """An averaged copy, evaluated in each step."""

    def step(self, step: int) -> None:
        if step == 0:
            self.average = AveragedModel(self.net)
        loss_of(self.average, 60).backward()
        self.plain.take()  # whose hooks were copied too
        super().step(step)
        self.average.update_parameters(self.net)


class LateParameters(Script):
    """A parameter that gets a gradient in some steps only, and one that never does."""

    def edit(self) -> None:
        self.net.never, self.net.late = nn.Linear(5, 5), nn.Linear(5, 5)

    def backward(self, step: int) -> None:
        x, y = batch(step)
        logits = self.net(x)
        functional.cross_entropy(self.net.late(logits) if step == 1 else logits, y).backward()  # pyright: ignore


class Groups(Script):
    def optimizer_of(self, **settings) -> torch.optim.Optimizer:
        last = list(self.net.c.parameters())
        rest = [p for p in self.net.parameters() if not any(p is q for q in last)]
        return torch.optim.AdamW([{"params": rest, "lr": 1e-3}, {"params": last, "lr": 1e-2}])


SCRIPTS: dict[str, Callable[[str], Script]] = {
    "plain": Script,
    "accumulation": Accumulation,
    "model.zero_grad": ClearedByTheModel,
    "checkpoint": Checkpointed,
    "checkpoint, reentrant": CheckpointedReentrant,
    "autocast bf16": Autocast,
    "GradScaler": Scaled,
    "GradScaler, fused": ScaledFused,
    "GradScaler, grad = None": ScaledByTheModel,
    "fused": functools.partial(Script, fused=True),
    "closure": Closure,
    "closure by name": ClosureByName,
    "LBFGS": Lbfgs,
    "weight_norm": WeightNorm,
    "weight_norm, old": OldWeightNorm,
    "frozen": Frozen,
    "shared weight": SharedWeight,
    "other forwards": OtherForwards,
    "AveragedModel": Averaged,
    "late parameters": LateParameters,
    "param groups": Groups,
}
FED_BY = {
    "weight_norm": ("b.parametrizations.weight.original0", "b.parametrizations.weight.original1"),
    "weight_norm, old": ("b.weight_g", "b.weight_v"),
    "shared weight": ("a.weight",),
}


@pytest.mark.filterwarnings("ignore:chi.attach. no reading", "ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_measured_equals_a_plain_count(name: str, kind: str):
    script = SCRIPTS[name](kind)
    pilot = chi.attach(script.net, script.optimizer, policy="fixed")
    for step in range(STEPS):
        script.step(step)
        assert pilot.indicators is not None
        neuron_steps, spikes, covered = script.plain.take()
        gradient = script.gradients[step]
        feeds = (("a.weight",), FED_BY.get(name, ("b.weight",)))
        for row, (names, steps) in enumerate(zip(feeds, neuron_steps, strict=True)):
            found = {key: values[row].item() for key, values in vars_of(pilot).items()}
            if name == "frozen" and row == 0:
                assert all(torch.tensor(list(found.values())).isnan()), found
                continue
            assert pilot.layers[row].parameters == names
            assert steps > 0
            assert found["coverage"] == covered[row] / steps
            assert found["firing_rate"] == spikes[row] / steps
            parts = torch.cat([gradient[part].flatten() for part in names])
            assert found["chi"] == (parts != 0).sum().item() / len(parts)
            spread = parts.abs().sum() ** 2 / (len(parts) * parts.square().sum())
            assert found["participation"] == pytest.approx(spread.item(), rel=1e-6)
            assert found["grad_norm"] == pytest.approx(parts.norm().item(), rel=1e-6)
        trained = sum(p.numel() for p in script.net.parameters() if p.requires_grad)
        nonzero = sum(int((g != 0).sum()) for g in gradient.values())
        assert pilot.indicators.network_chi.item() == nonzero / trained
    assert pilot.step == STEPS + (name == "GradScaler, fused")  # it is called to leave a step out


def vars_of(pilot: chi.Pilot) -> dict[str, Tensor]:
    assert pilot.indicators is not None
    names = ("chi", "participation", "coverage", "firing_rate", "grad_norm")
    return {name: getattr(pilot.indicators, name) for name in names}
