"""The kernels of the CPU: native code, what it is told, and when it pays."""
