"""An engine's state, by parameter name, for a checkpoint that loads at any number of ranks.

`checkpoint_files.py` writes it to the disk. DeepSpeed's own checkpoints are not used: they do not load at another world
size, and a kill during a save breaks them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.comm as dist
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch.nn import functional


def average_buffers(engine) -> None:
    """Averages BatchNorm's running statistics over ranks and writes them back, on every rank alike."""
    floating = [buffer for buffer in engine.module.buffers() if buffer.is_floating_point()]
    if not floating or dist.get_world_size() == 1:
        return
    flat = torch.cat([buffer.reshape(-1) for buffer in floating]).double()
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(floating, flat.split([b.numel() for b in floating]), strict=True):
        buffer.copy_(mean.view_as(buffer))


class EngineState:
    """The part of a checkpoint that is an engine's: weights, optimizer, loss scale. Every call is a collective.

    Args:
        engine: a DeepSpeed engine of any ZeRO stage; what is loaded may come from another number of ranks.
        keeps: whether this rank wants the tensors; the rank that writes a checkpoint needs them alone.
    """

    def __init__(self, engine, *, keeps: bool = True) -> None:
        self._engine, self._keeps = engine, keeps

    def state_dict(self) -> dict[str, dict]:
        """Full fp32 parameters, optimizer state and buffers by name: copies on the CPU, which later steps leave alone.

        On a rank that does not keep them the tensors are left out.
        """
        engine, slots, copies = self._engine, _slots(self._engine), HostCopies(wanted=self._keeps)
        if engine.zero_optimization_stage() in (1, 2):
            # DeepSpeed links parameters to their state after its first group's first step, when other groups have none.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        optimizer: dict[str, dict[str, torch.Tensor]] = {slot: {} for slot in slots}
        fp32 = masters(engine)
        for name, parameter in engine.module.named_parameters():
            if engine.zero_optimization_stage() == 0:
                state = {slot: engine.optimizer.state[fp32[parameter]].get(slot) for slot in slots}
            else:
                state = {slot: safe_get_full_optimizer_state(parameter, slot) for slot in slots}
            for slot, tensor in state.items():
                if tensor is not None:
                    copies.take(optimizer[slot], name, tensor)
        copies.wait()
        return {
            **gather_weights(engine, keeps=self._keeps),
            "optimizer": optimizer,
            "updates": _updates(engine),
            "loss_scale": _loss_scale(engine),
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Loads the result of `state_dict`, before the engine's first step."""
        engine = self._engine
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(state["buffers"][name])
        for name, value in state.get("loss_scale", {}).items():
            setattr(_scaler(engine), name, value)
        if engine.zero_optimization_stage() == 0:
            fp32 = masters(engine)
            for name, parameter in engine.module.named_parameters():
                parameter.data.copy_(state["parameters"][name])
                master = fp32[parameter]
                master.data.copy_(state["parameters"][name])
                moments = {slot: of[name] for slot, of in state["optimizer"].items() if name in of}
                # Copies: the optimizer changes them in place.
                slots = {slot: moment.to(parameter.device, copy=True) for slot, moment in moments.items()}
                if slots:
                    engine.optimizer.state[master].update(slots, **_step(state))
            return
        if engine.zero_optimization_stage() == 3:
            _scatter_partitions(engine, state)
            return
        optimizer = engine.optimizer
        _begin_state(optimizer, optimizer.single_partition_of_fp32_groups, state)
        optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, state["parameters"][name].to(parameter.device))
            for slot, of in state["optimizer"].items():
                safe_set_full_optimizer_state(parameter, of[name].to(parameter.device), slot)
        optimizer.update_lp_params()


