"""torch.compile(model, backend="lowering")."""

import torch
from torch import nn

import lowering  # noqa: F401  registers the operations


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256))

    def forward(self, x):
        y = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        q, scale = torch.ops.lowering.group_quant(y, 128)
        return q, scale, torch.relu(y)


def test_a_model_through_torch_compile() -> None:
    model = Model().eval()
    compiled = torch.compile(model, backend="lowering")
    for rows in (3, 5):
        # Small integers: their squares add up exactly in any order, so results are equal bit for bit.
        x = torch.randint(-8, 9, (rows, 256)).float()
        for ours, eager in zip(compiled(x), model(x), strict=True):
            assert torch.equal(ours.float(), eager.float())
