"""The README's training example, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import fastconfig as fc
from fastconfig.demos.burgers_problem import BurgersNetwork, Problem

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_the_m_config_example_trains_the_demos_network():
    (block,) = [block for block in BLOCKS if "opt.record(" in block]
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["opt"].combination.weights.all()

    def losses(network):
        problem = Problem(seed=1, device=torch.device("cpu"))
        return [float(problem.loss(network, i).detach()) for i in range(3)]

    untrained, trained = losses(BurgersNetwork(seed=0)), losses(names["model"])
    assert sum(trained) < 0.5 * sum(untrained)
    assert trained[2] < 0.2 * untrained[2]


def test_the_step_at_the_features_runs():
    (block,) = [block for block in BLOCKS if "fc.backward(" in block]
    trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(3)]
    head_losses = [lambda z, head=head: head(z).square().mean() for head in heads]
    names = {"fc": fc, "trunk": trunk, "x": torch.randn(6, 4), "head_losses": head_losses}
    exec(compile(block, "README.md", "exec"), names)
    assert names["info"].cosines.shape == (3, 3)
    assert trunk.weight.grad.any()
