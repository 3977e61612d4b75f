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
    """Readies vLLM for our updates: call it before an engine is built, in the process of its workers.

    It makes our backends known, and lets requests under way be computed anew.

    Calling it again does nothing. It has the form of a `vllm.general_plugins` entry point.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.v1.core.sched import output

    # vLLM leaves out pixels whose keys and values it has cached. After an update these are computed anew, and
    # a request under way that never had its pixels would end the engine.
    if not hasattr(output, "strip_covered_mm_data"):
        raise RuntimeError(
            "this vLLM leaves out covered pixels in another way than 0.32; see weights.register"
        )
    output.strip_covered_mm_data = lambda features, *_args, **_kwargs: features
    for name, (module, class_name) in _ENGINES.items():
        WeightTransferEngineFactory._registry.pop(name, None)
        WeightTransferEngineFactory.register_engine(name, module, class_name)
