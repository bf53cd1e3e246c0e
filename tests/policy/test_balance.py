import pytest
import torch
import two_processes
from tiny_models import tiny_policy

from policy.balance import RouterProbe

LENGTHS = ((9, 7), (16,), (5, 4, 3), (11, 2))  # samples of each pack of 16 tokens; the rest is padding
PAD = 0


def packs():
    """input_ids, position_ids and mask, [4, 16] each; padding at the end has positions of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (4, 16), generator=generator)
    positions, mask = torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in (*lengths, 16 - sum(lengths)):
            positions[row, start:start + length] = torch.arange(length)
            start += length
        ids[row, sum(lengths):] = PAD
        mask[row, :sum(lengths)] = True
    return ids, positions, mask


def forward(model, probe, ids, positions, mask, mtp=True):
    probe.begin(mask)
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    if mtp:
        model.mtp_hidden_states(hidden, ids, positions)


def paper_loss(scores, top_k):
    """Equations 17 to 20 of DeepSeek-V3 for one sequence, spelled out; scores: [tokens, experts] in (0, 1)."""
    tokens, experts = scores.shape
    loss = 0.0
    for i in range(experts):
        chosen = sum(1 for t in range(tokens) if i in scores[t].topk(top_k).indices.tolist())
        f_i = experts / (top_k * tokens) * chosen
        p_i = sum(float(scores[t, i] / scores[t].sum()) for t in range(tokens)) / tokens
        loss += f_i * p_i
    return loss


@pytest.fixture
def model():
    return tiny_policy().train()


def test_routers_stand_in_layer_order_with_the_mtp_router_last(model):
    probe = RouterProbe(model)
    assert probe.routers == [model.model.layers[layer].mlp.gate for layer in (1, 2, 3)]


def test_loads_count_every_token_but_padding(model):
    probe = RouterProbe(model)
    ids, positions, mask = packs()
    forward(model, probe, ids, positions, mask)
    tokens, of_mtp = int(mask.sum()), int(mask[:, :-1].sum())
    assert probe.loads.sum(1).tolist() == [2 * tokens, 2 * tokens, 2 * of_mtp]
    before = probe.loads.clone()
    ids[~mask] = 7  # what the padding holds makes no difference
    probe.reset()
    forward(model, probe, ids, positions, mask, mtp=False)
    assert torch.equal(probe.loads[:2], before[:2])


def test_passes_without_gradient_are_not_counted(model):
    probe = RouterProbe(model)
    with torch.no_grad():
        forward(model, probe, *packs())
    assert probe.loads.sum() == 0 and probe.max_violation() == 0.0


def test_the_balance_loss_is_that_of_the_paper_over_each_sample(model):
    probe = RouterProbe(model)
    ids, positions, mask = packs()
    forward(model, probe, ids, positions, mask)
    expected = 0.0
    for index, (_, logits) in enumerate(probe.logits):
        width = 15 if index == 2 else 16  # the MTP module sees every row without its last token
        rows = logits.detach().double().sigmoid().view(4, width, -1)
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for length in lengths:
                sequence = rows[row, start:min(start + length, width)]
                expected += paper_loss(sequence, 2) * len(sequence) / 64
                start += length
    assert probe.balance_loss(positions, 64).item() == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_does_not_depend_on_how_a_step_is_cut(model):
    probe = RouterProbe(model)
    ids, positions, mask = packs()
    totals = []
    for size in (1, 2, 4):
        total = 0.0
        for start in range(0, 4, size):
            part = slice(start, start + size)
            forward(model, probe, ids[part], positions[part], mask[part])
            total += probe.balance_loss(positions[part], 64).item()
        totals.append(total)
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-6)


def test_the_balance_loss_trains_routers_and_never_the_bias(model):
    probe = RouterProbe(model)
    ids, positions, mask = packs()
    model.zero_grad()
    before = [router.e_score_correction_bias.clone() for router in probe.routers]
    forward(model, probe, ids, positions, mask)
    probe.balance_loss(positions, 64).backward()
    for router, bias in zip(probe.routers, before, strict=True):
        assert router.weight.grad.abs().sum() > 0
        assert router.e_score_correction_bias.grad is None and not router.e_score_correction_bias.requires_grad
        assert torch.equal(router.e_score_correction_bias, bias)
    assert not [name for name, _ in model.named_parameters() if "correction_bias" in name]


def test_one_update_moves_each_bias_by_gamma_against_its_load():
    model = tiny_policy().train()
    probe = RouterProbe(model)
    forward(model, probe, *packs())
    before = [router.e_score_correction_bias.clone() for router in probe.routers]
    probe.update_bias(0.01)
    for router, bias, load in zip(probe.routers, before, probe.loads.float(), strict=True):
        step = router.e_score_correction_bias - bias
        assert torch.allclose(step, 0.01 * torch.sign(load.mean() - load), atol=1e-7)
        assert step[load.argmax()] < 0 < step[load.argmin()]


def test_bias_moves_load_towards_the_mean():
    model = tiny_policy().train()
    probe = RouterProbe(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 300, (16, 64), generator=generator)
    positions = torch.arange(64).expand(16, -1)
    violations = []
    for _ in range(40):
        probe.reset()
        forward(model, probe, ids, positions, torch.ones_like(ids, dtype=torch.bool))
        violations.append(probe.max_violation())
        probe.update_bias(0.005)
    assert violations[-1] < 0.5 * violations[0]


def test_no_token_is_dropped_and_one_sent_to_no_expert_would_be_counted(model):
    probe = RouterProbe(model)
    forward(model, probe, *packs())
    assert probe.tokens.tolist() == [int(packs()[2].sum())] * 2 + [int(packs()[2][:, :-1].sum())]
    assert probe.dropped() == 0

    def capacity(router, inputs, output):
        """Two tokens lose an expert, as where experts have a capacity."""
        logits, weights, chosen = output
        chosen = chosen.clone()
        chosen[0, 1], chosen[5, 0] = router.num_experts, -1
        return logits, weights, chosen

    probe.routers[0].register_forward_hook(capacity, prepend=True)
    probe.reset()
    probe.begin(packs()[2])
    probe.routers[0](torch.randn(64, 32))
    assert probe.dropped() == 2


def test_two_processes_move_the_bias_by_the_load_of_both(tmp_path):
    torch.multiprocessing.spawn(two_processes.work, (str(tmp_path),), nprocs=2)
    gates, probe = two_processes.probed(slice(0, 4))
    probe.update_bias(0.01)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["loads"], probe.loads) and torch.equal(found["tokens"], probe.tokens)
        assert all(torch.equal(bias, gate.e_score_correction_bias) for bias, gate in zip(found["bias"], gates,
                                                                                         strict=True))
    for half in (slice(0, 2), slice(2, 4)):  # half the load alone would have moved it elsewhere
        other, own = two_processes.probed(half)
        own.update_bias(0.01)
        assert not torch.equal(other[0].e_score_correction_bias, gates[0].e_score_correction_bias)
