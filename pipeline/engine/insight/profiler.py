"""torch's profiler over a few steps of rank 0: it shows where the time of a step goes.

RUN/profile/steps-6-8.json    a trace for chrome://tracing or ui.perfetto.dev
RUN/profile/steps-6-8.txt     its operators, sorted by their own time
"""

from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

SETTLE = 5  # steps before the first recorded one: these allocate memory, compile, and run self-checks


class Profiler:
    """Records steps of this process from `SETTLE` + 1 on; with `num_steps` 0 every call does nothing.

    Args:
        folder: the run's folder.
        num_steps: how many steps to record.
        step: optimizer steps before this process.
    """

    def __init__(self, folder: Path, num_steps: int, step: int) -> None:
        self._folder, self._first = folder / "profile", step + SETTLE + 1
        self._profile: profile | None = None
        if num_steps:
            plan = schedule(wait=SETTLE - 1, warmup=1, active=num_steps, repeat=1)
            self._profile = profile(activities=supported_activities(), schedule=plan, on_trace_ready=self._keep)
            self._last = self._first + num_steps - 1
            self._profile.start()

    def after_step(self, _step: int) -> None:
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Ends the recording; if the run ends early, writes what was recorded so far."""
        if self._profile is not None:
            self._profile.stop()

    def _keep(self, recorded: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._last}"
        recorded.export_chrome_trace(f"{path}.json")
        table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        path.with_suffix(".txt").write_text(table, encoding="utf-8")
