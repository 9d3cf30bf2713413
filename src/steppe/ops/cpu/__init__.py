"""The kernels of the CPU: native code, its callers, and when it pays."""
