"""What `chi.attach` cannot measure right, refused with the cure, and what it makes of the model that it is given."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.chi.attach.ranks import DdpRanks, GroupRanks, OneRank
from pipeline.config import ChiConfig
from pipeline.errors import ConfigError
from pipeline.snn.external_neurons import Steered
from pipeline.snn.networks import foreign
from pipeline.snn.networks.feeding import FedLayer
from pipeline.snn.neurons import NeuronState

_NOT_HERE = {
    "calibrate": "call pilot.calibrate(images) before the first step",
    "self_check": "it belongs to launch/train.py; leave it out",
}
"""Fields of ChiConfig that are no settings of `attach`, and what to do instead."""
_REFUSED = {
    "DataParallel": "it copies the neurons in every pass and loses their counts; use DistributedDataParallel",
    "FullyShardedDataParallel": "FSDP1 keeps gradients in flat pieces; use fully_shard (FSDP2) or "
    "DistributedDataParallel",
    "DeepSpeedEngine": "it steps by itself; use launch/train.py",
}


class Wrapped(NamedTuple):
    """A model as the script has it, taken apart."""

    network: nn.Module
    """The innermost module, with its own names."""
    ddp: DistributedDataParallel | None
    sharded: bool
    """Parameters are FSDP2's shards."""


def unwrap(model: nn.Module) -> Wrapped:
    """The network in `model`.

    Raises:
        ConfigError: no module, or a wrapper whose gradients cannot be measured.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"chi.attach: model is {_kind(model)}; use a torch.nn.Module")
    network, ddp = model, None
    while True:
        for module in network.modules():
            kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _REFUSED), None)
            if kind:
                raise ConfigError(f"chi.attach: {kind} is not allowed: {_REFUSED[kind]}")
        if isinstance(network, DistributedDataParallel):
            network, ddp = network.module, network
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner  # torch.compile's
        else:
            break
    inside = next((name for name, module in network.named_modules() if isinstance(module, DistributedDataParallel)), "")
    if inside:
        raise ConfigError(f"chi.attach: {inside} is a part that is wrapped in DistributedDataParallel; wrap the whole "
                          "model")  # fmt: skip
    return Wrapped(network, ddp, _sharded(network))


def _sharded(network: nn.Module) -> bool:
    """Whether FSDP2 shards the network: all of its trainable parameters, or none.

    Raises:
        ConfigError: some only, or by another kind of tensor parallelism.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    pieces = [name for name, parameter in named if hasattr(parameter, "placements")]
    if not pieces:
        return False
    if not any(base.__name__ == "FSDPModule" for base in type(network).__mro__):
        raise ConfigError(f"chi.attach: {pieces[0]} is a DTensor in a model that fully_shard has not wrapped; use "
                          "fully_shard(model), or DistributedDataParallel")  # fmt: skip
    whole = [name for name, parameter in named if not hasattr(parameter, "placements")]
    if whole:
        raise ConfigError(f"chi.attach: {whole[0]} is not sharded, so its gradient is another on every rank; use "
                          "fully_shard on the whole model too")  # fmt: skip
    return True


def ranks_of(wrapped: Wrapped, group: dist.ProcessGroup | None, ddp_ranks: Callable[..., DdpRanks]) -> OneRank:
    """How this model's counts are summed over ranks.

    Raises:
        ConfigError: more ranks than the model is wrapped for.
    """
    if wrapped.ddp is not None:
        return ddp_ranks(wrapped.ddp)
    if wrapped.sharded:
        mesh = next(p.device_mesh for p in wrapped.network.parameters())  # pyright: ignore[reportAttributeAccessIssue]
        if mesh.ndim > 1 and mesh.size() != dist.get_world_size():
            raise ConfigError(f"chi.attach: FSDP2's mesh of {mesh.ndim} dimensions has {mesh.size()} of "
                              f"{dist.get_world_size()} ranks; use one dimension, or all ranks")  # fmt: skip
        return GroupRanks(mesh.get_group() if mesh.ndim == 1 else None, sharded=True)
    if group is not None:
        return GroupRanks(group, sharded=False)
    alone_or_refuse()
    return OneRank()


