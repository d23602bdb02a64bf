"""What people start. Its commands end here, in one line, where they cannot run: on another system, another Python."""

import sys

import pipeline

if pipeline.unsupported():
    print(f"error: {pipeline.unsupported()}", file=sys.stderr)
    raise SystemExit(64)
