"""One side of the speed step, in its own process and environment: trains when a line on standard input asks for it.

The first line is a JSON object that says what to build; each further line a number of steps. Every answer is one JSON
line: seconds a step and peak memory, or `failed` with the reason. The peer needs torch and SpikingJelly only.
"""

import json
import os
import sys
import time
from importlib.metadata import version

import torch
from torch.nn import functional

from benchmarks.gpu.findings import reason
from benchmarks.train_step_side import our_network, peer_network

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print is not an answer


class Trainer:
    """A network, its optimizer and its images on the device."""

    def __init__(self, job: dict) -> None:
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.job, self.device = job, torch.device(job["device"])
        peer = job["side"] == "peer"
        if peer:
            self.network, self.forward = peer_network(job["arch"], job["T"])
            self.network.to(self.device)
            if job["channels_last"]:
                self.network.to(memory_format=torch.channels_last)
        else:
            self.network = our_network(job["arch"], job["T"], False, False, job["surrogate"])[0].to(self.device)
            self.forward = self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        self.graphed = None
        warm_up = 2
        if job["side"] == "ours, χ":
            from pipeline import chi

            self.pilot = chi.attach(self.network, self.optimizer, steps=10_000)  # it ends with the last reference
        elif job["side"] in ("ours", "ours, graph"):
            from pipeline.snn import graphed_pass, neurons

            state = neurons.bind(self.network)
            if job["side"] == "ours, graph":
                replay = graphed_pass.CudaReplay if self.device.type == "cuda" else graphed_pass.HostReplay
                self.graphed = graphed_pass.record_passes(self.network, state, replay)
                warm_up += graphed_pass.AS_IT_IS
        shape = (job["batch"], 3, job["size"], job["size"])
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        if not peer or job["channels_last"]:
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.zeros(job["batch"], dtype=torch.int64, device=self.device)
        fp16 = job["dtype"] == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)  # pyright: ignore
        for _ in range(warm_up):  # compiles, chooses convolutions, records
            self.step()
        self._give_back()

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, DTYPES[self.job["dtype"]]):
            logits = self.forward(self.images)
        loss = functional.cross_entropy(logits.float().mean(0), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def turn(self, steps: int) -> dict:
        """One step to warm up, then `steps` timed; the memory is given back, for the other side's turn."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.step()
        self._wait()
        replays = self.graphed.replays if self.graphed else 0
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        seconds = (time.perf_counter() - began) / steps
        if self.graphed and self.graphed.replays != replays + steps:
            raise RuntimeError(
                f"{self.graphed.replays - replays} of {steps} passes were replayed; the others ran as they are"
            )
        answer = {"seconds": seconds, "images_per_s": self.job["batch"] / seconds}
        if cuda:
            answer["reserved_bytes"] = torch.cuda.max_memory_reserved()
            if not self.graphed:  # what lives inside a replayed graph is not counted as allocated
                answer["allocated_bytes"] = torch.cuda.max_memory_allocated()
        self._give_back()
        return answer

    def launches(self) -> dict:
        """Kernels and graphs that the host launches in one step."""
        self.step()
        self._wait()
        with torch.profiler.profile() as profile:
            self.step()
            self._wait()
        counted = sum(event.count for event in profile.key_averages() if event.key in LAUNCHES)
        return {"launches": counted or None}  # 0: the profiler saw no launch

    def _give_back(self) -> None:
        if self.device.type == "cuda":
            self.optimizer.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    trainer = None
    try:
        trainer = Trainer(job)
        first = {"torch": torch.__version__, "version": version("spikingjelly") if job["side"] == "peer" else ""}
    except Exception as error:  # told to the one who asked
        first = {"torch": torch.__version__, "failed": reason(error)}
    answers.write(json.dumps(first) + "\n")
    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            assert trainer is not None
            answer = trainer.launches() if wanted == "launches" else trainer.turn(wanted)
        except Exception as error:
            answer = {"failed": reason(error)}
            if trainer is not None and trainer.device.type == "cuda":
                torch.cuda.empty_cache()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