def alone_or_refuse() -> None:
    """Raises ConfigError if this process trains together with others, which a plain module does not show."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"chi.attach: the model is a plain module in a job of {dist.get_world_size()} ranks, so every rank would "
            "steer by its own counts; attach to the DistributedDataParallel model (not to its .module, nor before "
            "wrapping), or, where the script averages gradients by itself, give process_group="
        )


def settings(given: dict[str, object], steps: int | None) -> ChiConfig:
    """The settings of `attach`, checked.

    Raises:
        ConfigError: one that does not exist here or is out of range; steps missing.
    """
    allowed = [field.name for field in dataclasses.fields(ChiConfig) if field.name not in _NOT_HERE]
    for name in given:
        if name in _NOT_HERE:
            raise ConfigError(f"chi.attach: {name} is no setting here; {_NOT_HERE[name]}")
        if name not in allowed:
            raise ConfigError(f"chi.attach: {name} is no setting; use some of {', '.join(allowed)}")
    config = ChiConfig(**given)  # pyright: ignore[reportArgumentType]
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"chi.attach: steps={steps!r} is not allowed; use the number of optimizer steps of the run")
    moves = config.policy == "schedule" or (config.policy == "chi" and config.target != config.target_end)
    if moves and steps is None:
        raise ConfigError(
            f"chi.attach: steps is missing: policy={config.policy!r} moves over the run; give the optimizer steps "
            "of the run, or a target_end equal to target"
        )
    return config


def neurons_can_be_steered(network: nn.Module, config: ChiConfig) -> None:
    """Raises ConfigError for neurons with a surrogate that is not ours, that is shared, or that has no coverage."""
    left = foreign.unsteered(network)
    if left:
        named = ", ".join(f"{name} ({what})" for name, what in left.items())
        raise ConfigError(f"chi.attach: the surrogates of {named} are not ours and cannot be steered; call "
                          "chi.prepare(model) first, or give these neurons chi.Surrogate()")  # fmt: skip
    for names in foreign.shared(network):
        raise ConfigError(f"chi.attach: {', '.join(names)} share one chi.Surrogate object, which has one width; give "
                          "each neuron its own, or call chi.prepare(model)")  # fmt: skip
    for name, module in network.named_modules():
        if config.policy == "ds_atgo" and type(module).__module__.startswith("snntorch."):
            raise ConfigError(f"chi.attach: policy ds_atgo averages over every call of the surrogate, and {name} "
                              "(snnTorch) calls it once more for the reset; use another policy")  # fmt: skip
        rule = module.rule if isinstance(module, Steered) else None
        if rule is not None and not rule.bounded and config.policy == "chi" and config.indicator == "coverage":
            raise ConfigError(f"chi.attach: coverage is undefined for the surrogate {rule.shape!r} of {name}, whose "
                              "support is unbounded; use triangle or rectangle, or policy fixed")  # fmt: skip


def optimizer_fits(optimizer: object, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, if it trains the network.

    Raises:
        ConfigError: no torch optimizer, or one without any of the network's parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ConfigError(f"chi.attach: optimizer is {_kind(optimizer)}; use a torch.optim.Optimizer (of a wrapper, "
                          "the one inside)")  # fmt: skip
    ours = {id(parameter) for parameter in network.parameters()}
    if not any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError("chi.attach: the optimizer holds none of the model's parameters; make it from "
                          "model.parameters() of this model, after wrapping or moving it")  # fmt: skip
    return optimizer


def of_these_layers(state: dict, names: tuple[str, ...]) -> None:
    """Raises ConfigError for a pilot's state of other layers; older states have no names, only their number."""
    theirs = state.get("layers")
    if theirs is None:
        count = len((state["widths"] if "widths" in state else state["controller"])["log_width"])
        theirs = list(names) if count == len(names) else [f"{count} layers"]
    if list(theirs) != list(names):
        differ = [(a, b) for a, b in itertools.zip_longest(theirs, names, fillvalue="none") if a != b]
        raise ConfigError(f"chi.attach: this state is of other spiking layers: {differ[0][0]} where the model has "
                          f"{differ[0][1]}; load it into the model that it was saved from")  # fmt: skip


def still_fits(network: nn.Module, neurons: NeuronState, parameters: dict[str, nn.Parameter], known: set[str]) -> None:
    """Raises ConfigError where the model is no longer the one that was attached to."""
    gone = sorted(known - set(parameters))
    if gone:
        raise ConfigError(f"chi.attach: {gone[0]} is gone from the model since chi.attach; attach again after changing "
                          "the model")  # fmt: skip
    measured = any(tally.any for tally in neurons.tallies)
    if not measured and not any(neuron.training for neuron in neurons.neurons):
        raise ConfigError("chi.attach: the optimizer steps, but all spiking layers are in eval mode, where nothing is "
                          "measured; call model.train() before training")  # fmt: skip


def weights_are_known(layers: list[FedLayer], neurons: NeuronState) -> None:
    """Raises ConfigError where the order of registration does not tell which weights feed which layer."""
    guessed: dict[tuple[str, ...], str] = {}
    for layer, tally in zip(layers, neurons.tallies, strict=True):
        if layer.known or not tally.any:
            continue
        other = guessed.setdefault(layer.parameters, layer.name)
        if other != layer.name:
            raise ConfigError(f"chi.attach: it cannot be told which weights feed {other} and {layer.name}: both are "
                              "registered after the same layer, and a compiled or checkpointed pass hides what it "
                              "does; register modules in forward order, or make the first step without")  # fmt: skip


def _kind(thing: object) -> str:
    return f"of type {type(thing).__name__}"
