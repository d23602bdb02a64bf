"""Images → shards. On a system or a Python that is not supported the command ends here, with one line."""

import sys

import pipeline

if pipeline.unsupported():
    print(f"error: {pipeline.unsupported()}", file=sys.stderr)
    raise SystemExit(64)
