"""The environment of a process that scores on a CPU. It must be set before the process starts."""

CPU_SCORER = {
    # Idle OpenMP threads that spin for long take the cores from the decoders: measured, four times
    # slower on two busy cores. Those that never spin are woken for every small layer: a third of
    # the time of a 512x384 frame in 8 or 16 bits. So they spin for some 50 microseconds.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    # Giving large buffers back to the kernel after every layer costs a tenth to a third of the time
    # in page faults. Only whole maps of more than a megapixel, a few in a frame, are given back:
    # holes where they were would hold a 4K frame's memory up by a third.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
