"""What each of two processes does in test_balance; it imports torch alone, as a new process takes long enough."""

import torch
from torch import distributed, nn

from policy.balance import RouterProbe
from policy.kernels.router import route


class Gate(nn.Module):
    """A router of 8 experts, top-2, with the names the probe reads."""

    num_experts, top_k = 8, 2

    def __init__(self, seed: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("e_score_correction_bias", torch.zeros(8))

    def forward(self, hidden):
        logits = hidden.flatten(0, 1) @ self.weight.T
        indices, weights = route(logits, self.e_score_correction_bias, 4, 2, 2, 2.5, True)
        return logits, weights, indices


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [4, 10, 16] and mask [4, 10]; the second half of the rows is unlike the first."""
    hidden = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(7))
    hidden[2:] += 1
    return hidden, torch.arange(10) < torch.tensor([[10], [4], [9], [7]])


def probed(rows: slice) -> tuple[nn.Sequential, RouterProbe]:
    """Two gates that have seen some rows of the batch."""
    gates = nn.Sequential(Gate(0), Gate(1))
    probe, (hidden, mask) = RouterProbe(gates), batch()
    probe.begin(mask[rows])
    for gate in gates:
        gate(hidden[rows])
    return gates, probe


def work(rank: int, folder: str) -> None:
    """Half of the batch, then one bias update by the load of both processes."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gates, probe = probed(slice(2 * rank, 2 * rank + 2))
    probe.sum_over_ranks()
    probe.update_bias(0.01)
    torch.save({"bias": [gate.e_score_correction_bias for gate in gates], "loads": probe.loads,
                "tokens": probe.tokens}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
