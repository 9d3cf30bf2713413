"""The backend of CUDA devices: decode by the kernels in captured CUDA graphs, dense elsewhere.

In eager Python the launches of a block take longer than the kernels save; in a graph they cost
nothing. A graph replays what was captured, so it reads the copies that the kernels had then. Hence
the two conditions: the call is being captured, and the user has promised that weights are final.

`backend` has the device, `block` the calls of one block and the choice of their way, `copies` the
weights as the kernels read them, `limits` the densities up to which they pay, and `device` what is
asked of CUDA. The kernels are in `steppe.ops.cuda`, which needs Triton; nothing here does.
"""
