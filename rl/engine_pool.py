"""Several engines behind one door: each batch goes to whichever is free, a dead engine's batch to another.

For work in which any engine can answer any request, such as generating the SFT set: weights that move, as in GRPO,
need one engine and its proof.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ray.exceptions import RayError

from pipeline.stage import StageError
from pipeline.threads import as_finished
from rl.engine import EngineDied, Generation, Request, Sampling

RESTARTS = 3  # of each engine
MOST_KILLED = 3  # engines by one batch: then it is the batch


class Engine(Protocol):
    """What the pool asks of an engine; `rl.engine.RolloutEngine` is one."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]: ...

    def kill(self) -> None: ...


@dataclass
class _Slot:
    index: int
    engine: Engine | None = None
    deaths: int = 0


class EnginePool:
    """`count` engines, each started by `start(index)` in a thread of its own; use `with`, or `close` it.

    start: returns an engine that is ready, or raises EngineDied, after which it is called again, up to RESTARTS times
    an engine; any other StageError ends the pool's work. Work begins with the first engine that is ready, so one that
    has no place on the cluster yet holds up nothing. note: told of deaths.
    """

    def __init__(self, start: Callable[[int], Engine], count: int, note: Callable[[str], None] = print) -> None:
        self._start, self._note, self.count = start, note, count
        self._free: queue.Queue[_Slot | None] = queue.Queue()  # None: no engine is left
        self._lock = threading.Lock()
        self._left = count
        self._failure: StageError | None = None
        self._closed = False
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="engine-pool")
        for index in range(count):
            self._launch(_Slot(index))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """A generation per request, in order, spread over the engines. Raises StageError when none is left."""
        size = max(1, -(-len(requests) // self.count))
        batches = [requests[start:start + size] for start in range(0, len(requests), size)]
        found = dict(self.generate_batches(batches, sampling))
        return [generation for place in range(len(batches)) for generation in found[place]]

    def generate_batches(self, batches: Sequence[Sequence[Request]], sampling: Sampling
                         ) -> Iterator[tuple[int, list[Generation]]]:
        """(place among the batches, its generations), as they are finished. Raises StageError when no engine is left.

        When one batch fails for good, those under way still come before the error is raised.
        """
        return as_finished({self._threads.submit(self._one, batch, sampling): place
                            for place, batch in enumerate(batches)})

    def _one(self, batch: Sequence[Request], sampling: Sampling) -> list[Generation]:
        for _ in range(MOST_KILLED):
            slot = self._take()
            assert slot.engine is not None
            try:
                found = slot.engine.generate(batch, sampling)
            except (EngineDied, RayError) as error:
                if isinstance(error, StageError) and not isinstance(error, EngineDied):
                    self._free.put(slot)  # it refused the work; Ray raises that as both kinds of error at once
                    raise
                slot.engine.kill()  # where only vLLM's own processes died, the actor still lives
                self._died(slot, error)
            else:
                self._free.put(slot)
                return found
        raise StageError(f"{MOST_KILLED} engines died, one after another, of one batch of {len(batch)} requests; often "
                         "memory: lower engine.max_sequences, engine.kv_cache_gib or generate.shard_prompts. The same "
                         "command goes on")

    def _take(self) -> _Slot:
        slot = self._free.get()
        if self._failure is not None:
            self._free.put(slot)  # for the next who waits
            raise self._failure
        assert slot is not None
        return slot

    def _launch(self, slot: _Slot) -> None:
        def launch() -> None:
            try:
                slot.engine = self._start(slot.index)
            except EngineDied as error:
                self._died(slot, error)
            except Exception as error:  # a thread's exception would be lost, and its pool would wait for ever
                self._fail(error if isinstance(error, StageError) else StageError(f"engine {slot.index} cannot start: "
                                                                                  f"{error!r}"))
            else:
                if self._closed:  # nobody waits for it any more
                    slot.engine.kill()
                self._free.put(slot)

        threading.Thread(target=launch, name=f"engine-{slot.index}", daemon=True).start()

    def _died(self, slot: _Slot, error: Exception) -> None:
        with self._lock:
            slot.deaths += 1
            given_up = slot.deaths > RESTARTS or self._closed
            self._left -= given_up
            last = not self._left
        if self._closed:
            return
        brief = str(error).strip().splitlines()[-1][:300]
        self._note(f"engine {slot.index} of {self.count} died and is "
                   f"{'given up' if given_up else 'started again'}; its work goes to the others: {brief}")
        if not given_up:
            self._launch(slot)
        elif last:
            self._fail(StageError(f"no engine is left: each of {self.count} died {RESTARTS + 1} times, the last of "
                                  f"{brief}\nWhat was finished is kept: the same command goes on"))

    def _fail(self, error: StageError) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._free.put(None)

    def stop(self) -> None:
        """Begin no other batch; whoever asks for one gets a StageError."""
        self._fail(StageError("the engines were stopped"))

    def close(self) -> None:
        """Wait for the batches under way, and start no engine again."""
        self._closed = True
        self.stop()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
