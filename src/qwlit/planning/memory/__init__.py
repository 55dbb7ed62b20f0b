"""How much memory a training takes on each device, counted before the weights are loaded.

No number is fitted to measurements. The model is built on the meta device, and each module counts bytes from its
shapes: `state` counts weights, gradients and the head; `unsharded` what FSDP2 gathers and reduces; `optimizer` the
optimizer's state, on the device or on the host; `activations` what autograd keeps of a forward pass, operator by
operator. `estimate` adds them up for the phases of a step in which memory can peak, and takes the largest sum;
`whole_run` does so for the phases of the run. `levels` lists what "auto" may choose, fastest first. The largest
micro-batch comes from the step plan, so the estimate is for this run's data. `python -m benchmarks.memory` compares the
estimate with what a training allocates.
"""
