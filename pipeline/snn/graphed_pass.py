"""A micro-batch's forward and backward pass as two CUDA graphs: each is launched at once, not kernel by kernel.

    images → [static images → recorded forward → static logits] → a copy of the logits → loss
    its gradient → [static gradient → recorded backward → static gradients] → copies → AccumulateGrad → ZeRO's hooks

`record_passes` gives a network's `forward` this form. The recorded passes are one node of autograd, whose inputs are
all parameters and the meters of the layers (kernels/tally.py): so gradients and counts arrive where they do without a
graph, accumulate over micro-batches, and fire the same hooks. What is handed out is a copy, and no later pass changes
it. Widths, amplitudes, weights and running statistics are read and written where they are in memory.

The first passes of a shape run as they are: they compile kernels and fill caches, and their counts and statistics
count. A capture itself runs nothing on the device, so no state is to be put back. What a recording cannot repeat runs
as it is: another shape, evaluation, a pass without gradient, a probed or watched layer, a module with hooks. If a
parameter, buffer or width has moved in memory, the pass is recorded again.

On the CPU the same node runs the pass itself, into static memory: the definition that tests compare with.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.errors import ConfigError, first_line
from pipeline.snn.neurons import Neuron, NeuronState

log = logging.getLogger(__name__)

AS_IT_IS = 3
"""Passes in a row of one shape that run as they are before one is recorded."""


class Replay(Protocol):
    """A recorded pass: each call reads and writes the same memory."""

    images: Tensor
    logits: Tensor
    grad_logits: Tensor
    grads: list[Tensor | None]
    """For every input; None where no gradient flows to it."""

    def forward(self) -> None:
        """`images` → `logits`."""
        ...

    def backward(self) -> None:
        """`grad_logits` → `grads`."""
        ...


def first_of(error: BaseException) -> BaseException:
    """What was raised first: the end of a capture that an error broke off raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class CudaReplay:
    """Two CUDA graphs in one memory pool.

    Raises:
        ConfigError: the pass does what cannot be captured, such as a read by the host.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor, inputs: Sequence[Tensor]) -> None:
        self.images = torch.empty_like(images)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Only this thread's calls are restricted: others decode images and watch collectives meanwhile.
        mode = "thread_local"
        try:
            with torch.cuda.graph(self._forward, capture_error_mode=mode):
                logits = run(self.images)
            self.grad_logits = torch.empty_like(logits)
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode=mode):
                grads = torch.autograd.grad(logits, inputs, self.grad_logits, allow_unused=True)
                self.grads: list[Tensor | None] = [laid_out(*pair) for pair in zip(grads, inputs, strict=True)]
        except RuntimeError as error:
            cause = first_of(error)
            if "captur" not in str(cause):  # out of memory, or a broken GPU
                raise cause from None
            raise ConfigError(
                f"train.cuda_graph=True: this network's pass cannot be captured ({first_line(cause)}); use "
                "train.cuda_graph false"
            ) from error
        self.logits = logits.detach()

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()


class HostReplay:
    """The definition of a replay, for devices without graphs: it runs the pass again, into the same memory."""

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor, inputs: Sequence[Tensor]) -> None:
        self._run, self._inputs = run, inputs
        self._out: Tensor | None = None
        self.images = torch.empty_like(images)
        self.logits = self.grad_logits = torch.empty(0)
        self.grads: list[Tensor | None] = []

    def forward(self) -> None:
        self._out = self._run(self.images)
        if not self.logits.numel():
            self.logits, self.grad_logits = torch.empty_like(self._out), torch.empty_like(self._out)
        self.logits.detach().copy_(self._out.detach())

    def backward(self) -> None:
        assert self._out is not None
        grads = torch.autograd.grad(self._out, self._inputs, self.grad_logits, allow_unused=True)
        pairs = zip(grads, self._inputs, strict=True)
        self.grads = self.grads or [None if grad is None else torch.empty_like(like) for grad, like in pairs]
        for static, grad in zip(self.grads, grads, strict=True):
            if static is not None and grad is not None:
                static.detach().copy_(grad)
        self._out = None


def laid_out(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradient in the memory format of its parameter, in which autograd accumulates it."""
    if grad is None or grad.stride() == like.stride():
        return grad
    return torch.empty_like(like).copy_(grad)


class Recording:
    """A replay and the inputs that its gradients are for."""

    def __init__(self, replay: Replay, inputs: Sequence[Tensor]) -> None:
        self.replay, self.inputs = replay, tuple(inputs)
        self._turn, self._open = 0, False

    def begin(self, images: Tensor) -> int:
        """Runs the forward pass; returns its number, which `gradients` asks for."""
        self.replay.images.copy_(images)
        self.replay.forward()
        self._turn, self._open = self._turn + 1, True
        return self._turn

    def gradients(self, turn: int, grad_logits: Tensor) -> list[Tensor | None]:
        """Runs the backward pass of forward pass `turn`; the tensors are the caller's own.

        Raises:
            RuntimeError: another forward pass came in between, or this one's backward pass was run already.
        """
        if turn != self._turn or not self._open:
            raise RuntimeError(
                "train.cuda_graph=True: a recorded pass keeps what one backward pass needs; run each micro-batch's "
                "backward pass once, before the next forward pass, or use train.cuda_graph false"
            )
        self._open = False
        self.replay.grad_logits.copy_(grad_logits)
        self.replay.backward()
        # Copies: autograd may keep what it gets as Parameter.grad, and the next replay would write into that.
        owned = [None if grad is None else torch.empty_like(grad) for grad in self.replay.grads]
        of_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, grad in zip(owned, self.replay.grads, strict=True):
            if mine is not None and grad is not None:
                to, source = of_dtype.setdefault(grad.dtype, ([], []))
                to.append(mine)
                source.append(grad)
        for to, source in of_dtype.values():
            torch._foreach_copy_(to, source)  # pyright: ignore[reportPrivateImportUsage]
        return owned


