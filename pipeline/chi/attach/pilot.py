"""χ and its control for your own training script: plain PyTorch, DistributedDataParallel or FSDP2.

    pilot = attach(model, optimizer, steps=num_steps)

After that every `optimizer.step()` measures the gradient it is about to use and steers the widths for the next step;
the script's loop stays as it is. Spiking layers are `snn.neurons.Neuron`, or any neurons that take their spike from a
`snn.external_neurons.Surrogate` (`prepare` gives one to those of other libraries).
"""

import functools
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.chi.async_read import Constants
from pipeline.chi.attach import checks
from pipeline.chi.attach.ranks import DdpRanks, OneRank
from pipeline.chi.comm_hook import Share
from pipeline.chi.indicators import Indicators, indicators, sums_of_each
from pipeline.chi.widths import Widths
from pipeline.config import ChiConfig
from pipeline.errors import ConfigError
from pipeline.snn.networks.feeding import FedLayer, fed_layers
from pipeline.snn.neurons import NeuronState, bind

_MISSED = 3
"""Steps that another optimizer may make on our parameters without one of ours."""


class Pilot:
    """Measures and steers at every optimizer step; made by `attach`."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, config: ChiConfig, steps: int, ranks: OneRank
    ) -> None:
        self.config, self.num_steps, self.step = config, steps, 0
        self.neurons: NeuronState = bind(network)
        """Widths and counters of the spiking layers."""
        self.layers: list[FedLayer] = fed_layers(network, self.neurons)
        """The spiking layers with the weights that feed them, in forward order."""
        self.indicators: Indicators | None = None
        """What the last step measured; NaN for a layer that got no gradient."""
        self.widths = Widths(config, self.layers, self.neurons)
        self._network, self._optimizer, self._ranks = network, optimizer, ranks
        self._known = set(dict(network.named_parameters()))
        self._weights, self._rows = (Constants(self.neurons.widths.device) for _ in range(2))
        self._measured = self._told = self._stepping = False
        self._missed = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        optimizer.zero_grad = self._forgetting(optimizer.zero_grad)
        if not ranks.sharded:  # FSDP2's gradients are those of other tensors within a pass
            for neuron in self.neurons.neurons:
                neuron.on_pass = self._forget_cleared
        if isinstance(ranks, DdpRanks):
            ranks.share, ranks.may_be_early = self._share, self._was_compiled

    def calibrate(self, images: Tensor) -> None:
        """Before the first step: sets widths that put this batch's coverage at the target, the same on every rank.

        It runs `network(images)` once, in training mode; statistics of batch normalisation are put back. Reset the
        state of neurons that keep one (SpikingJelly's) afterwards. snnTorch's neurons call their surrogate once more
        for the reset; there the first coverage comes near the target, not to it.
        """
        if self.config.policy != "chi" or self.config.indicator != "coverage":
            raise ConfigError("chi.attach: calibrate() sets coverage to its target; use it with policy chi, indicator "
                              "coverage")  # fmt: skip
        self.widths.calibrate(self._network, images, self._ranks.agree)

    def state_dict(self) -> dict:
        """What the script has to save in its checkpoint, for `load_state_dict`."""
        return {"widths": self.widths.state_dict(), "step": self.step, "layers": list(self.neurons.names)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from another pilot's `state_dict()`: same widths, same next decision.

        Raises:
            ConfigError: it is of other layers; nothing has changed then.
        """
        checks.of_these_layers(state, self.neurons.names)
        self.widths.load_state_dict(state["widths"] if "widths" in state else state["controller"] | state["neurons"])
        self.step = int(state["step"])

    def detach(self) -> None:
        """Stop measuring and steering; the widths stay. A DDP model keeps its hook, which then only averages."""
        for handle in self._handles:
            handle.remove()
        self._optimizer.__dict__.pop("zero_grad", None)
        for neuron in self.neurons.neurons:
            neuron.release()
        if isinstance(self._ranks, DdpRanks):
            self._ranks.share = None
        _live.discard(self)
        for key in (self._network, self._optimizer):
            _pilots.pop(key, None)

    # Around optimizer.step: measure the gradient that it uses, then steer.

    def _before_step(self, _, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._stepping = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._measure()
            return None

        def measured(*given, **named) -> object:
            loss = closure(*given, **named)
            self._measure()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": measured}
        return (args[0], measured, *args[2:]), kwargs  # pyright: ignore

    def _after_step(self, *_) -> None:
        self._stepping = False
        self._missed = 0
        if not self._measured:
            return
        self._measured = False
        self.step += 1
        assert self.indicators is not None
        self.widths.step(self.indicators, min(1.0, self.step / self.num_steps))
        if not self._told:
            self._tell_unread()

    @torch.no_grad()
    def _measure(self) -> None:
        """Reads the gradient and the counts of this step, over all ranks."""
        parameters = dict(self._network.named_parameters())
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if all(parameter.grad is None for parameter in trained.values()):
            return  # a step before the first backward pass, which changes nothing
        if self._measured and not any(tally.any for tally in self.neurons.tallies):
            return  # a step within a step: of an optimizer that calls its base class's
        checks.still_fits(self._network, self.neurons, parameters, self._known)
        if type(self._ranks) is OneRank:
            checks.alone_or_refuse()
        if isinstance(self._ranks, DdpRanks):
            self._ranks.refuse_join()
        if self._was_compiled() and self.config.policy == "ds_atgo":
            raise ConfigError("chi.attach: policy ds_atgo looks into the neurons, which a compiled model does not "
                              "allow; use another policy, or no torch.compile")  # fmt: skip
        checks.weights_are_known(self.layers, self.neurons)
        sums, share = self._ranks.total(self._gradient(trained), self._share())
        neuron_steps, spikes, covered = share.counts.view(3, -1).double()
        # A step that a fused optimizer leaves out measures nothing. Only the device knows.
        neuron_steps = torch.where(sums[-1, 0].isnan(), float("nan"), neuron_steps)
        # Neurons that got no gradient: nor did their weights by them, whichever they are.
        sums[:-1] = torch.where(neuron_steps[:, None] > 0, sums[:-1], float("nan"))
        weights = [sum(parameters[name].numel() for name in layer.parameters) for layer in self.layers]
        self.indicators = indicators(
            sums[:-1],
            sums[-1, 0],
            weights=self._weights(weights),
            parameters=sum(parameter.numel() for parameter in trained.values()),
            spikes=spikes,
            covered=covered if all(neuron.rule.bounded for neuron in self.neurons.neurons) else None,
            neuron_steps=neuron_steps,
        )
        self.widths.stats.take(share.floats.double(), num_ranks=self._ranks.count, neuron_steps=neuron_steps)
        for layer, tally in zip(self.layers, self.neurons.tallies, strict=True):
            if tally.any:
                layer.settle()
        self.neurons.zero_counts()
        self._measured = True

    def _gradient(self, trained: dict[str, nn.Parameter]) -> Tensor:
        """`(L + 1, 3)` float64, sums of every layer's gradient and of all: NaN for layers without one; unscaled."""
        gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
        names, each = list(gradients), sums_of_each([own_part(gradient) for gradient in gradients.values()])
        # Layers by rows of `each`; shorter ones end in a row of zeros, and one without a gradient is a row of NaN.
        zeros, nan = len(names), len(names) + 1
        row_of = {name: row for row, name in enumerate(names)}
        rows = [[row_of[name] for name in layer.parameters if name in row_of] or [nan] for layer in self.layers]
        longest = max(map(len, rows))
        index = self._rows([row for of_layer in rows for row in (*of_layer, *[zeros] * (longest - len(of_layer)))])
        table = torch.cat((each, each.new_zeros(1, 3), each.new_full((1, 3), float("nan"))))
        sums = torch.cat((table[index].view(len(rows), longest, 3).sum(1), each.sum(0)[None]))
        # A fused optimizer unscales by itself, and skips the step where the GradScaler found an overflow.
        scale, overflow = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            inverse = scale.double().reciprocal()
            sums = sums * torch.stack((torch.ones_like(inverse), inverse, inverse.square()))
        return sums if overflow is None else torch.where(overflow > 0, float("nan"), sums)

    def _share(self) -> Share:
        counts = self.neurons.counts()
        return Share(counts=counts[:3].flatten().long(), floats=self.widths.stats.share(counts))

    def _was_compiled(self) -> bool:
        return any(neuron.traced for neuron in self.neurons.neurons)

    # What goes on beside the steps.

    def _forgetting(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        """`zero_grad` that throws away the counts of the gradient too: that of a step which a GradScaler left out."""

        def forgetting(*args, **kwargs) -> None:
            self._stepping = False  # of a step that has ended in an error
            self._forget()
            zero_grad(*args, **kwargs)

        return forgetting

    def _forget_cleared(self) -> None:
        """At the start of a pass: throws away the counts of a gradient that was cleared by `model.zero_grad()`."""
        is_repeated = torch._C._current_graph_task_id() != -1  # by a checkpoint, within a backward pass
        if not is_repeated and all(parameter.grad is None for parameter in self._network.parameters()):
            self._forget()

    def _forget(self) -> None:
        self.neurons.zero_counts()
        self._ranks.forget()

    def notice(self, other: torch.optim.Optimizer) -> None:
        """Before a step of any optimizer: raises RuntimeError if others train our parameters in the place of ours."""
        if other is self._optimizer or self._stepping:
            return
        ours = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in ours for group in other.param_groups for parameter in group["params"]):
            return
        self._missed += 1
        if self._missed >= _MISSED:
            self._missed = 0
            raise RuntimeError(f"chi.attach: another optimizer ({type(other).__name__}) has made {_MISSED} steps on "
                               "these parameters, and the one that was attached none, so nothing was measured; attach "
                               "to the optimizer that makes the steps")  # fmt: skip

    def _tell_unread(self) -> None:
        """Says once which layers will not be steered; the host waits for it."""
        assert self.indicators is not None
        if self.indicators.network_chi.isnan():
            return  # the step was left out
        self._told = True
        without = getattr(self.indicators, self.config.indicator).isnan().tolist()
        names = [layer.name for layer, missing in zip(self.layers, without, strict=True) if missing]
        if names and self.config.policy == "chi":
            warnings.warn(
                f"chi.attach: no reading of {self.config.indicator} for {', '.join(names)}: no gradient reached these "
                "neurons in the first step (frozen, detached, in eval mode, or not used); their widths stay as they "
                "are until one does",
                stacklevel=4,
            )


def own_part(gradient: Tensor) -> Tensor:
    """What this rank counts of a gradient: all of it, the values of a sparse one, or its shard."""
    if gradient.is_sparse:
        return gradient.coalesce().values()
    if not hasattr(gradient, "placements"):
        return gradient
    shard: Tensor = gradient.to_local()  # pyright: ignore
    place = gradient.device_mesh.get_coordinate()  # pyright: ignore[reportAttributeAccessIssue]
    # Ranks that hold the same shard: the first of them counts it.
    copies = zip(place, gradient.placements, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    first = all(at == 0 for at, placement in copies if placement.is_replicate())
    return shard if first else shard[:0]


_pilots: "weakref.WeakKeyDictionary[object, weakref.ref[Pilot]]" = weakref.WeakKeyDictionary()
"""The pilot of each network and of each optimizer; their hooks keep it alive."""
_live: "weakref.WeakSet[Pilot]" = weakref.WeakSet()
_hooked: "weakref.WeakKeyDictionary[DistributedDataParallel, DdpRanks]" = weakref.WeakKeyDictionary()
"""A DDP model takes one hook in its life: the next pilot takes it over."""


@functools.cache
def _watch_optimizers() -> None:
    """From the first call on, every optimizer's step is shown to all pilots."""

    def show(optimizer: torch.optim.Optimizer, *_) -> None:
        for pilot in tuple(_live):
            pilot.notice(optimizer)

    register_optimizer_step_pre_hook(show)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    **settings: object,
) -> Pilot:
    """Measure χ at every step of `optimizer`, and steer the widths of the model's surrogates by it.

    Attached again to the same model or optimizer, the new pilot replaces the old one, with a warning, and starts from
    its widths.

    Args:
        model: on its device; plain, compiled, wrapped in DistributedDataParallel (before its first backward pass), or
            sharded by fully_shard (FSDP2).
        optimizer: a torch optimizer; each `step()` measures first.
        steps: optimizer steps in the run, over which a moving target or schedule is spread. None only where nothing
            moves (`target_end` equal to `target`, policy not schedule).
        process_group: the ranks whose gradients the script averages by itself. Not for DDP and FSDP2, which have one.
        settings: fields of `pipeline.config.ChiConfig`: policy, indicator, target, target_end, eta, interval, …

    Returns:
        The pilot: `.indicators` of the last step, `.neurons.widths`, `state_dict()`.

    Raises:
        ConfigError: a setting that does not exist or is out of range; steps missing; a model or an optimizer whose
            numbers would be wrong.
        ValueError: the model has no spiking layer that can be steered.
    """
    config = checks.settings(settings, steps)
    wrapped = checks.unwrap(model)
    checks.neurons_can_be_steered(wrapped.network, config)
    checks.optimizer_fits(optimizer, wrapped.network)
    ranks = checks.ranks_of(
        wrapped, process_group, lambda ddp: _hooked.get(ddp) or _hooked.setdefault(ddp, DdpRanks(ddp))
    )
    for key in (wrapped.network, optimizer):
        old = _pilots[key]() if key in _pilots else None
        if old is not None:
            old.detach()
            warnings.warn("chi.attach: this model or optimizer had a pilot already; it is replaced, and the new one "
                          "starts from its widths", stacklevel=2)  # fmt: skip
    pilot = Pilot(wrapped.network, optimizer, config, steps or 1, ranks)
    _watch_optimizers()
    _live.add(pilot)
    _pilots[wrapped.network] = _pilots[optimizer] = weakref.ref(pilot)
    return pilot
