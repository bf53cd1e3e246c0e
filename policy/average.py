"""An exponential moving average of the weights in CPU memory, kept up beside training (DeepSeek-V3 section 3.2.3).

After an optimizer step a thread folds the new weights into the average while the next forward and backward passes run;
the next optimizer step waits for it, so that it reads each step's weights whole and in order. The average is kept in
FP32: in BF16 the small steps towards the weights would be lost.

The balance bias is a buffer that moves in jumps of gamma. It is averaged like the weights, over the same steps: the
averaged routers choose as the routers of those steps did on average, and so does the bias that balanced them.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

AVERAGE = "average.safetensors"  # in a trainer's checkpoint folder


class WeightAverage(TrainerCallback):
    """`average = decay * average + (1 - decay) * weights` after each optimizer step, from the first weights on."""

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model = model
        self.average = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in self._weights().items()}
        self.decay = decay
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="weight-average")
        self.under_way: Future | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self.wait()
        self.under_way = self.thread.submit(self._fold, self._weights())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.wait()

    def on_train_end(self, args, state, control, **kwargs):
        self.wait()
        self.thread.shutdown()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}

    def _fold(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            self.average[name].lerp_(tensor.to("cpu", torch.float32), 1 - self.decay)

    def wait(self) -> None:
        """Return when the last step is in the average; raises what the thread raised."""
        if self.under_way:
            self.under_way.result()
            self.under_way = None

    def save(self, folder: Path) -> None:
        self.wait()
        save_file(self.average, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint folder; raises FileNotFoundError for one of a training without an average."""
        self.wait()
        for name, tensor in load_file(folder / AVERAGE).items():
            self.average[name].copy_(tensor)

    def replace_weights(self) -> None:
        """Overwrite the weights of the model by their average, in their own dtype."""
        self.wait()
        for name, tensor in self._weights().items():
            tensor.copy_(self.average[name])
