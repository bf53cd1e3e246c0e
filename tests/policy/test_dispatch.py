import pytest
import torch

from pipeline.stage import StageError
from policy.parallel.dispatch import TILE, pack_fp8, unpack_fp8
from policy.parallel.pipeline import split_layers


@pytest.mark.parametrize("hidden", [32, 128, 200, 512])
def test_rows_travel_in_one_byte_a_value_and_one_a_tile(hidden):
    rows = torch.randn(7, hidden, generator=torch.Generator().manual_seed(0))
    packed = pack_fp8(rows)
    tiles = -(-hidden // TILE)
    assert packed.dtype == torch.uint8 and packed.shape == (7, tiles * TILE + tiles)
    back = unpack_fp8(packed, hidden, torch.float32)
    assert back.shape == rows.shape
    assert (back - rows).norm() / rows.norm() < 0.04


def test_each_tile_has_the_smallest_power_of_two_that_keeps_it_in_range():
    rows = torch.tensor([[448.0], [448.1], [224.0], [1.0], [1e-4], [0.0], [3e4]]).repeat(1, TILE)
    packed = pack_fp8(rows)
    exponents = packed[:, TILE].int() - 127
    assert exponents.tolist() == [0, 1, -1, -8, -22, -22, 7]
    back = unpack_fp8(packed, TILE, torch.float32)
    assert torch.equal(back[[0, 2, 3, 5]], rows[[0, 2, 3, 5]])  # powers of two and 1.75 times one are exact
    assert ((back - rows).abs() <= rows / 16).all()


def test_values_of_one_tile_do_not_touch_those_of_another():
    rows = torch.randn(3, 2 * TILE, generator=torch.Generator().manual_seed(1))
    alone = unpack_fp8(pack_fp8(rows), 2 * TILE, torch.float32)[:, :TILE]
    rows[:, TILE:] *= 1e6
    assert torch.equal(unpack_fp8(pack_fp8(rows), 2 * TILE, torch.float32)[:, :TILE], alone)


def test_what_came_back_travels_again_unchanged():
    """Scales are powers of two, so a second trip, or tiles the other way, add no error."""
    rows = torch.randn(5, TILE, generator=torch.Generator().manual_seed(2))
    once = unpack_fp8(pack_fp8(rows), TILE, torch.float32)
    assert torch.equal(unpack_fp8(pack_fp8(once), TILE, torch.float32), once)
    assert torch.equal(once.bfloat16().float(), once)


def test_no_rows_travel_too():
    assert unpack_fp8(pack_fp8(torch.zeros(0, 200)), 200, torch.bfloat16).shape == (0, 200)


@pytest.mark.parametrize(("main", "layers", "stages", "sizes"), [
    (3, 4, 4, [1, 1, 1, 1]), (61, 62, 32, [1] + [2] * 15 + [1] + [2] * 15), (8, 10, 4, [2, 2, 2, 4])])
def test_layers_are_spread_over_stages_with_mtp_in_the_last(main, layers, stages, sizes):
    ranges = split_layers(main, layers, stages)
    assert [layer for part in ranges for layer in part] == list(range(layers))
    assert sorted(map(len, ranges)) == sorted(sizes)
    assert set(range(main, layers)) <= set(ranges[-1])


def test_fewer_layers_than_stages_is_a_clear_error():
    with pytest.raises(StageError, match="8 stages .* the policy has 4: start at most 2 processes"):
        split_layers(3, 4, 8)
