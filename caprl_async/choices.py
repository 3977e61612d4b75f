"""The words that keys of a conf take, where there are only some; `config.py` says which key takes which."""

from __future__ import annotations

import enum


class Form(enum.Enum):
    parquet = "parquet"
    sharegpt = "sharegpt"
    webdataset = "webdataset"


class JudgeMode(enum.Enum):
    expected = "expected"
    sample = "sample"
    likelihood = "likelihood"
    text = "text"
    rate = "rate"


class Blind(enum.Enum):
    off = "off"
    drop = "drop"
    weigh = "weigh"


class AdvantageKind(enum.Enum):
    mean_std = "mean_std"
    mean = "mean"
    rloo = "rloo"


class Aggregation(enum.Enum):
    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    sequence_sum = "sequence_sum"


class WeightBackend(enum.Enum):
    gloo = "gloo"
    nccl = "nccl"
    ipc = "ipc"


class Prefix(enum.Enum):
    shared = "shared"
    repeated = "repeated"


class Proximal(enum.Enum):
    recompute = "recompute"
    interpolate = "interpolate"
    behaviour = "behaviour"


class ImportanceLevel(enum.Enum):
    none = "none"
    token = "token"
    sequence = "sequence"


class Beyond(enum.Enum):
    truncate = "truncate"
    mask = "mask"


class TrustRegion(enum.Enum):
    ppo = "ppo"
    gspo = "gspo"
    cispo = "cispo"
    reinforce = "reinforce"


class KLEstimator(enum.Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlace(enum.Enum):
    loss = "loss"
    reward = "reward"
