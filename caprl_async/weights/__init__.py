"""Carries the learner's weights into running engines through vLLM's weight-transfer machinery.

`WeightSync` (driver) tells the learner's `WeightSender` to send and the engines' `receive` to receive, at the
same time. Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

_ENGINES = {
    "gloo": ("caprl_async.weights.gloo", "GlooWeightTransferEngine"),
    "ipc": ("caprl_async.weights.ipc", "PlainIPCWeightTransferEngine"),  # vLLM's own would unpickle
}


def register() -> None:
    """Makes our backends known to vLLM; call it before an engine is built, in the process of its workers.

    Calling it again does nothing. It has the form of a `vllm.general_plugins` entry point.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for name, (module, class_name) in _ENGINES.items():
        WeightTransferEngineFactory._registry.pop(name, None)
        WeightTransferEngineFactory.register_engine(name, module, class_name)
