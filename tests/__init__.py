"""Tests; what starts other processes takes their XLA flags from here."""

# toy programs are compiled far longer than they run: half of that time is LLVM's optimising
QUICK_COMPILE = "--xla_backend_optimization_level=0"
