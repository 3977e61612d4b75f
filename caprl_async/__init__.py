"""caprl_async trains image captioners by asynchronous reinforcement learning.

Reading order: `types.py`, `config.py`, then the folders as data flows: `ring, data, engine, rollout, judge,
reward, replay, learner, weights, jobs, observe`; last `algorithm.py` and `run.py`.
"""
