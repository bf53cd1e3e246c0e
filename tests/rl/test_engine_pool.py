"""The pool over engines that are plain objects; real ones, one of them killed, are in test_engine.py."""

import threading
import time

import pytest

from pipeline.stage import StageError
from rl.engine import EngineDied, Generation, Request, Sampling
from rl.engine_pool import MOST_KILLED, RESTARTS, EnginePool

SAMPLING = Sampling(1.0, 8)


class Engines:
    """Starts engines that answer with their request's seed, and die as `dies(index, life, batch)` says.

    dies gets None for the batch at the start of an engine. A fake, because a vLLM engine takes longer to start than
    all tests here.
    """

    def __init__(self, dies=lambda index, life, batch: False, seconds=0.0):
        self.dies, self.seconds, self.lives, self.lock = dies, seconds, {}, threading.Lock()
        self.answered, self.killed = [], []

    def __call__(self, index):
        with self.lock:
            life = self.lives[index] = self.lives.get(index, -1) + 1
        if self.dies(index, life, None):
            raise EngineDied(f"engine {index} did not start")
        return Living(self, index, life)


class Living:
    def __init__(self, engines, index, life):
        self.engines, self.index, self.life = engines, index, life

    def generate(self, requests, sampling):
        time.sleep(self.engines.seconds)
        if self.engines.dies(self.index, self.life, requests):
            raise EngineDied(f"engine {self.index} died")
        self.engines.answered.append((self.index, self.life))
        return [Generation((request.seed,), (0.0,), "stop") for request in requests]

    def kill(self):
        self.engines.killed.append((self.index, self.life))


def batches(count, size=2):
    return [[Request((1,), size * batch + place) for place in range(size)] for batch in range(count)]


def seeds(found):
    """The seeds of all generations in the order of the batches, which came in any."""
    return [generation.token_ids[0] for _, generations in sorted(found, key=lambda item: item[0])
            for generation in generations]


def pool(engines, count=3, notes=None):
    return EnginePool(engines, count, (notes if notes is not None else []).append)


def test_batches_go_to_every_engine_and_each_is_answered_once():
    engines = Engines(seconds=0.02)
    with pool(engines) as opened:
        assert seeds(opened.generate_batches(batches(12), SAMPLING)) == list(range(24))
        found = opened.generate([Request((1,), seed) for seed in range(7)], SAMPLING)
        assert [generation.token_ids for generation in found] == [(seed,) for seed in range(7)]
        assert opened.generate([], SAMPLING) == []
    assert {index for index, _ in engines.answered} == {0, 1, 2} and len(engines.answered) == 12 + 3


def test_a_dead_engines_batch_goes_to_the_others_and_it_starts_again():
    notes, engines = [], Engines(lambda index, life, batch: index == 1 and life == 0 and batch is not None, 0.01)
    with pool(engines, 2, notes) as opened:
        assert seeds(opened.generate_batches(batches(12), SAMPLING)) == list(range(24))
    assert engines.killed == [(1, 0)] and engines.lives == {0: 0, 1: 1}
    assert notes == ["engine 1 of 2 died and is started again; its work goes to the others: engine 1 died"]


def test_an_engine_that_dies_again_and_again_is_given_up_and_the_others_do_the_work():
    notes, engines = [], Engines(lambda index, life, batch: index == 1, 0.01)
    with pool(engines, 2, notes) as opened:
        assert seeds(opened.generate_batches(batches(30), SAMPLING)) == list(range(60))
        while len(notes) < RESTARTS + 1:
            time.sleep(0.01)
    assert engines.lives[1] == RESTARTS and "is given up" in notes[-1]
    assert {index for index, _ in engines.answered} == {0}


def test_work_begins_while_an_engine_has_no_place_yet():
    placed = threading.Event()
    engines = Engines(lambda index, life, batch: bool(index) and not placed.wait(10))
    with pool(engines, 2) as opened:
        assert seeds(opened.generate_batches(batches(4), SAMPLING)) == list(range(8))
        placed.set()


def test_the_run_stops_when_no_engine_is_left():
    with pool(Engines(lambda index, life, batch: True), 2) as opened:
        for _ in range(2):  # whoever asks later is told as well
            with pytest.raises(StageError, match=f"no engine is left: each of 2 died {RESTARTS + 1} times"):
                list(opened.generate_batches(batches(4), SAMPLING))


def test_a_batch_that_kills_every_engine_stops_the_run_after_the_other_batches():
    engines = Engines(lambda index, life, batch: batch is not None and batch[0].seed == 4)
    found = []
    with pool(engines, 4) as opened, pytest.raises(StageError, match=f"{MOST_KILLED} engines died.* of one batch of 2"):
        for lot in opened.generate_batches(batches(6), SAMPLING):
            found.append(lot)
    assert len(engines.killed) == MOST_KILLED
    assert seeds(found) == [seed for seed in range(12) if seed not in (4, 5)]


def test_an_engine_that_does_not_hold_its_weights_stops_the_run():
    def start(index):
        raise StageError("weight sync: log-probs differ")

    with EnginePool(start, 2, print) as opened, pytest.raises(StageError, match="log-probs differ"):
        list(opened.generate_batches(batches(2), SAMPLING))


def test_closing_waits_for_no_engine():
    waiting = threading.Event()
    opened = pool(Engines(lambda index, life, batch: not waiting.wait(10)), 2)
    opened.generate_batches(batches(3), SAMPLING)
    opened.close()
    waiting.set()
