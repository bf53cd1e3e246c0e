"""What the log-prob proof forgives and what it does not, without an engine: a second model stands in for it."""

import copy

import torch
from tiny_models import scatter_biases, tiny_policy

from rl.sync import PROBE_LENGTHS, logprob_error

BOUND = 1e-4


class ModelAsEngine:
    """Answers like an engine that runs `model`."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def prompt_logprobs(self, prompts):
        answers = []
        for ids in map(torch.tensor, prompts):
            logits = self.model(input_ids=ids[None]).logits[0]
            answers.append(torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[:, 0].tolist())
        return answers


def policy():
    model = tiny_policy(hidden_size=128, layers=3, max_length=64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    scatter_biases(model, 1)
    return model.eval()


def last_moe(model):
    return model.model.layers[model.config.num_hidden_layers - 1].mlp  # the list ends with the MTP module


def probes(model):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
            for length in PROBE_LENGTHS]


@torch.no_grad()
def tie_two_experts(model, position):
    """Let the last expert chosen and the first left out tie at one position of the longest prompt; return its name."""
    gate, ids, seen = last_moe(model).gate, torch.tensor(probes(model)[-1]), []
    handle = gate.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(input_ids=ids[None])
    handle.remove()
    config, bias = model.config, gate.e_score_correction_bias
    scores = (seen[0].reshape(len(ids), -1)[position] @ gate.weight.T).sigmoid() + bias
    groups = scores.view(config.n_group, -1).topk(2).values.sum(-1).topk(config.topk_group).indices
    allowed = torch.zeros(config.n_group).index_fill(0, groups, 1).repeat_interleave(len(scores) // config.n_group) > 0
    ranked = scores.masked_fill(~allowed, 0).argsort(descending=True)
    inside, outside = ranked[config.num_experts_per_tok - 1], ranked[config.num_experts_per_tok]
    bias[outside] += scores[inside] - scores[outside]
    return outside


def test_a_tie_between_two_experts_is_not_a_mismatch():
    ours = policy()
    expert = tie_two_experts(ours, position=40)
    theirs = []
    for nudge in (-1e-6, 1e-6):  # rounding decides which of the two is chosen
        model = copy.deepcopy(ours)
        last_moe(model).gate.e_score_correction_bias[expert] += nudge
        theirs.append(ModelAsEngine(model))
    answers = [torch.tensor(engine.prompt_logprobs([list(range(8))])[0]) for engine in theirs]
    assert torch.allclose(*answers, atol=BOUND)  # the same weights wherever there is no tie
    first, second = (torch.tensor(engine.prompt_logprobs(probes(ours))[-1]) for engine in theirs)
    assert (first - second).abs().max() > 10 * BOUND  # far apart at the tie
    assert all(logprob_error(ours, engine, BOUND) <= BOUND for engine in theirs)


def test_a_tie_does_not_hide_an_expert_that_differs():
    ours = policy()
    tie_two_experts(ours, position=40)
    theirs = copy.deepcopy(ours)
    with torch.no_grad():
        last_moe(theirs).experts.down_proj[3] *= 1.5
    assert logprob_error(ours, ModelAsEngine(theirs), BOUND) > 10 * BOUND
