"""Neurons of other libraries in a model: which there are, and our surrogate in the place of theirs.

    SpikingJelly   a neuron holds a surrogate module:      surrogate_function(h - v_th)
    snnTorch       a neuron holds a function:              spike_grad(h - v_th)
    norse          a cell's step calls by a global name:   threshold(h - v_th, method, alpha)

They are known by the names of their classes: none of these libraries is imported here.
"""

import dis
import logging
import math
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import ConfigError, first_line
from pipeline.snn.external_neurons import Steered, Surrogate
from pipeline.snn.surrogate import SCALES, SHAPES

log = logging.getLogger(__name__)

_KNOWN = {
    "spikingjelly": "IFNode LIFNode ParametricLIFNode QIFNode EIFNode IzhikevichNode KLIFNode CUBALIFNode GatedLIFNode "
    "ComplementaryLIFNode SimpleIFNode SimpleLIFNode PSN MaskedPSN SlidingPSN SLTTLIFNode",
    "snntorch": "Leaky Synaptic Lapicque Alpha RLeaky RSynaptic SLSTM SConv2dLSTM LeakyParallel StateLeaky LinearLeaky "
    "AssociativeLeaky DeltaLeaky",
}
"""Classes whose spikes are the surrogate of h - v_th, called once a time step; a user's subclasses of them too."""
_NO_STEP = ("MultiLevelSpikeCount", "PoissonPass", "DeterministicPass")
"""SpikingJelly's surrogates of something else than a step."""


@dataclass(slots=True)
class Found:
    """A neuron of another library whose surrogate is not ours."""

    name: str
    module: nn.Module
    attribute: str
    """Where the module holds its surrogate."""
    what: str
    """Its surrogate, for a message."""
    problem: str = ""
    """Why it cannot take ours, and the cure; empty where it can."""


class Step(nn.Module):
    """The step function of a norse cell with our surrogate for its threshold function; `sparse` is for sparse input."""

    def __init__(self, function: types.FunctionType, sparse: types.FunctionType | None, surrogate: Surrogate) -> None:
        super().__init__()
        self.surrogate, self._functions = surrogate, (function, sparse)
        self._bind()

    def _bind(self) -> None:
        # Here, and not in forward: torch.compile cannot trace it. By way of self: a copy calls its own surrogate.
        def threshold(u: torch.Tensor, *_, **__) -> torch.Tensor:
            return self.surrogate(u)

        self._ours = tuple(theirs and _with_threshold(theirs, threshold) for theirs in self._functions)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_ours"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._bind()

    def forward(self, *args):
        dense, sparse = self._ours
        step = sparse if sparse is not None and args[0].is_sparse else dense
        return step(*args)  # pyright: ignore[reportOptionalCall]


def _with_threshold(theirs: types.FunctionType, threshold: Callable) -> types.FunctionType:
    names = {**theirs.__globals__, "threshold": threshold}
    ours = types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return ours


def prepare(model: nn.Module, shape: str = "triangle", scale: str = "area", width: float = 1.0) -> dict[str, str]:
    """Gives every neuron of SpikingJelly, snnTorch and norse in `model` a `Surrogate` of its own, for `attach`.

    The model's parameters and the names in its state dict stay as they are. A second call changes nothing. A
    `Surrogate` object that several neurons share becomes one for each.

    Args:
        model: also wrapped in DistributedDataParallel, or by torch.compile.
        shape, scale, width: of every surrogate, as in `Surrogate`.

    Returns:
        What was replaced, by the name of the neuron.

    Raises:
        ConfigError: a wrong argument; a neuron that cannot take our surrogate, or none at all. The model is then
            unchanged.
    """
    _check(model, shape, scale, width)
    found = _find(model)
    problems = [
        f"{one.name or 'the model'} ({type(one.module).__name__}): {one.problem}" for one in found if one.problem
    ]
    if problems:
        raise ConfigError(f"chi.prepare: these neurons cannot take our surrogate, and nothing was changed: "
                          f"{'; '.join(problems)}")  # fmt: skip
    groups = _shared(model)
    if not found and not any(isinstance(module, Steered) for module in model.modules()):
        raise ConfigError("chi.prepare: the model has no neurons of SpikingJelly, snnTorch or norse; give neurons of "
                          "your own chi.Surrogate() and call it on h - v_th")  # fmt: skip
    changes = {}
    for one in found:
        ours = Surrogate(shape, scale, width)
        place: nn.Module = ours
        if one.attribute == "activation":
            place = Step(one.module.activation, one.module.activation_sparse, ours)  # pyright: ignore
            one.module.activation_sparse = None  # pyright: ignore
        ours.train(one.module.training)
        setattr(one.module, one.attribute, place)
        changes[one.name] = f"{one.what} → {shape}, width {width:g}"
    for holders in groups:
        for name, holder, attribute in holders[1:]:
            old = getattr(holder, attribute)
            ours = Surrogate(old.rule.shape, old.rule.scale, old.width).train(holder.training)
            setattr(holder, attribute, ours)
            changes[name] = f"a chi.Surrogate shared with {holders[0][0]} → its own"
    for name, change in changes.items():
        log.info("chi.prepare: %s: %s", name, change)
    return changes


