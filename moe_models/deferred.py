"""Figures of a micro-batch that wait on their device until they are logged.

TRL 1.16.0 reads six numbers in every micro-batch (entropy, accuracy, tokens, auxiliary loss): each read lets the host
wait until the GPU has done everything it was given, so that the GPU then waits for the host when the backward pass
begins. Here the same figures stay tensors, and one read at logging time takes all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer


class Deferred(torch.Tensor):
    """A scalar tensor that answers TRL's questions for numbers with tensors."""

    def item(self) -> Any:
        """Itself: a number only once it is logged."""
        return self

    def __gt__(self, other: Any) -> Any:
        """Yes: TRL asks for ``valid > 0`` before it divides by it, and :meth:`__truediv__` heeds a zero."""
        return True

    def __truediv__(self, other: Any) -> Any:
        """As TRL has it: 0 where there is nothing to divide by."""
        return torch.where(torch.gt(other, 0), torch.true_divide(self, other), 0.0)


class DeferredTrainer(SFTTrainer):
    """SFTTrainer whose training metrics are read from the device when they are logged, all at once."""

    _total_train_tokens: Any
    """TRL's running sum; a number again whenever something was logged."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in HF; what is gathered for metrics in training is deferred."""
        super().create_accelerator_and_postprocess()
        gather = self.accelerator.gather_for_metrics

        def gather_for_metrics(data: Any, *args: Any, **kwargs: Any) -> Any:
            gathered = gather(data, *args, **kwargs)
            return gathered.detach().as_subclass(Deferred) if self.model.training else gathered

        self.accelerator.gather_for_metrics = gather_for_metrics

    def log(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, of numbers."""
        kept = [values for metrics in self._metrics.values() for values in metrics.values()]
        kept.append(total := [self._total_train_tokens])
        waiting = [value for values in kept for value in values if isinstance(value, Deferred)]
        if waiting:
            numbers = iter(torch.stack([value.as_subclass(torch.Tensor).double() for value in waiting]).tolist())
            for values in kept:
                values[:] = [next(numbers) if isinstance(value, Deferred) else value for value in values]
            self._total_train_tokens = int(total[0])
        super().log(*args, **kwargs)
