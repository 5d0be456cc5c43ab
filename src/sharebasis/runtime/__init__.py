"""The machine: devices, threads, matrix products, progress."""
