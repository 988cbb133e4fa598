"""Measures how much time each tool adds to a training step.

    python -m benches.step_cost                      seven minutes on a CPU
    python -m benches.step_cost --only resnet,mlp
    python -m benches.step_cost --json FILE          write the results for benches.report

In each turn, every tool is attached to the same training for some steps and detached again. The
order is random, and the first steps with a tool are not timed. The time that a tool adds is the
difference to the steps without a tool in the same turn, so that changes in the load of the machine
affect both.

wandb runs offline in a temporary folder. The benchmark waits for its process after each turn.
Lightning's norms stay tensors, as its function returns them.
"""
