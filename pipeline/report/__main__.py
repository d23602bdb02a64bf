"""`python -m pipeline.report RUN …`; see report.py."""

import os
import sys

from pipeline.run_dir import caches

if __name__ == "__main__":
    os.environ.update(caches.stand_ins(os.environ))  # before matplotlib looks for a home
    from pipeline.report.report import main

    raise SystemExit(main(sys.argv[1:]))
