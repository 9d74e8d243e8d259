"""`mmsdk bench NAME`: each claim as a measurement that can be run; see `mmsdk.bench.runner.BENCHMARKS`."""
