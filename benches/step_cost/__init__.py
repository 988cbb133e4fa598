"""What a look at parameters and gradients adds to a training step on the CPU, tool by tool.

    python -m benches.step_cost                    seven minutes
    python -m benches.step_cost --only resnet,mlp
    python -m benches.step_cost --json FILE        for benches.report

In every turn each tool takes part in its own steps of one and the same training, and is detached
again. The order is drawn anew for every turn, so that no tool always follows the same one, and one
step goes by before the timed ones. What a tool adds is told from the same turn's steps without a
tool, so that a slow spell of the machine hits both.

wandb runs offline in a temporary folder, and what it does in its own process after a turn is waited
for; Lightning's norms are left as the tensors that its function returns.
"""