def _check(model: object, shape: str, scale: str, width: float) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"chi.prepare: model is a {type(model).__name__}; use a torch.nn.Module")
    for name, got, allowed in (("shape", shape, SHAPES), ("scale", scale, SCALES)):
        if got not in allowed:
            raise ConfigError(f"chi.prepare: {name}={got!r} is not allowed; use one of {', '.join(allowed)}")
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not (math.isfinite(width) and width > 0):
        raise ConfigError(f"chi.prepare: width={width!r} is not allowed; use a number above 0")


def give_dimension(model: nn.Module) -> None:
    """Gives parameters without dimension of these libraries' neurons the shape (1,): DeepSpeed sends no others."""
    for module in model.modules():
        if library_of(module):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 0:
                    module._parameters[name] = nn.Parameter(parameter.detach().view(1), parameter.requires_grad)


def evaluate(model: nn.Module) -> None:
    """`model.eval()`, in which all neurons call their surrogate: some of SpikingJelly's call another step function in
    evaluation mode, which is all that their mode changes in a pass without gradient."""
    model.eval()
    for module in model.modules():
        step = getattr(module, "single_step_functional_forward", None)
        if library_of(module) == "spikingjelly" and step is not None and "heaviside" in step.__code__.co_names:
            module.training = True


def unsteered(model: nn.Module) -> dict[str, str]:
    """Neurons of these libraries in `model` whose surrogate is not ours: name → its surrogate."""
    return {one.name: one.what for one in _find(model)}


def shared(model: nn.Module) -> list[list[str]]:
    """Names of the neurons that hold one and the same `Surrogate` object, for each such object."""
    return [[name for name, *_ in holders] for holders in _shared(model)]


def _shared(model: nn.Module) -> list[list[tuple[str, nn.Module, str]]]:
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, child in module._modules.items():
            if isinstance(child, Surrogate):
                holders.setdefault(id(child), []).append((name, module, attribute))
    return [group for group in holders.values() if len(group) > 1]


def _find(model: nn.Module) -> list[Found]:
    """The neurons whose surrogate is not ours, in the order of the modules."""
    found = []
    for name, module in model.named_modules():
        library = library_of(module)
        for attribute, child in module._modules.items():
            if child is not None and _is_spikingjelly_surrogate(child):
                problem = _spikingjelly_problem(module, child) if library else _no_step(child)
                found.append(Found(name, module, attribute, _described(child), problem))
        if _is_snntorch_s(module, library):
            function = getattr(module, "spike_grad")  # noqa: B009
            problem = _snntorch_problem(module) if library else ""
            found.append(Found(name, module, "spike_grad", _function(function), problem or _no_step(function)))
        elif library == "norse" and _method(getattr(module, "p", None)):
            step = getattr(module, "activation", None)
            if not isinstance(step, Step):
                found.append(Found(name, module, "activation", _method(module.p), _norse_problem(module)))  # pyright: ignore
        elif _spikes_without(module, library):
            found.append(Found(name, module, "", "a rule of its own", "its spikes come from no surrogate function that "
                               "could be replaced; use another neuron"))  # fmt: skip
    return found


def library_of(module: nn.Module) -> str:
    """The library that a module's class, or a base class, comes from; empty for others."""
    roots = (base.__module__.split(".")[0] for base in type(module).__mro__)
    return next((root for root in roots if root in ("spikingjelly", "snntorch", "norse")), "")


def _is_snntorch_s(module: nn.Module, library: str) -> bool:
    """Whether a module takes its spikes from a `spike_grad` that is not ours: snnTorch's, or one like them."""
    function = getattr(module, "spike_grad", None)
    if not callable(function) or (isinstance(function, nn.Module) and _is_ours_or_spikingjelly_s(function)):
        return False
    if library == "snntorch":
        silent = any(base.__name__ == "StateLeaky" for base in type(module).__mro__) and not module.output
        return not silent
    return str(getattr(function, "__module__", "")).startswith("snntorch.")


def _is_ours_or_spikingjelly_s(surrogate: nn.Module) -> bool:
    return isinstance(surrogate, Surrogate) or _is_spikingjelly_surrogate(surrogate)