def gather_weights(engine, *, keeps: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """The part of an engine's state that a network computes with: full fp32 parameters and buffers.

    The tensors are left out on a rank that does not keep them.
    """
    average_buffers(engine)
    copies, parameters, buffers = HostCopies(wanted=keeps), {}, {}
    fp32 = masters(engine)
    for name, parameter in engine.module.named_parameters():
        value = fp32[parameter] if fp32 else _whole(engine, parameter)
        assert value is not None
        copies.take(parameters, name, value)
    for name, buffer in engine.module.named_buffers():
        copies.take(buffers, name, buffer)
    copies.wait()
    return {"parameters": parameters, "buffers": buffers}


def _whole(engine, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """A parameter in fp32. In ZeRO-1 and 2 every rank has it already, unless the engine computes in fp16."""
    if engine.zero_optimization_stage() < 3 and parameter.dtype == torch.float32:
        return parameter
    return safe_get_full_fp32_param(parameter)


class HostCopies:
    """Copies tensors to the CPU, each once; from a GPU into pinned memory, while the host goes on to the next.

    Args:
        wanted: if False, nothing is copied.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted, self._on_gpu = wanted, False

    def take(self, into: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
        """Puts the tensor's copy into the dictionary; its values are there after `wait`."""
        if not self._wanted:
            return
        tensor = tensor.detach()
        into[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        into[name].copy_(tensor, non_blocking=tensor.is_cuda)
        self._on_gpu |= tensor.is_cuda

    def wait(self) -> None:
        """Returns when all copies are done."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()


def _slots(engine) -> list[str]:
    """Names of the optimizer's state per element: momentum_buffer, or exp_avg and exp_avg_sq; none before a step."""
    states = engine.basic_optimizer.state.items()
    return sorted({slot for p, state in states for slot, v in state.items() if getattr(v, "shape", None) == p.shape})


def _updates(engine) -> dict[str, float]:
    """AdamW's count of updates, the same for every parameter, as `{"step": n}`; empty for SGD."""
    counts = {float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, counts
    return {"step": counts.pop()} if counts else {}


def _step(state: dict[str, dict]) -> dict[str, torch.Tensor]:
    """The count of updates as torch keeps it for every parameter: a CPU tensor of its own, since it counts in place."""
    return {name: torch.tensor(value) for name, value in state["updates"].items()}


def _begin_state(optimizer, partitions: list[torch.Tensor], state: dict[str, dict]) -> None:
    """Creates the optimizer's state, which else exists only after a first step; its values are loaded afterwards."""
    for partition in partitions:
        slots = {slot: torch.zeros_like(partition) for slot in state["optimizer"]}
        if slots:
            optimizer.optimizer.state[partition].update(slots, **_step(state))


def masters(engine) -> dict[torch.nn.Parameter, torch.Tensor]:
    """ZeRO-0: the fp32 weight of every parameter, the parameter itself except in fp16; empty at other stages."""
    if engine.zero_optimization_stage():
        return {}
    if not engine.fp16_enabled():
        return {parameter: parameter for parameter in engine.module.parameters()}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {half: full for halves, fulls in pairs for half, full in zip(halves, fulls, strict=True)}


def owned_weights(engine) -> list[torch.Tensor]:
    """The fp32 weights that this rank's optimizer updates: whole in ZeRO-0, its flat partitions at other stages."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(masters(engine).values())
    return list(
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )


@contextmanager
def replacing(engine) -> Iterator[None]:
    """While the context is open, `owned_weights` may be written to; then the engine computes with the new values."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # partitions the small parameters, which are kept whole
    yield
    if stage == 0:
        for parameter, master in masters(engine).items():
            if master is not parameter:
                parameter.data.copy_(master)
    elif stage == 3:
        for parameter in engine.module.parameters():
            parameter.ds_tensor.copy_(safe_get_local_fp32_param(parameter))
        engine.optimizer.checkpoint_event_epilogue()
    else:
        engine.optimizer.update_lp_params()


def _scaler(engine):
    """The object that holds fp16's dynamic loss scale; its name depends on whether ZeRO is used."""
    return engine.optimizer.loss_scaler if engine.zero_optimization_stage() else engine.optimizer.loss_scale_config


def _loss_scale(engine) -> dict[str, float]:
    """The loss scale and the steps that its growth counts from; empty in other precisions than fp16."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter") if engine.fp16_enabled() else ()
    return {name: getattr(_scaler(engine), name) for name in names}


def _scatter_partitions(engine, state: dict[str, dict]) -> None:
    """ZeRO-3: every rank loads its part. DeepSpeed's setters of whole parameters fail if they do not divide evenly."""
    optimizer = engine.optimizer
    _begin_state(optimizer, optimizer.fp32_partitioned_groups_flat, state)
    optimizer.checkpoint_event_prologue()  # partitions the small parameters, which are kept whole
    for name, parameter in engine.module.named_parameters():

        def part(value: torch.Tensor, like: torch.Tensor = parameter.ds_tensor) -> torch.Tensor:
            mine = value.flatten().float()[dist.get_rank() * like.numel() :][: like.numel()]
            return functional.pad(mine, (0, like.numel() - mine.numel())).to(like.device)

        value = part(state["parameters"][name])
        safe_set_local_fp32_param(parameter, value)
        parameter.ds_tensor.copy_(value)
        for slot, of in state["optimizer"].items():
            safe_set_local_optimizer_state(parameter, part(of[name]), slot)
    optimizer.checkpoint_event_epilogue()
