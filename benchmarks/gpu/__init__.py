"""What `python -m benchmarks.gpu_check` runs: each file has steps of one kind."""
