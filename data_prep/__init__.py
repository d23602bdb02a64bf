"""Images → shards. Its command ends here, in one line, where it cannot run: on another system, another Python."""

import sys

import pipeline

if pipeline.unsupported():
    print(f"error: {pipeline.unsupported()}", file=sys.stderr)
    raise SystemExit(64)