def _is_known(module: nn.Module, library: str) -> bool:
    theirs = next(base for base in type(module).__mro__ if base.__module__.split(".")[0] == library)
    return theirs.__name__ in _KNOWN[library].split()


def _is_spikingjelly_surrogate(module: nn.Module) -> bool:
    return any(base.__name__ == "SurrogateFunctionBase" for base in type(module).__mro__) and not isinstance(
        module, Surrogate
    )


def _spikes_without(module: nn.Module, library: str) -> bool:
    """Whether a module is one of SpikingJelly's neurons that has no surrogate at all."""
    if library != "spikingjelly" or "NonSpiking" in type(module).__name__:
        return False
    own = next(base for base in type(module).__mro__ if base.__module__.startswith("spikingjelly"))
    held = any(isinstance(child, Surrogate) or _is_spikingjelly_surrogate(child) for child in module.children())
    return ".neuron" in own.__module__ and own.__name__.endswith("Node") and not held


def _spikingjelly_problem(module: nn.Module, surrogate: nn.Module) -> str:
    if library_of(module) == "spikingjelly" and not _is_known(module, "spikingjelly"):
        return (
            f"its spikes are not one surrogate of h - v_th a time step; use {_KNOWN['spikingjelly'].split()[0]} or kin"
        )
    backend = getattr(module, "backend", "torch")
    if backend != "torch":
        return f"backend {backend!r} has kernels for the library's own surrogates only; use backend='torch'"
    if getattr(module, "_neuron_precision", None) is not None:
        return "its explicit neuron precision takes the library's own surrogates only; leave the precision out"
    return _no_step(surrogate)


def _no_step(surrogate: Callable) -> str:
    if any(base.__name__ in _NO_STEP for base in type(surrogate).__mro__):
        return f"{type(surrogate).__name__} is no step function; use one, such as surrogate.ATan()"
    if not getattr(surrogate, "spiking", True):
        return "its surrogate has spiking=False, so it does not spike; use spiking=True"
    if isinstance(surrogate, nn.Module) and (held := list(surrogate.state_dict())):
        return f"its surrogate keeps {', '.join(held)} in the state dict, and ours keeps nothing; use fixed numbers"
    u = torch.linspace(-2, 2, 64)  # without 0, where the libraries differ
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            spikes = surrogate(u)
    except Exception as error:  # whatever a user's function may raise
        return f"its surrogate does not answer to u from -2 to 2 ({first_line(error)}); use one that does"
    if not (isinstance(spikes, torch.Tensor) and torch.equal(spikes, (u > 0).to(spikes.dtype))):
        return "its surrogate is no step function: it gives more than 0 below the threshold and 1 above"
    return ""


def _snntorch_problem(module: nn.Module) -> str:
    if not _is_known(module, "snntorch"):
        return "this class is not known; give it spike_grad=chi.Surrogate() if it calls that on h - v_th"
    if getattr(module, "surrogate_disable", False):
        return "surrogate_disable=True takes its gradient away; leave that out"
    if getattr(module, "inhibition", False):
        return "inhibition=True takes spikes away after the surrogate, so firing rates would be wrong; leave that out"
    return ""


def _method(parameters: object) -> str:
    """Name of the threshold function in a norse cell's parameters, which may lie in parameters; empty for others."""
    if hasattr(parameters, "method"):
        return str(parameters.method)  # pyright: ignore[reportAttributeAccessIssue]
    parts = parameters if isinstance(parameters, tuple) else ()
    return next((method for part in parts if (method := _method(part))), "")


def _norse_problem(cell: nn.Module) -> str:
    sparse = getattr(cell, "activation_sparse", None)
    if _has_one_threshold(getattr(cell, "activation", None)) and (sparse is None or _has_one_threshold(sparse)):
        return ""
    return "its step does not call threshold() itself, once; use a cell that does, such as LIFCell"


def _has_one_threshold(step: object) -> bool:
    if not isinstance(step, types.FunctionType):
        return False
    return [one.argval for one in dis.get_instructions(step) if one.opname == "LOAD_GLOBAL"].count("threshold") == 1


def _described(surrogate: nn.Module) -> str:
    alpha = getattr(surrogate, "alpha", None)
    value = alpha.item() if isinstance(alpha, torch.Tensor) and alpha.numel() == 1 else alpha
    return type(surrogate).__name__ + ("" if value is None else f"(alpha={value:g})")


def _function(spike_grad: object) -> str:
    function = getattr(spike_grad, "__self__", spike_grad)  # of a bound method: what it is bound to
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]
