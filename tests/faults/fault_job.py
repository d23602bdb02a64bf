"""launch/train.py with an accident at an exact point, which FAULT="RANK SIGNAL POINT N" in the environment names:
RANK sends itself SIGNAL at its N-th passage, from 1, of POINT: forward, reduce, save or evaluate. SIGTERM+SIGTERM sends
two, `AGAIN_S` apart, and stays at the point. N may be several, as in 3,7. In the place of a signal, NAN
makes a sample's pixels NaN, SLOW makes every later forward pass 0.2 s longer, and FLIP changes one element of the first
parameter.

The program itself has no code for this: only functions of DeepSpeed and torch are wrapped.
"""

import os
import signal
import sys
import time

from launch.train import main
from pipeline.ranks.stop_requests import AGAIN_S

RANK, SIGNAL, POINT, NTH = os.environ.get("FAULT", "-1 SIGKILL nowhere 0").split()
passages = 0


def reached() -> bool:
    """Whether this is a passage that FAULT names."""
    global passages
    passages += 1
    return str(passages) in NTH.split(",")


def strike() -> None:
    for name in SIGNAL.split("+"):
        signal.raise_signal(signal.Signals[name])
        if "+" in SIGNAL:
            time.sleep(1.5 * AGAIN_S)
    if "+" in SIGNAL:
        time.sleep(60)


def prepare_accident() -> None:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    forward, all_reduce, save = DeepSpeedEngine.forward, torch.distributed.all_reduce, torch.save

    def struck_forward(engine, images):
        trains = engine.module.training and torch.is_grad_enabled()  # a calibration does not
        if trains == (POINT == "forward") and engine.module.training == trains and reached():
            if SIGNAL == "NAN":
                images[3] = float("nan")
            elif SIGNAL == "SLOW":
                engine.module.register_forward_pre_hook(lambda *_: time.sleep(0.2))
            elif SIGNAL == "FLIP":
                next(engine.module.parameters()).data.view(-1)[5] += 1e-3
            else:
                strike()
        return forward(engine, images)

    def struck_all_reduce(tensor, *args, **kwargs):
        if tensor.numel() > 10_000 and reached():  # the all-reduce of gradients: all others have a few numbers only
            work = all_reduce(tensor, *args, **kwargs | {"async_op": True})
            strike()  # while the all-reduce is under way
            assert work is not None
            work.wait()
            return None
        return all_reduce(tensor, *args, **kwargs)

    def struck_save(state, path, *args, **kwargs):
        save(state, path, *args, **kwargs)
        if reached():
            whole = os.path.getsize(path)
            os.truncate(path, whole // 2)
            strike()
            save(state, path, *args, **kwargs)

    if POINT in ("forward", "evaluate"):
        DeepSpeedEngine.forward = struck_forward  # pyright: ignore[reportAttributeAccessIssue]
    elif POINT == "reduce":
        torch.distributed.all_reduce = struck_all_reduce
    elif POINT == "save":
        torch.save = struck_save
    else:
        raise SystemExit(f"{POINT} is no point of fault_job.py")


if __name__ == "__main__":
    if os.environ.get("RANK") == RANK:
        prepare_accident()
    raise SystemExit(main(sys.argv[1:]))
