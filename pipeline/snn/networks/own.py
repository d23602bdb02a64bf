"""A network of the user's own: `--model.arch package.module:function`, or `.../file.py:function`.

    def network(model, num_classes, in_channels, image_size):
        return MyNetwork(...)

The function is called with those of these four that it takes, by name; it returns a `torch.nn.Module`:

    model          the options model.* as a `pipeline.config.ModelConfig`: T, neuron, v_th, width, ...
    num_classes    K, the classes of the data
    in_channels    C of the images: 3 for colour, 2 for event frames
    image_size     H = W of the images, in pixels

The module
    takes images (N, C, H, W), which it shows for model.T time steps, or event frames (T, N, C, H, W);
    returns logits (T, N, K), or (N, K) where it takes the mean over time itself;
    has neurons of `pipeline.snn.neurons.from_config(model)`, or of SpikingJelly, snnTorch or norse. Theirs get the
    surrogate of model.surrogate, scale and width, as by `chi.prepare`, and parameters without dimension the shape (1,);
    starts every pass from rest: the same images give the same potentials again. Neurons of these libraries are reset
    here;
    draws random numbers (dropout) from torch's default generator alone, and in training mode alone;
    uses and trains every parameter, each under one name;
    has other neurons behind each weight, since each get a width of their own;
    may say by a method `spiking_layers()` which weight feeds which neurons (see network.py). Without it, a trial pass
    tells (see feeding.py): the nearest convolution or linear layer behind the input, without passing other neurons.

What breaks this is refused at the start. χ, widths, energy (of Conv2d and Linear), checkpoints, evaluation, export and
resume then work as for the networks of this package. The run's folder keeps the hashes of the file and of what it
imports from its own folder or package, and, of a single file, a copy, from which a checkpoint is evaluated.
"""

import hashlib
import importlib
import inspect
import logging
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, first_line
from pipeline.snn.external_neurons import Steered
from pipeline.snn.membrane_probe import probed
from pipeline.snn.networks import foreign, own_source
from pipeline.snn.networks.feeding import FedLayer, fed_layers, owner_of
from pipeline.snn.networks.network import Network, SpikingLayer
from pipeline.snn.networks.own_source import Source
from pipeline.snn.neurons import NeuronState, bind, listed_layers

log = logging.getLogger(__name__)

TRIED = 2
"""Images in a trial pass: batch normalisation may need more than one."""
_AGAIN = "neurons keep their state, or something is random; start every pass from rest"


