"""How much memory a training takes on each device, counted before there are weights.

Nothing is fitted to measurements. The model is built on the meta device, and each module counts one kind of bytes from
its shapes: `state` what is there all the time (weights, gradients) and what the head and unsharded layers take,
`optimizer` the moments, `activations` what autograd keeps of a forward pass, operator by operator. `estimate` adds them
up at the three moments of a step when a device may be fullest, and takes the fullest. The largest micro-batch comes
from the step plan, so the estimate is of this run's data. `python -m benchmarks.memory` compares the sums with what a
training allocates.
"""