class _Pass(torch.autograd.Function):
    """The recorded passes as one node of autograd."""

    @staticmethod
    def forward(ctx, recording: Recording, images: Tensor, *_inputs: Tensor) -> Tensor:
        ctx.recording, ctx.turn = recording, recording.begin(images)
        return recording.replay.logits.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, None, *ctx.recording.gradients(ctx.turn, grads[0])


class _Key(NamedTuple):
    """What a recording holds for."""

    images: tuple
    autocast: torch.dtype | None
    tensors: tuple
    """Address of every parameter, buffer, width and amplitude, and whether it gets a gradient."""
    training: tuple[bool, ...]


class GraphedPass:
    """`forward` of a network: recorded where it can be, else as it is. The network must keep its modules.

    Args:
        module: images `(N, C, H, W)` to logits; its hooks are called as before, since they are outside of `forward`.
        neurons: its spiking layers.
        replay: makes the recorded pass; CudaReplay, or HostReplay on the CPU.
    """

    def __init__(self, module: nn.Module, neurons: NeuronState, replay: Callable[..., Replay]) -> None:
        self._module, self._neurons, self._make = module, neurons, replay
        self._forward = module.forward
        self._modules = list(module.modules())
        self._inner = self._modules[1:]
        self._slots = [(m._parameters, name) for m in self._modules for name in m._parameters]
        self._slots += [(m._buffers, name) for m in self._modules for name in m._buffers]
        self._recording: Recording | None = None
        self._key: _Key | None = None
        self._last: _Key | None = None
        self._in_a_row = 0
        self._said: set[str] = set()
        self.replays = 0
        """Passes that were replayed."""

    def __call__(self, images: Tensor) -> Tensor:
        if not self._module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._forward(images)
        reason = self._unfit(images)
        if reason:
            if reason not in self._said:
                self._said.add(reason)
                log.warning("train.cuda_graph: passes run without a graph while %s", reason)
            return self._forward(images)
        key = self._key_of(images)
        if key != self._key:
            self._in_a_row = self._in_a_row + 1 if key == self._last else 1
            self._last = key
            if self._in_a_row <= AS_IT_IS:
                return self._forward(images)
            self._recording = None  # its memory first
            self._recording, self._key = self._record(images), key
        self._in_a_row = 0
        recording = self._recording
        assert recording is not None
        self.replays += 1
        return _Pass.apply(recording, images, *recording.inputs)

    def _unfit(self, images: Tensor) -> str:
        """Why this pass cannot be replayed: it runs Python that a replay would leave out. Empty if it can."""
        if images.requires_grad:
            return "images get a gradient"
        for neuron in self._neurons.neurons:
            watched = isinstance(neuron, Neuron) and neuron.watch is not None
            if neuron.probe is not None or neuron.on_input is not None or watched:
                return "a layer is probed or watched"
        for module in self._inner:
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                return "a module inside the network has hooks"
        for of, name in self._slots:
            tensor = of[name]
            if tensor is not None and tensor._backward_hooks:
                return "a parameter has hooks of its own"
        return ""

    def _key_of(self, images: Tensor) -> _Key:
        device = images.device.type
        held = [of[name] for of, name in self._slots]
        held += [part for neuron in self._neurons.neurons for part in neuron.scalars(images)]
        tensors = tuple(None if t is None else (t.data_ptr(), t.dtype, t.requires_grad) for t in held)
        return _Key(
            (images.shape, images.stride(), images.dtype, images.device),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            tensors,
            tuple(module.training for module in self._modules),
        )

    def _record(self, images: Tensor) -> Recording:
        parameters = [of[name] for of, name in self._slots]
        inputs = [p for p in dict.fromkeys(parameters) if p is not None and p.requires_grad]
        inputs += [tally.meter for tally in self._neurons.tallies]
        device = images.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def run(static: Tensor) -> Tensor:
            # Without autocast's cache: what it keeps would be memory of another pass.
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
                return self._forward(static)

        return Recording(self._make(run, images, inputs), inputs)


def record_passes(module: nn.Module, neurons: NeuronState, replay: Callable[..., Replay] = CudaReplay) -> GraphedPass:
    """Replaces `module.forward` by its recorded form; see GraphedPass."""
    graphed = GraphedPass(module, neurons, replay)
    module.forward = graphed
    return graphed


def require_graphs(config: Config, device: torch.device) -> None:
    """Refuses `train.cuda_graph` on a device that has no CUDA graphs; raises ConfigError."""
    if config.train.cuda_graph and device.type != "cuda":
        raise ConfigError(
            f"train.cuda_graph=True is not allowed on this device ({device.type}), which has no CUDA graphs; use "
            "train.cuda_graph false"
        )
