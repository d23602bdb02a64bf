"""Checkpoints: whole or absent, by parameter name, at any number of ranks.

    RUN/checkpoints/step-00000100/
      state.pt        parameters, momentum and BatchNorm statistics by name; counters; the controller
      state.sha256    its hash
    RUN/checkpoints/latest     the name of the newest

A checkpoint is written to a temporary folder, fsynced, then renamed, so a kill at any moment leaves the one before
it. DeepSpeed's own are not used: theirs do not load at another world size, and a kill during a save breaks them.
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch.nn import functional

log = logging.getLogger(__name__)
MOMENTUM = "momentum_buffer"


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


def gather(engine) -> dict[str, dict]:
    """Full fp32 parameters, momentum and buffers by name, on the CPU. Every rank calls it; it is a collective."""
    average_buffers(engine)
    parameters, momentum = {}, {}
    fp32 = masters(engine)
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
            value = fp32[parameter]
            state = engine.optimizer.state[value].get(MOMENTUM)
        else:
            value, state = safe_get_full_fp32_param(parameter), safe_get_full_optimizer_state(parameter, MOMENTUM)
        assert value is not None
        parameters[name] = value.detach().cpu().clone()
        if state is not None:
            momentum[name] = state.detach().cpu().clone()
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
    return {"parameters": parameters, "momentum": momentum, "buffers": buffers, "loss_scale": _loss_scale(engine)}


def scatter(engine, state: dict[str, dict]) -> None:
    """Puts `gather`'s result back into an engine of any world size, before its first step."""
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
            if name in state["momentum"]:
                engine.optimizer.state[master][MOMENTUM] = state["momentum"][name].to(parameter.device)
        return
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        _scatter_partitions(engine, state)
        return
    for partition in optimizer.single_partition_of_fp32_groups:
        # Momentum exists only after a first step; zeros are what that step would start from.
        optimizer.optimizer.state[partition][MOMENTUM] = torch.zeros_like(partition)
    optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        safe_set_full_fp32_param(parameter, state["parameters"][name].to(parameter.device))
        if name in state["momentum"]:
            safe_set_full_optimizer_state(parameter, state["momentum"][name].to(parameter.device), MOMENTUM)
    optimizer.update_lp_params()


def masters(engine) -> dict[torch.nn.Parameter, torch.Tensor]:
    """ZeRO-0: the fp32 weight behind every parameter, which is itself but for fp16; empty at other stages."""
    if engine.zero_optimization_stage():
        return {}
    if not engine.fp16_enabled():
        return {parameter: parameter for parameter in engine.module.parameters()}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {half: full for halves, fulls in pairs for half, full in zip(halves, fulls, strict=True)}


def _scaler(engine):
    """What holds the dynamic loss scale of fp16, under one name in DeepSpeed's ZeRO and another without."""
    return engine.optimizer.loss_scaler if engine.zero_optimization_stage() else engine.optimizer.loss_scale_config


def _loss_scale(engine) -> dict[str, float]:
    """The loss scale and the steps that its growth counts from; empty in another precision than fp16."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter") if engine.fp16_enabled() else ()
    return {name: getattr(_scaler(engine), name) for name in names}


def _scatter_partitions(engine, state: dict[str, dict]) -> None:
    """ZeRO-3: every rank takes its part. DeepSpeed's setters of whole parameters fail where they do not divide."""
    optimizer = engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat)
    optimizer.checkpoint_event_prologue()  # takes apart the small parameters, which are kept whole
    for name, parameter in engine.module.named_parameters():

        def part(value: torch.Tensor, like: torch.Tensor = parameter.ds_tensor) -> torch.Tensor:
            mine = value.flatten().float()[dist.get_rank() * like.numel() :][: like.numel()]
            return functional.pad(mine, (0, like.numel() - mine.numel())).to(like.device)

        value = part(state["parameters"][name])
        safe_set_local_fp32_param(parameter, value)
        parameter.ds_tensor.copy_(value)
        if name in state["momentum"]:
            safe_set_local_optimizer_state(parameter, part(state["momentum"][name]), MOMENTUM)
    optimizer.checkpoint_event_epilogue()


def save(run_dir: Path, step: int, state: dict) -> Path:
    """Writes a checkpoint from rank 0; when it returns, the checkpoint is on the disk whole."""
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    torch.save(state, temporary / "state.pt")
    digest = _digest(temporary / "state.pt")
    (temporary / "state.sha256").write_text(digest + "\n")
    for path in (temporary / "state.pt", temporary / "state.sha256", temporary):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    pointer = root / ".latest.tmp-file"
    pointer.write_text(final.name + "\n")
    _fsync(pointer)
    os.replace(pointer, root / "latest")
    _fsync(root)
    for old in sorted(root.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    return final


KEEP = 2  # the newest, and the one to fall back to should it be damaged


def load_newest(run_dir: Path) -> dict | None:
    """The newest checkpoint that is whole, or None; a damaged one is named and passed over."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            expected = (folder / "state.sha256").read_text().strip()
            if _digest(folder / "state.pt") == expected:
                return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            reason = "its hash does not match"
        except OSError as error:
            reason = error.strerror or str(error)
        log.warning("checkpoint %s is damaged (%s) and passed over", folder, reason)
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