class OwnNetwork(Network):
    """A user's module as a `Network`; parameters, buffers and modules keep the names that they have in it.

    Args:
        module: as the contract above says, but for its neurons' surrogates, which are ours already.
        layers: its spiking layers, in forward order.
        in_channels: C of the images.
    """

    _own_module: nn.Module
    _own_layers: list[SpikingLayer]
    _own_rest: "_Rest"

    def __init__(self, module: nn.Module, layers: list[SpikingLayer], in_channels: int) -> None:
        super().__init__()
        # The module's own registries, and not the module as a child, whose name would stand before all others.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.__dict__["_own_module"] = module
        self.training = module.training
        # Not by setattr, which refuses the names of the module's own children.
        self.__dict__ |= {"in_channels": in_channels, "_own_layers": layers, "_own_rest": _Rest(module)}

    def spiking_layers(self) -> list[SpikingLayer]:
        return self._own_layers

    def forward(self, images: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(self._own_rest)
            if next(self.parameters()).dtype == torch.float16:
                # As in bf16: tensors of another dtype, such as buffers, may meet the weights.
                stack.enter_context(torch.autocast(images.device.type, torch.float16))
                stack.enter_context(_FullNorms())
            logits = self._own_module(images)
        return logits if logits.dim() == 3 else logits[None]

    def train(self, mode: bool = True) -> "OwnNetwork":
        self._own_module.train(mode)
        if not mode:
            foreign.evaluate(self._own_module)
        self.training = mode
        return self


class _FullNorms(TorchFunctionMode):
    """Within it, batch normalisation has weights in fp32, the dtype of its statistics: DeepSpeed casts the weights
    alone to fp16, and torch takes no mixture."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        function = _batch_norm if func is functional.batch_norm else func
        return function(*args, **(kwargs or {}))


def _batch_norm(x: Tensor, mean: Tensor | None, var: Tensor | None, weight=None, bias=None, *rest, **named) -> Tensor:
    weight, bias = (one if one is None else one.float() for one in (weight, bias))
    return functional.batch_norm(x, mean, var, weight, bias, *rest, **named)


def build(
    source: Source,
    model: ModelConfig,
    *,
    num_classes: int,
    in_channels: int,
    image_sizes: tuple[int, ...],
    micro_batch: int,
) -> OwnNetwork:
    """The user's network, tried on two images of each size; on one, where it trains on one at a time.

    Args:
        source: where its function is.
        model: the configuration.
        num_classes: K.
        in_channels: C of the images; with 2 it is tried on event frames.
        image_sizes: sides of the images that it will get, in pixels; the function gets the first.
        micro_batch: images that it gets at a time while training.

    Raises:
        ConfigError: the user's code failed, with its own lines of the traceback; or the contract is broken.
    """
    given = {"model": model, "num_classes": num_classes, "in_channels": in_channels, "image_size": image_sizes[0]}
    with torch.device("cpu"):  # a trial needs values, also where the caller wants shapes alone
        module = _called(source, given)
        _convert_neurons(source, module, model)
        _check_parameters(source, module)
        _check_listed(source, module)
        batch = min(TRIED, micro_batch)
        channels = (model.T, batch, in_channels) if in_channels == 2 else (batch, in_channels)
        layers: list[SpikingLayer] = []
        for size in image_sizes:
            layers = _tried(source, module, torch.Size((*channels, size, size)), num_classes)
        return OwnNetwork(module, layers, in_channels).train()  # as after a validation


@contextmanager
def _theirs(source: Source, what: str) -> Iterator[None]:
    """An error of the user's code becomes a ConfigError with the lines of the traceback that are in their files."""
    try:
        yield
    except Exception as error:
        found = traceback.extract_tb(error.__traceback__)
        theirs = {str(source.path), *own_source.theirs(source, (one.filename for one in found))}
        frames = [one for one in found if one.filename in theirs]
        said = "".join(traceback.format_list(frames)).rstrip()
        raise ConfigError(
            f"model.arch={source.arch!r}: {what} failed with {type(error).__name__}: {first_line(error)}"
            + (f"\n{said}" if said else "")
        ) from error


def _refused(source: Source, why: str) -> ConfigError:
    return ConfigError(f"model.arch={source.arch!r}: {why}")


def _called(source: Source, given: dict[str, object]) -> nn.Module:
    """What the user's function returns."""
    with _theirs(source, f"importing {source.module or source.path}"):
        names = vars(_imported(source))
    function = names.get(source.function)
    if not callable(function):
        there = [name for name, one in names.items() if inspect.isfunction(one) and one.__module__ == names["__name__"]]
        found = f"it has {', '.join(there)}" if there else "it defines no function"
        raise _refused(source, f"{source.path} has no function {source.function}; {found}")
    takes = inspect.signature(function).parameters.values()
    named = {one.name for one in takes if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    missing = [one.name for one in takes if one.name not in given and one.name in named and one.default is one.empty]
    if missing:
        raise _refused(source, f"{source.function} takes {', '.join(missing)}, which nothing gives; use some of "
                       f"{', '.join(given)}, or a default")  # fmt: skip
    everything = any(one.kind is one.VAR_KEYWORD for one in takes)
    with _theirs(source, f"{source.function}()"):
        module = function(**{name: value for name, value in given.items() if everything or name in named})
    if not isinstance(module, nn.Module):
        raise _refused(source, f"{source.function} returned {type(module).__name__}; return a torch.nn.Module")
    return module


def _imported(source: Source) -> types.ModuleType:
    if source.module:
        return importlib.import_module(source.module)
    own_source.look_first_in(str(source.folder))  # for what the file imports from beside it
    module = types.ModuleType(f"own_network_{source.path.stem}")
    module.__file__ = str(source.path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    exec(compile(source.code, str(source.path), "exec", dont_inherit=True), vars(module))  # the very bytes of the hash
    return module


def _check_parameters(source: Source, module: nn.Module) -> None:
    """Refuses parameters that checkpoints or ranks could not treat like those of our networks."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise _refused(source, f"{name} is of a lazy layer, which has no size before its first pass; give the "
                           "layer the number of its inputs")  # fmt: skip
        other = names.setdefault(id(parameter), name)
        if other != name:
            raise _refused(source, f"{other} and {name} are one parameter; give each module its own")
        if not parameter.requires_grad:
            raise _refused(source, f"{name} is frozen (requires_grad=False); make it a buffer, or train it")
        if parameter.dim() == 0:
            raise _refused(source, f"{name} has no dimension, which DeepSpeed cannot send; use the shape (1,)")
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise _refused(source, f"{name} is {parameter.dtype} on {parameter.device}; build it in float32 on the "
                           "CPU: train.precision and the launcher choose what follows")  # fmt: skip
    if not names:
        raise _refused(source, "the network has no parameters; there is nothing to train")


def _convert_neurons(source: Source, module: nn.Module, model: ModelConfig) -> None:
    """Gives neurons of other libraries our surrogate; refuses what cannot be steered as the configuration says."""
    try:
        if foreign.unsteered(module) or foreign.shared(module):
            foreign.prepare(module, model.surrogate, model.scale, model.width)
    except ConfigError as error:
        raise _refused(source, str(error)) from None
    foreign.give_dimension(module)
    steered = [(name, one) for name, one in module.named_modules() if isinstance(one, Steered)]
    if not steered:
        raise _refused(source, "the network has no spiking neurons; use pipeline.snn.neurons.from_config(model), or "
                       "those of SpikingJelly, snnTorch or norse")  # fmt: skip
    for name, neuron in steered:
        for field, got, wanted in (
            ("surrogate", neuron.rule.shape, model.surrogate),
            ("scale", neuron.rule.scale, model.scale),
        ):
            if got != wanted:
                raise _refused(source, f"the neurons {name} have the {field} {got!r}, and model.{field} is {wanted!r}; "
                               f"make them by neurons.from_config(model), or use --model.{field} {got}")  # fmt: skip


def _check_listed(source: Source, module: nn.Module) -> None:
    """Refuses what the module's own `spiking_layers()` says wrongly."""
    with _theirs(source, "spiking_layers()"):
        listed = listed_layers(module)
    if listed is None:
        return
    if not listed:
        raise _refused(source, "spiking_layers() lists nothing; list the neurons, or take the method out")
    neurons = {id(one) for one in module.modules() if isinstance(one, Steered)}
    parameters = {id(one) for one in module.parameters()}
    for layer in listed:
        if id(layer.neuron) not in neurons:
            raise _refused(source, f"the neuron that spiking_layers() gives for {layer.name} is a "
                           f"{type(layer.neuron).__name__}; give a pipeline.snn.neurons.Neuron of the network, or the "
                           "Surrogate in neurons of another kind")  # fmt: skip
        if layer.weight is not None and id(layer.weight) not in parameters:
            raise _refused(source, f"the weight that spiking_layers() gives for {layer.name} is no parameter of the "
                           "network; give one, or None")  # fmt: skip
    for kind, given in (("name", [one.name for one in listed]), ("neuron", [id(one.neuron) for one in listed])):
        if len(set(given)) < len(given):
            raise _refused(source, f"spiking_layers() gives a {kind} twice; give each layer its own")


class _Rest:
    """Within it, neurons of other libraries begin at rest, and what they keep of the pass is thrown away after it.

    SpikingJelly's keep it in attributes, and have a method to forget it; snnTorch's keep it in buffers, of the batch's
    shape, which no checkpoint could hold.
    """

    def __init__(self, module: nn.Module) -> None:
        found = [(one, foreign.library_of(one)) for one in module.modules()]
        self._jelly = [one for one, library in found if library == "spikingjelly" and hasattr(one, "reset")]
        self._torch = [one for one, library in found if library == "snntorch"]
        self._buffers: list[dict] = []

    def __enter__(self) -> None:
        for one in self._jelly:
            one.reset()  # pyright: ignore[reportCallIssue]
        self._buffers = [dict(one._buffers) for one in self._torch]

    def __exit__(self, *_: object) -> None:
        for one, buffers in zip(self._torch, self._buffers, strict=True):
            one._buffers.update(buffers)


@contextmanager
def trial(module: nn.Module) -> Iterator[NeuronState]:
    """For a pass forwards and backwards that leaves the module as it was: its modes, buffers, widths and gradients, and
    torch's random numbers."""
    held = [(of, name, buffer) for one in module.modules() for of in (one._buffers,) for name, buffer in of.items()]
    buffers = [(of, name, buffer, buffer.clone()) for of, name, buffer in held if buffer is not None]
    training, neurons = module.training, bind(module)
    widths = [neuron.width for neuron in neurons.neurons]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            module.train()
            yield neurons
    finally:
        for neuron, width in zip(neurons.neurons, widths, strict=True):
            neuron.release()
            neuron.width = width
        for parameter in module.parameters():
            parameter.grad = None
        for of, name, buffer, before in buffers:
            of[name] = buffer.copy_(before)
        module.train(training)


def _tried(source: Source, module: nn.Module, shape: torch.Size, num_classes: int) -> list[SpikingLayer]:
    """Runs the module forwards and backwards once, and twice forwards; returns its spiking layers."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    size, rest = f"{'event frames' if len(shape) == 5 else 'images'} of shape {tuple(shape)}", _Rest(module)

    def logits() -> Tensor:
        with rest, _theirs(source, f"a pass of {size}"):
            return module(images)

    with trial(module) as neurons:
        buffers = dict(module.named_buffers())
        shapes = {name: buffer.shape for name, buffer in buffers.items()}
        fed = fed_layers(module, neurons)
        order = _order_of_use(fed)
        out = logits()
        _check_logits(source, out, size, shape[-4], num_classes)
        out.float().square().sum().backward()
        lost = [name for name, parameter in module.named_parameters() if parameter.grad is None]
        unused = [name for name, tally in zip(neurons.names, neurons.tallies, strict=True) if not tally.any]
        changed = [name for name, buffer in module.named_buffers() if buffer.shape != shapes.get(name)]
        replaced = [name for name, buffer in module.named_buffers() if buffer is not buffers.get(name)]
        hidden = [name for name, neuron in zip(neurons.names, neurons.neurons, strict=True) if neuron.traced]
        foreign.evaluate(module)
        with torch.no_grad():
            once, twice = (_seen(neurons, logits) if not hidden else (logits(), {}) for _ in range(2))
    if changed:
        raise _refused(source, f"{changed[0]} is a buffer that a pass makes or gives another shape; keep such "
                       "state in a plain attribute, and start every pass from rest")  # fmt: skip
    if replaced:
        raise _refused(source, f"{replaced[0]} is a buffer in whose place a pass puts another tensor, which averages "
                       "and a skipped step would miss; write into it (copy_, lerp_, …)")  # fmt: skip
    if hidden and listed_layers(module) is None:
        raise _refused(source, f"torch.compile hides which weights feed the neurons {hidden[0]}; return the network "
                       "uncompiled, or give it a method spiking_layers()")  # fmt: skip
    if lost:
        raise _refused(source, f"{lost[0]} gets no gradient in a pass; use every parameter, or take it out")
    for name, potentials in once[1].items():
        if not potentials:
            raise _refused(source, f"the neurons {name} are not used in a pass; take them out" if name in unused else
                           f"the neurons {name} do not call their surrogate in evaluation mode, so their spikes would "
                           "not be seen; call it in both modes")  # fmt: skip
        if potentials != twice[1][name]:
            raise _refused(source, f"the same images give the neurons {name} other potentials the second time, in "
                           f"evaluation mode: {_AGAIN}")  # fmt: skip
    if not torch.equal(once[0], twice[0]):
        raise _refused(source, f"the same images give other logits the second time, in evaluation mode: {_AGAIN}")
    steered = [layer for layer in fed if layer.name not in unused]
    if not steered:
        raise _refused(source, f"no gradient flows through the spikes of any neurons, such as {unused[0]}; let the "
                       "logits come of spikes, behind a weight")  # fmt: skip
    if unused:
        log.warning("The neurons %s keep their width: no gradient flows through their spikes (as of a layer whose "
                    "potential alone is read out).", ", ".join(unused))  # fmt: skip
    return [_layer(source, layer) for layer in sorted(steered, key=lambda layer: order.index(layer) if order else 0)]


def _seen(neurons: NeuronState, logits: Callable[[], Tensor]) -> tuple[Tensor, dict[str, list[bytes]]]:
    """The logits of a pass, and by layer a hash of h - v_th of each of its calls."""
    potentials: dict[str, list[bytes]] = {name: [] for name in neurons.names}

    def see(layer: int, u: Tensor) -> None:
        potentials[neurons.names[layer]].append(hashlib.blake2b(u.numpy().tobytes()).digest())

    with probed(neurons.neurons, see):
        return logits(), potentials


def _order_of_use(fed: list[FedLayer]) -> list[FedLayer]:
    """A list to which every layer is added at its first input; empty where the module itself says the order."""
    order: list[FedLayer] = []
    for layer in fed:
        look = layer.neuron.on_input
        if look is None:
            continue

        def noted(x: Tensor, norm: nn.Module | None, layer: FedLayer = layer, look=look) -> None:
            if layer not in order:
                order.append(layer)
            look(x, norm)

        layer.neuron.on_input = noted
    return order


def _check_logits(source: Source, logits: object, size: str, N: int, K: int) -> None:
    if not isinstance(logits, Tensor):
        raise _refused(source, f"{size} give {type(logits).__name__}; return a tensor of logits alone")
    shape = tuple(logits.shape)
    if logits.dim() not in (2, 3) or shape[-2:] != (N, K):
        raise _refused(source, f"{size} give logits of shape {shape}; return (T, {N}, {K}) or ({N}, {K})")


def _layer(source: Source, layer: FedLayer) -> SpikingLayer:
    if not layer.known:  # a product of other layers' spikes
        return SpikingLayer(layer.name, layer.neuron, None)
    owners = dict.fromkeys(map(owner_of, layer.parameters))
    if len(owners) > 1:
        raise _refused(source, f"the neurons {layer.name} are used behind several weights, of {', '.join(owners)}; "
                       "give each place neurons of its own, which then have a width of their own")  # fmt: skip
    if len(layer.parameters) > 1:
        raise _refused(source, f"the weight before the neurons {layer.name} is made of {', '.join(layer.parameters)}; "
                       "use a layer without weight_norm or spectral_norm")  # fmt: skip
    return SpikingLayer(layer.name, layer.neuron, layer.weight, layer.norm)
