"""What the trackers' own libraries read from their files: each curve as `{step: value}`, no step twice."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path


def tensorboard_curve(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars(name)
    assert len({event.step for event in events}) == len(events), "a step twice"
    return {event.step: event.value for event in events}


def wandb_curve(folder: Path, name: str) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    (file,) = folder.glob("offline-run-*/run-*.wandb")
    curve: dict[int, float] = {}
    for data in leveldb_log(file.read_bytes()[7:], offset=7):  # behind W&B's own header
        record = Record()
        record.ParseFromString(data)
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if name in items:
            assert items["_step"] not in curve, "a step twice"
            curve[items["_step"]] = items[name]
    return curve


def leveldb_log(content: bytes, *, offset: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: whole or cut, in blocks of 32 KiB that begin `offset` bytes before."""
    at, record = 0, b""
    while at + 7 <= len(content):
        room = 32768 - (at + offset) % 32768
        if room < 7:  # padding
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def mlflow_curve(folder: Path, name: str) -> dict[int, float]:
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.absolute()}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "chispike"]
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, name)
    assert len({point.step for point in points}) == len(points), "a step twice"
    return {point.step: point.value for point in points}
