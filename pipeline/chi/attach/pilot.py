"""χ and its control for your own training script: plain PyTorch or DistributedDataParallel.

    pilot = attach(model, optimizer, steps=num_steps)

After that every `optimizer.step()` measures the gradient it is about to use and steers the widths for the next step;
the script's loop stays as it is. Spiking layers are `snn.neurons.Neuron`, or any neuron that takes its spike from a
`snn.external_neurons.Surrogate` (SpikingJelly's neurons can). Under DDP this rank's counts are appended to the last
bucket of the gradient all-reduce, so all ranks read the same numbers and steer alike; no collective is added.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.chi.comm_hook import pack, unpack
from pipeline.chi.indicators import Indicators, gradient_sums, indicators
from pipeline.chi.widths import Widths
from pipeline.config import ChiConfig
from pipeline.errors import ConfigError
from pipeline.snn.neurons import NeuronState, bind
from pipeline.snn.sew_resnet import SpikingLayer


class Pilot:
    """Measures and steers at every optimizer step; made by `attach`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: ChiConfig, steps: int) -> None:
        network = model.module if isinstance(model, DistributedDataParallel) else model
        self.config, self.num_steps, self.step, self._network = config, steps, 0, network
        self.neurons: NeuronState = bind(network)
        """Widths and counters of the spiking layers."""
        for neuron in self.neurons.neurons:
            if config.policy == "chi" and config.indicator == "coverage" and not neuron.rule.bounded:
                raise ConfigError(f"chi.attach: coverage is undefined for the surrogate {neuron.rule.shape!r}, whose "
                                  "support is unbounded; use triangle or rectangle, or policy fixed")  # fmt: skip
        self.layers: list[SpikingLayer] = feeding_layers(network, self.neurons)
        """The spiking layers with the weights that feed them, in forward order."""
        self.indicators: Indicators | None = None
        """What the last step measured."""
        self.widths = Widths(config, self.layers, self.neurons)
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        numbers = [layer.weight.numel() for layer in self.layers]
        self._weights = torch.tensor(numbers, device=self.neurons.widths.device)
        self._reduced: Tensor | None = None
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._reduce)
        self._is_reduced = isinstance(model, DistributedDataParallel)

    def calibrate(self, images: Tensor) -> None:
        """Before the first step: sets widths that put this batch's coverage at the target, the same on every rank."""
        if self.config.policy != "chi" or self.config.indicator != "coverage":
            raise ConfigError("chi.attach: calibrate() sets coverage to its target; use it with policy chi, indicator "
                              "coverage")  # fmt: skip
        agree = (lambda widths: dist.broadcast(widths, 0)) if self._is_reduced else None
        self.widths.calibrate(self._network, images, agree)

    def state_dict(self) -> dict:
        """What the script has to save in its checkpoint, for `load_state_dict`."""
        return {"widths": self.widths.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        """Go on from another pilot's `state_dict()`: same widths, same next decision."""
        self.widths.load_state_dict(state["widths"] if "widths" in state else state["controller"] | state["neurons"])
        self.step = int(state["step"])

    def detach(self) -> None:
        """Stop measuring and steering; the widths stay. A DDP model keeps its hook, which then only averages."""
        self._hook.remove()
        self._is_reduced = False

    @torch.no_grad()
    def _before_step(self, *_) -> None:
        counts, floats, num_ranks = self._counts(), self.widths.stats.share(self.neurons.counts()), 1
        if self._is_reduced:
            if self._reduced is None:
                raise RuntimeError("chi.attach: the optimizer steps on a gradient that DDP has not reduced; leave one "
                                   "backward pass before each step outside model.no_sync()")  # fmt: skip
            limbs = 9 * len(self.layers)
            counts, floats = unpack(self._reduced[:limbs]), self._reduced[limbs:]
            num_ranks = dist.get_world_size()
        neuron_steps, spikes, covered = counts.view(3, -1)
        by_id = {id(p): gradient_sums(p.grad) for p in self._parameters if p.grad is not None}
        nothing = torch.zeros(3, dtype=torch.float64, device=counts.device)
        self.indicators = indicators(
            torch.stack([by_id.get(id(layer.weight), nothing) for layer in self.layers]),
            torch.stack([nothing, *by_id.values()])[:, 0].sum(),
            weights=self._weights,
            parameters=sum(p.numel() for p in self._parameters),
            spikes=spikes,
            covered=covered if all(neuron.rule.bounded for neuron in self.neurons.neurons) else None,
            neuron_steps=neuron_steps,
        )
        self.widths.stats.take(floats.double(), num_ranks=num_ranks, neuron_steps=neuron_steps)
        self._steer()
        self.neurons.zero_counts()
        self._reduced = None

    def _steer(self) -> None:
        self.step += 1
        assert self.indicators is not None
        self.widths.step(self.indicators, min(1.0, self.step / self.num_steps))

    # Under DDP: this rank's counts are appended to the last bucket.

    def _counts(self) -> Tensor:
        return self.neurons.counts()[:3].flatten().long()

    def _reduce(self, _, bucket) -> torch.futures.Future[Tensor]:
        gradient = bucket.buffer().div_(dist.get_world_size())
        if not (bucket.is_last() and self._is_reduced):
            return summed(gradient).then(lambda done: done.value()[0])
        tail = torch.cat((pack(self._counts()), self.widths.stats.share(self.neurons.counts())))
        size = gradient.numel()
        if gradient.dtype not in (torch.float32, torch.float64):
            # A half-precision bucket would round the counts: only in this case they get an all-reduce of their own.
            dist.all_reduce(tail)
            self._reduced = tail
            return summed(gradient).then(lambda done: done.value()[0])

        def split(done) -> Tensor:
            self._reduced = done.value()[0][size:]
            return done.value()[0][:size]

        return summed(torch.cat((gradient, tail.to(gradient)))).then(split)


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int | None = None, **settings: object
) -> Pilot:
    """Measure χ at every step of `optimizer`, and steer the widths of the model's surrogates by it.

    Args:
        model: on its device; plain, or wrapped in DistributedDataParallel (before its first backward pass).
        optimizer: a torch optimizer; each `step()` measures first.
        steps: optimizer steps in the run, over which a moving target or schedule is spread. None only where nothing
            moves (`target_end` equal to `target`, policy not schedule).
        settings: fields of `pipeline.config.ChiConfig`: policy, indicator, target, target_end, eta, interval, …

    Returns:
        The pilot: `.indicators` of the last step, `.neurons.widths`, `state_dict()`.

    Raises:
        ConfigError: a setting that does not exist or is out of range; steps missing; a sharded model.
        ValueError: the model has no spiking layer that can be steered.
    """
    if type(model).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine") or hasattr(model, "unshard"):
        raise ConfigError(f"chi.attach: {type(model).__name__} keeps gradients in pieces; use a plain module or "
                          "DistributedDataParallel, or for DeepSpeed launch/train.py")  # fmt: skip
    try:
        config = ChiConfig(**settings)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise ConfigError(f"chi.attach: {error}; use the fields of pipeline.config.ChiConfig") from None
    moves = config.policy == "schedule" or (config.policy == "chi" and config.target != config.target_end)
    if moves and steps is None:
        raise ConfigError(
            f"chi.attach: steps is missing: policy={config.policy!r} moves over the run; give the optimizer steps "
            "of the run, or a target_end equal to target"
        )
    return Pilot(model, optimizer, config, steps or 1)


def summed(tensor: Tensor) -> torch.futures.Future:
    """Starts the all-reduce of `tensor`; its future."""
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    return work.get_future()


def feeding_layers(network: nn.Module, neurons: NeuronState) -> list[SpikingLayer]:
    """Every spiking layer with the weight that feeds it: the network's own list, or the nearest one before it.

    "Before" is in the order of registration. The weight is a convolution's or linear layer's, the norm a BatchNorm2d.
    """
    if hasattr(network, "spiking_layers"):
        return list(network.spiking_layers())  # pyright: ignore
    layers, weight, norm = [], None, None
    names = {id(neuron): name for name, neuron in zip(neurons.names, neurons.neurons, strict=True)}
    for module in network.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            weight, norm = module.weight, None
        elif isinstance(module, nn.BatchNorm2d):
            norm = module
        elif id(module) in names:
            if weight is None:
                raise ValueError(f"chi.attach: no weights feed {names[id(module)]}: no convolution or linear layer is "
                                 "registered before it; register modules in forward order")  # fmt: skip
            layers.append(SpikingLayer(names[id(module)], module, weight, norm))  # pyright: ignore
    return layers
