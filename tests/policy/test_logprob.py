import pytest
import torch
from tiny_models import tiny_policy
from trl.trainer.utils import add_fused_lm_head

from policy.kernels import cpu_logprob
from policy.kernels.logprob import IGNORE, add_logprob_head, linear_logprobs


def head(tokens: int, dtype: torch.dtype = torch.float32):
    """Hidden states 12 wide, a vocabulary of 40, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(tokens, 12, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(40, 12, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 40, (tokens,), generator=generator)


@pytest.fixture(params=[True, False], ids=["kept", "computed again"])
def in_chunks_of(request, monkeypatch):
    """Sets the tokens of a chunk; on both sides of the bound up to which logits are kept for the backward pass."""
    def set_to(tokens: int) -> None:
        monkeypatch.setattr(cpu_logprob, "CHUNK", tokens)
        monkeypatch.setattr(cpu_logprob, "KEPT_CHUNK", tokens)
        if not request.param:
            monkeypatch.setattr(cpu_logprob, "KEPT_BYTES", 0)

    return set_to


def from_logits(hidden, weight, targets, temperature):
    """The plain path in FP64: (log-probs, entropies)."""
    logprobs = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_values_and_gradients_are_those_of_the_whole_logits(tokens, temperature, in_chunks_of):
    in_chunks_of(8)
    hidden, weight, targets = head(tokens)
    expected = from_logits(hidden, weight, targets, temperature)
    found = linear_logprobs(hidden, weight, targets, temperature)
    slopes = torch.randn(2, tokens, generator=torch.Generator().manual_seed(2))
    for used in ((0,), (1,), (0, 1)):  # log-probs alone, entropies alone, both
        found = linear_logprobs(hidden, weight, targets, temperature)
        mine, theirs = (torch.autograd.grad(sum((slopes[i] * values[i]).sum() for i in used), (hidden, weight),
                                            retain_graph=True) for values in (found, expected))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    modes = (hidden @ weight.t()).argmax(-1)
    assert torch.equal(found[2], modes == targets)


def test_a_second_pass_through_a_retained_graph_gives_the_same_gradients(in_chunks_of):
    in_chunks_of(8)
    hidden, weight, targets = head(30)
    logprobs, entropies, _ = linear_logprobs(hidden, weight, targets, 0.6)
    loss = logprobs.sum() - 0.5 * entropies.sum()
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for first, second in zip(once, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bound", "passes"), [(4 * 30 * 40, 1), (4 * 30 * 40 - 1, 2)])
def test_logits_up_to_the_bound_are_computed_once(bound, passes, monkeypatch):
    monkeypatch.setattr(cpu_logprob, "KEPT_BYTES", bound)
    hidden, weight, targets = head(30)
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *operands, **kind: products.append(1) or mm(*operands, **kind))
    linear_logprobs(hidden, weight, targets)[0].sum().backward()
    assert len(products) == passes


def test_without_gradients_no_logits_are_kept(monkeypatch):
    monkeypatch.setattr(cpu_logprob, "room_to_keep", lambda *_: pytest.fail("took room for all logits"))
    with torch.no_grad():
        linear_logprobs(*head(30))


def test_large_logits_neither_overflow_nor_lose_the_entropy():
    hidden, weight, targets = head(6)
    logprobs, entropies, _ = linear_logprobs(hidden * 500, weight, targets)
    assert logprobs.isfinite().all() and entropies.isfinite().all() and (entropies > -1e-4).all()


def test_bfloat16_states_give_log_probs_that_were_never_rounded_to_bfloat16():
    hidden, weight, targets = head(64, torch.bfloat16)
    exact, _ = from_logits(hidden, weight, targets, 1.0)
    mine = (linear_logprobs(hidden, weight, targets)[0] - exact).abs().max()
    rounded = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None])[:, 0]
    assert mine < 1e-4 < (rounded - exact).abs().max()


def test_gradients_of_a_bfloat16_head_are_off_by_its_rounding_alone(in_chunks_of):
    in_chunks_of(16)
    hidden, weight, targets = head(64, torch.bfloat16)
    for mine, theirs in zip(*(torch.autograd.grad((values[0] - 0.5 * values[1]).sum(), (hidden, weight)) for values in (
            linear_logprobs(hidden, weight, targets), from_logits(hidden, weight, targets, 1.0))), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs.double()).norm() < 5e-3 * theirs.double().norm()


def test_the_head_returns_what_that_of_trl_does(in_chunks_of):
    in_chunks_of(5)
    ids = torch.randint(40, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :9], labels[1, 12:] = IGNORE, IGNORE
    theirs, mine = tiny_policy(), tiny_policy()
    add_fused_lm_head(theirs, temperature=0.7, outputs=("log_probs", "entropy", "is_top1"))
    add_logprob_head(mine, temperature=0.7)
    a, b = (model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (mine, theirs))
    assert torch.equal(a.label_mask, b.label_mask) and torch.equal(a.is_top1.bool(), b.is_top1.bool())
    for key in ("log_probs", "entropy"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
    a.log_probs.sum().backward()
    b.log_probs.sum().backward()
    for (name, x), (_, y) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits)


def test_a_batch_without_labels_trains_nothing_and_does_not_fail():
    model = tiny_policy()
    add_logprob_head(model)
    ids = torch.arange(40, 56)[None]
    output = model(input_ids=ids, labels=torch.full_like(ids, IGNORE), fused_lm_head=True)
    output.log_probs.sum().backward()
    assert not output.log_probs.any() and not output.label_mask.any()


def test_models_that_change_logits_behind_the_head_keep_the_head_of_trl():
    model = tiny_policy()
    model.config.final_logit_softcapping = 30.0
    before = model.forward
    add_logprob_head(model)
    assert model.forward == before
