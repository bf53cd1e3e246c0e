import random

import pytest
import torch
from tiny_models import tiny_policy

from sft.packing import IGNORE, TokenizedSample, pack_samples, plan_packs

PACK, PAD = 32, 0


def random_samples(count: int, seed: int, longest: int = PACK) -> list[TokenizedSample]:
    rng = random.Random(seed)
    samples = []
    for index in range(count):
        length = rng.randint(2, longest)
        samples.append(TokenizedSample(f"s{index}", [rng.randint(1, 299) for _ in range(length)],
                                       rng.randint(1, length - 1)))
    return samples


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_is_in_one_pack_and_packs_are_full(seed):
    rng = random.Random(seed)
    lengths = [min(4096, max(1, int(rng.lognormvariate(6.2, 0.8)))) for _ in range(3000)]
    plan = plan_packs(lengths, 4096)
    assert sorted(index for pack in plan for index in pack) == list(range(3000))
    assert all(sum(lengths[index] for index in pack) <= 4096 for pack in plan)
    assert sum(lengths) / (len(plan) * 4096) >= 0.98


def test_equal_lengths_and_single_samples_pack_exactly():
    assert [len(pack) for pack in plan_packs([8] * 8, 32)] == [4, 4]
    assert plan_packs([32], 32) == [[0]]
    assert plan_packs([], 32) == []


@pytest.mark.parametrize("length", [0, 33])
def test_a_length_that_fits_no_pack_is_an_error(length):
    with pytest.raises(ValueError, match=f"sample 1 has {length} tokens; packs hold 1 to 32"):
        plan_packs([5, length], 32)


def test_samples_too_long_are_reported_and_the_rest_is_packed():
    samples = [*random_samples(20, 0), TokenizedSample("long", [1] * (PACK + 1), 1)]
    table, too_long = pack_samples(samples, PACK, PAD, seed=0)
    assert too_long == ["long"]
    packed = [name for names in table["sample_ids"].to_pylist() for name in names]
    assert sorted(packed) == sorted(sample.id for sample in samples[:-1])


def test_a_pack_holds_its_samples_whole_with_loss_on_completions_alone():
    samples = random_samples(40, 1)
    by_id = {sample.id: sample for sample in samples}
    packs = pack_samples(samples, PACK, PAD, seed=0)[0].to_pylist()
    for pack in packs:
        assert len(pack["input_ids"]) == len(pack["labels"]) == len(pack["position_ids"]) == PACK
        start = 0
        for name in pack["sample_ids"]:
            sample = by_id[name]
            part = slice(start, start + len(sample.input_ids))
            assert pack["input_ids"][part] == sample.input_ids
            assert pack["labels"][part] == [IGNORE] * sample.prompt_length + sample.input_ids[sample.prompt_length:]
            assert pack["position_ids"][part] == list(range(len(sample.input_ids)))
            start = part.stop
        assert pack["input_ids"][start:] == [PAD] * (PACK - start)
        assert pack["labels"][start:] == [IGNORE] * (PACK - start)
        assert pack["position_ids"][start:] == list(range(PACK - start))


def test_the_order_of_packs_follows_the_seed():
    samples = random_samples(60, 2)
    assert pack_samples(samples, PACK, PAD, seed=1) == pack_samples(samples, PACK, PAD, seed=1)
    assert pack_samples(samples, PACK, PAD, seed=1) != pack_samples(samples, PACK, PAD, seed=2)


@torch.no_grad()
def test_packed_samples_are_isolated_so_logits_and_mtp_states_equal_those_of_each_alone():
    model = tiny_policy().eval()
    samples = random_samples(12, 3, longest=14)
    packs = pack_samples(samples, PACK, PAD, seed=0)[0].to_pylist()
    by_id = {sample.id: sample for sample in samples}
    assert max(len(pack["sample_ids"]) for pack in packs) > 1

    def run(ids, positions):
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return model.lm_head(hidden), model.mtp_hidden_states(hidden, ids, positions)

    logits, mtp = run(torch.tensor([pack["input_ids"] for pack in packs]),
                      torch.tensor([pack["position_ids"] for pack in packs]))
    for row, pack in enumerate(packs):
        start = 0
        for name in pack["sample_ids"]:
            ids = torch.tensor([by_id[name].input_ids])
            alone_logits, alone_mtp = run(ids, torch.arange(ids.shape[1])[None])
            end = start + ids.shape[1]
            torch.testing.assert_close(logits[row, start:end], alone_logits[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mtp[row, start:end - 1], alone_mtp[0], atol=1e-5, rtol=1e-5)
            start = end
