"""A step in a process of its own: `python -m benchmarks.gpu.worker JOB`, with the job as JSON.

The job names the module and the function of the step, the file for its findings, and whether it is simulated.
"""

import importlib
import json
import sys


def main(job: dict) -> None:
    import torch

    from benchmarks.gpu.findings import Findings

    simulated = job["simulated"]
    findings = Findings(job["findings"], simulated=simulated)
    findings.options = job.get("options", {})
    if simulated:
        torch.set_num_threads(2)
        device = torch.device("cpu")
        if job["module"].startswith("benchmarks.gpu."):
            from benchmarks.gpu.device import interpret

            interpret()
    else:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    getattr(importlib.import_module(job["module"]), job["function"])(findings, device)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
