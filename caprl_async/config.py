"""Every key of a conf, one dataclass per room; a conf is checked as a whole before anything starts.

Each field's `help` is what `--help` and the README's table print.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from caprl_async.choices import (
    AdvantageKind,
    Aggregation,
    Beyond,
    Blind,
    Form,
    ImportanceLevel,
    JudgeMode,
    KLEstimator,
    KLPlace,
    Prefix,
    Proximal,
    TrustRegion,
    WeightBackend,
)


def key(default: Any, help: str) -> Any:
    """A conf key with its explanation; mutable defaults are copied."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class EngineConfig:
    """One vLLM engine."""

    max_model_len: int = key(4096, "longest prompt plus answer, tokens")
    max_num_seqs: int = key(128, "sequences that one engine step may hold")
    max_num_batched_tokens: int = key(8192, "tokens that one engine step may compute")
    block_size: int | None = key(None, "tokens per KV block; CPU takes multiples of 32; null: vLLM's default")
    kv_cache_gib: float | None = key(
        None, "memory for keys and values, GiB; null: 1 on a CPU, what the next key leaves on a GPU"
    )
    gpu_memory_utilization: float = key(0.85, "GPU: share of its memory that must be free for the engine")
    tensor_parallel_size: int = key(1, "workers of an engine; on a GPU each, as many as ring.gpus_per_*")
    dtype: str = key("bfloat16", "weights and activations of the engine")
    enforce_eager: bool = key(False, "no compilation, no CUDA graphs")
    in_process: bool = key(False, "run vLLM's core inside the actor (right on CPU), not in a child process")
    threads: int = key(0, "CPU: threads of torch in this actor; 0: torch decides")


@dataclass
class DataConfig:
    """Images and their questions."""

    train: str = key(
        "",
        "training questions: CapRL-QA parquet (or a folder of it), or jsonl in the OpenRLHF or verl form",
    )
    heldout: str = key("", "held-out questions, same forms; empty: no evaluation")
    images: str = key("", "annotate: folder of images, or of .parquet, .tar or .arrow files, or one of these")
    prompt: str = key(
        "Please describe this image in detail.",
        "what the captioner is asked; empty: the rows' own. job=sft asks what comes with an example first",
    )
    image_dir: str = key("", "images by content hash are written here; empty: run_dir/images")
    frames: int = key(0, "most frames that a video is shown as, each with its time; 0: no videos")
    fps: float = key(1.0, "frames of a video per second, as long as data.frames allows")
    shuffle: bool = key(True, "a new order each epoch, from the seed")
    questions_per_image: int = key(0, "questions drawn per group, by weight; 0: all of the image's questions")
    adaptive_questions: bool = key(
        False, "draw those more often on which captions differed before; the reward stays unbiased"
    )


@dataclass
class PolicyConfig:
    """The captioner."""

    model: str = key("", "folder of a Hugging Face checkpoint")
    min_pixels: int = key(4 * 28 * 28, "images are enlarged to at least this; same for engine and learner")
    max_pixels: int = key(1_000_000, "images are shrunk to at most this; same for engine and learner")


@dataclass
class RolloutConfig:
    """Actors that caption."""

    num_actors: int = key(1, "rollout actors that a ring starts with, one vLLM engine each")
    max_actors: int = key(0, "more of them join up to this number while the cluster has room; 0: none")
    group_size: int = key(8, "captions per image (n)")
    temperature: float = key(1.0, "sampling temperature; top_p stays 1")
    max_tokens: int = key(1024, "longest caption, tokens")
    max_requests_in_flight_per_actor: int = key(16, "prompts one actor holds at a time")
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class JudgePromptConfig:
    """What the judge reads; `{caption}`, `{question}`, `{options}` are filled in as data, never as markup."""

    instruction: str = key(
        "Answer the multiple-choice question strictly from the caption below. Use no outside knowledge. "
        "If the caption does not contain the answer, choose the option that says so.",
        "stands first; worked examples may follow in it",
    )
    caption: str = key("Caption:\n<<<\n{caption}\n>>>", "the block that holds the caption")
    question: str = key("Question: {question}\n{options}", "the block after the caption")
    option: str = key("{letter}) {text}\n", "one option line (not shown in likelihood mode)")
    prefill: str = key("The answer is", "begins the judge's answer")
    answer_space: bool = key(True, "the answer's first token begins with a space (BPE vocabularies)")
    abstain: str = key("Can not answer based on the caption", "text of the option added to every question")


@dataclass
class EndpointConfig:
    """A model that is served elsewhere, over an OpenAI-compatible API (chat completions)."""

    url: str = key("", "base URL, as http://host:8000/v1; empty: an engine of ours holds the model")
    model: str = key("", "the name it is served under; empty: the only one that the server lists")
    api_key_env: str = key("", "environment variable that holds the key; empty: no key")
    timeout_s: float = key(30.0, "one request may take this long")
    retries: int = key(3, "further tries of a request, with growing pauses; then there is no answer")
    max_in_flight: int = key(32, "requests at one time, per actor")


@dataclass
class JudgeEndpointConfig(EndpointConfig):
    """The same for a judge."""

    prefill: bool = key(
        False, "the server goes on from judge.prompt.prefill (continue_final_message: vLLM, SGLang)"
    )


@dataclass
class JudgeConfig:
    """Actors that answer questions from captions alone."""

    model: str = key("", "folder of a text-only Hugging Face checkpoint")
    num_actors: int = key(1, "judge actors that a ring starts with, one vLLM engine each")
    max_actors: int = key(0, "more of them join up to this number while the cluster has room; 0: none")
    also: list[str] = key([], "further judge models: each group is asked by one of them all, in turn")
    mode: JudgeMode = key(JudgeMode.expected, "expected | sample | likelihood | text | rate")
    permutations: int = key(1, "option orders per question (expected), gold position balanced")
    draws: int = key(8, "sampled answers per caption (sample mode; N of the paper)")
    text_tokens: int = key(32, "longest answer in own words, tokens (text mode)")
    temperature: float = key(0.6, "of the judge's option distribution or sampling")
    max_requests_in_flight_per_actor: int = key(4, "caption groups one actor holds at a time")
    cache_size: int = key(200_000, "verdicts kept by content")
    prompt: JudgePromptConfig = field(default_factory=JudgePromptConfig)
    endpoint: JudgeEndpointConfig = field(default_factory=JudgeEndpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class RewardConfig:
    """How verdicts, length and format become one reward."""

    accuracy: float = key(1.0, "weight of the mean score over the scored questions")
    length: float = key(0.0, "weight of the length term (1 up to length_free, then linear to 0)")
    length_free: int = key(2048, "tokens without length penalty")
    length_max: int = key(3072, "tokens at which the length term is 0")
    length_cost: float = key(0.0, "taken off per 1,000 tokens: pressure to be brief at any length")
    format: float = key(0.0, "weight of the timestamp-format term (video)")
    absent: float = key(1.0, "factor on the weight of questions about what is absent; 0: not asked")
    blind: Blind = key(
        Blind.off, "off | drop | weigh (by 1 - score) questions that are answered without a caption"
    )
    blind_limit: float = key(0.5, "blind=drop: questions with a greater score without a caption leave")
    quorum: float = key(0.5, "share of the questions that must be scored for a caption to have a reward")


@dataclass
class ReplayConfig:
    """The queue: admission, staleness, leases."""

    batch_groups: int = key(128, "groups per learner batch")
    max_staleness: int = key(2, "oldest token in a batch, in learner steps; 0: synchronous")
    min_group: int = key(2, "captions with a reward that a group needs")
    max_attempts: int = key(5, "failed attempts before a prompt is given up")
    lease_timeout_s: float = key(300.0, "work without an answer is leased again")
    peer_timeout_s: float = key(30.0, "a peer silent for this long loses its leases")
    judge_failures: int = key(5, "failures of judges in a row at which admission is paused until one answers")
    judge_outage_s: float = key(900.0, "judges that have not answered for so long end the run")
    min_reward_spread: float = key(1e-6, "groups whose rewards differ by less are filtered")
    ledger_mb: int = key(2048, "size of ledger.sqlite beyond which old prompts are kept as totals only")
    max_evicted_batches: float = key(30.0, "batches' worth of groups one batch may cost; then the run ends")


@dataclass
class AdvantageConfig:
    """How the rewards of a group become advantages."""

    kind: AdvantageKind = key(AdvantageKind.mean_std, "mean_std | mean | rloo")
    per_term: bool = key(
        False, "mean_std of each reward term on its own, then weighted and added (GDPO; see batch_norm)"
    )
    batch_norm: bool = key(False, "divide by the standard deviation over the batch, equal groups left out")
    clip: float = key(0.0, "advantages are cut to +- this; 0: not")


@dataclass
class ImportanceConfig:
    """Weight w = proximal / behaviour, which corrects for the policy that sampled; no gradient."""

    level: ImportanceLevel = key(ImportanceLevel.token, "none | token | sequence (product over the caption)")
    beyond: Beyond = key(Beyond.truncate, "outside the bounds: truncate w to the bound | mask the token")
    low: float = key(0.0, "lower bound of w")
    high: float = key(2.0, "upper bound of w; 0: none")


@dataclass
class TrustRegionConfig:
    """How far one batch may move the policy: what bounds r = current / proximal."""

    kind: TrustRegion = key(TrustRegion.ppo, "ppo | gspo (r per caption) | cispo | reinforce (no r)")
    clip_low: float = key(0.2, "r is clipped at 1 - this")
    clip_high: float = key(0.2, "r is clipped at 1 + this")
    dual_clip: float = key(0.0, "ppo: floor of the gain, as a multiple of a negative advantage; 0: none")


@dataclass
class CorrectionConfig:
    """Off-policy correction: two independent choices, and the policy that stands between them."""

    proximal: Proximal = key(
        Proximal.recompute, "recompute (before the batch) | interpolate (by token version) | behaviour"
    )
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    trust_region: TrustRegionConfig = field(default_factory=TrustRegionConfig)


@dataclass
class KLConfig:
    """Pull towards the start policy; it needs a second copy of the model, except with LoRA."""

    coef: float = key(0.0, "weight; 0: no reference model")
    estimator: KLEstimator = key(KLEstimator.k3, "k1 | k2 | k3; in the loss k1's gradient is 0 on average")
    place: KLPlace = key(KLPlace.loss, "in the loss, per token | in the reward, summed over the caption")


@dataclass
class LoRAConfig:
    """Low-rank adapters on the language model; all else is frozen. Engines get the merged weights."""

    rank: int = key(0, "of the adapters; 0: all weights are trained")
    alpha: int = key(32, "what an adapter adds is multiplied by alpha / rank")
    targets: list[str] = key(
        [], "endings of the layers' names, as [q_proj, v_proj]; empty: every linear layer"
    )


@dataclass
class LearnerConfig:
    """The DeepSpeed learner group."""

    num_ranks: int = key(1, "learner actors")
    lr: float = key(1e-6, "peak learning rate")
    warmup_steps: int = key(20, "linear warm-up")
    min_lr_ratio: float = key(0.1, "floor of the cosine decay, as a share of lr")
    betas: list[float] = key([0.9, 0.95], "Adam")
    weight_decay: float = key(0.0, "AdamW")
    grad_norm: float = key(1.0, "clip of the global gradient norm")
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    aggregation: Aggregation = key(
        Aggregation.token_mean, "token_mean | sequence_mean (of token means) | sequence_sum (see sum_length)"
    )
    sum_length: int = key(
        0, "sequence_sum: tokens that each caption's sum is divided by; 0: rollout.max_tokens"
    )
    updates_per_batch: int = key(1, "optimizer steps per batch")
    entropy_coef: float = key(0.0, "weight of the entropy bonus")
    kl: KLConfig = field(default_factory=KLConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    prefix: Prefix = key(
        Prefix.shared,
        "shared: image and prompt are computed once per group | repeated: once per caption",
    )
    micro_batch_tokens: int = key(16384, "tokens computed at one time, prompt and captions; bounds memory")
    logprob_chunk: int = key(1024, "tokens whose vocabulary logits exist at one time")
    zero_stage: int = key(0, "DeepSpeed ZeRO stage")
    offload_optimizer: bool = key(False, "GPU: the optimizer lives and works on the CPU; needs a zero_stage")
    dtype: str = key("bfloat16", "float32 | bfloat16")
    freeze_vision: bool = key(False, "train only the language model")
    train_only: list[str] = key([], "train only parameters with these in their names, as visual.merger")
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    gradient_checkpointing: bool = key(False, "recompute activations in backward")
    device: str = key("cuda", "cpu | cuda")
    threads: int = key(0, "CPU, offload_optimizer: threads of torch in each rank; 0: torch decides")


@dataclass
class SftConfig:
    """Supervised training (job=sft) by the learner group, of images with texts."""

    data: str = key(
        "", "images with captions, or with prompts and answers: a .parquet, .jsonl or .tar file, or a folder"
    )
    validation: str = key("", "the same, held out; empty: no validation loss")
    batch: int = key(128, "images per step, with all their texts")
    max_tokens: int = key(2048, "longer texts are left out")
    interval: int = key(50, "steps between validations; the last step is always validated")
    validation_images: int = key(512, "images of sft.validation, the first; 0: all")


@dataclass
class StageConfig:
    """One stage of job=pretrain: supervised training with these instead of the conf's own keys."""

    data: str = key("", "as sft.data; empty: the stage is left out")
    validation: str = key("", "as sft.validation")
    prompt: str = key("", "as data.prompt, of images without a prompt of their own; empty: none is without")
    steps: int = key(0, "as steps")
    batch: int = key(256, "as sft.batch")
    lr: float = key(0.0, "as learner.lr")
    train_only: list[str] = key([], "as learner.train_only")


def _stage(lr: float, batch: int, *train_only: str) -> Any:
    return field(default_factory=lambda: StageConfig(lr=lr, batch=batch, train_only=list(train_only)))


@dataclass
class PretrainConfig:
    """The three stages that make a vision-language model of a language model, a tower and a projector."""

    align: StageConfig = _stage(1e-3, 256, "visual.merger")
    further: StageConfig = _stage(4e-5, 256)
    tune: StageConfig = _stage(2e-5, 128)


@dataclass
class WeightsConfig:
    """How the learner's weights reach the engines."""

    backend: WeightBackend = key(
        WeightBackend.nccl, "gloo (CPU) | nccl | ipc (engines on the learner's GPUs)"
    )
    broadcast_interval: int = key(1, "learner steps between broadcasts")
    timeout_s: float = key(60.0, "a transfer that takes longer has failed")


@dataclass
class HeldoutJudgeConfig:
    """A second judge that training never meets; it asks its own questions about the held-out images."""

    model: str = key("", "folder of its checkpoint; empty: none")
    data: str = key("", "held-out questions in its own wording; empty: data.heldout")
    mode: JudgeMode | None = key(None, "as judge.mode; null: the same")


@dataclass
class EvaluateConfig:
    """What is measured on held-out images, and when."""

    interval: int = key(0, "steps between evaluations during training; 0: only before and after")
    probe_images: int = key(
        4, "held-out images captioned beside each batch, to watch the gap to training; 0: none"
    )
    images: int = key(0, "held-out images used; 0: all")
    temperature: float = key(1.0, "of the captions that are measured")
    heldout_judge: HeldoutJudgeConfig = field(default_factory=HeldoutJudgeConfig)
    dense_policy: str = key(
        "", "checkpoint of a captioner trained on dense captions, for the table; may be empty"
    )
    program: str = key("", "module:function(caption, facts) that scores stated facts; may be empty")


@dataclass
class WriterConfig:
    """A model that writes: an engine of ours, or one that is served elsewhere."""

    model: str = key("", "folder of a Hugging Face checkpoint")
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    min_pixels: int = key(4 * 28 * 28, "engine of ours: images are enlarged to at least this")
    max_pixels: int = key(1_000_000, "engine of ours: images are shrunk to at most this")
    temperature: float = key(0.0, "of its answers; 0: the likeliest token each time")
    max_tokens: int = key(1024, "longest answer, tokens")
    num_actors: int = key(1, "actors, one engine (or client) each")
    gpus_per_actor: float = key(0.0, "Ray GPUs each of them takes")
    batch_rows: int = key(64, "rows that come to an actor together; four batches are under way at one time")
    refusals: int = key(200, "rows in a row without an answer, by no fault of theirs, that end the job")
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class AnnotateConfig:
    """A data set of captions, made by `captioner` of `data.images`."""

    captions: int = key(1, "captions per image")
    form: Form = key(
        Form.parquet, "parquet | sharegpt (jsonl, a conversation per caption) | webdataset (tar, with images)"
    )
    rows_per_file: int = key(10_000, "images per output file; a minute's worth is written at the latest")


@dataclass
class PrismConfig:
    """Captions measured by what an answerer that sees no image can answer from them."""

    benchmark: str = key("", "its name: docs/prism.md lists those that are known; caprl_qa: asked by judge")
    data: str = key(
        "", "its file: .tsv (VLMEvalKit), .parquet (Hugging Face) or .json (Prism), or a folder of them; "
        "caprl_qa: as data.train"
    )  # fmt: skip
    captions: int = key(4, "captions per image")
    captions_from: str = key(
        "", "captions made elsewhere: jsonl or parquet (docs/prism.md); empty: captioner's"
    )
    limit: int = key(0, "questions asked, the file's first; 0: all")
    blind: bool = key(True, "ask also without a caption: the floor that captions are held against")
    abstain: bool = key(
        False, "offer judge.prompt.abstain as one more option of choice questions, for CaptionQA's score"
    )
    template: str = key(
        "A caption tells what an image shows:\n<<<\n{caption}\n>>>\nAnswer from the caption.\n{question}",
        "what the answerer reads; {caption} and {question} are filled in",
    )


@dataclass
class CompareConfig:
    """Evaluations of the same questions, side by side."""

    runs: list[str] = key([], "run folders of job=evaluate; the others are held against the first")
    images: int = key(24, "images shown: half of them those on which the runs differ most")


@dataclass
class CurateConfig:
    """Questions about images, written by `questioner` and kept if `checker` needs the image for them."""

    questions: int = key(5, "questions asked for per image")
    prompt: str = key("", "what the questioner is told; {n} is the number of questions; empty: our own words")
    permutations: int = key(4, "orders of its options in which each question is answered")
    with_image_above: float = key(
        0.75, "a question is kept if it is answered right more often with the image"
    )
    without_image_below: float = key(0.25, "and less often without it")
    with_caption_above: float = key(0.5, "and more often from the row's own caption, where it has one")
    near: int = key(
        6, "images whose perceptual hashes differ by so many bits or fewer count once; -1: not looked at"
    )
    exclude: str = key("", "images (as data.images) whose near-duplicates are left out: those of benchmarks")
    questions_from: str = key(
        "", "questions that there are (as data.train), instead of data.images: they are only checked"
    )
    rows_per_file: int = key(10_000, "images per output file")


@dataclass
class PlanConfig:
    """What a conf is planned for; the shares are those that were measured (docs/plan.md)."""

    gpu: str = key("h100", "a10g | l40s | rtx4090 | a100_40 | a100_80 | h100 | h200 | b200")
    gpus: int = key(8, "GPUs that the best split may use")
    link_gb_s: float = key(50.0, "GB/s of the slowest link between learner and engines (NVLink: 450)")
    prompt_tokens: int = key(40, "of a prompt, beside the image")
    caption_tokens: float = key(512.0, "of a caption, on average")
    questions: int = key(3, "asked about an image, on average")
    question_tokens: float = key(120.0, "of a question with its options and what stands around it")
    train_share: float = key(0.4, "of a GPU's operations that the learner reaches")
    prefill_share: float = key(0.45, "the same of engines that read")
    decode_share: float = key(0.6, "of its memory's bandwidth that engines reach that write")


@dataclass
class CheckpointConfig:
    """What is kept."""

    interval: int = key(50, "steps between checkpoints; the last step is always kept")
    keep: int = key(3, "checkpoints kept")


@dataclass
class RingConfig:
    """Ray: where the actors run."""

    address: str = key("local", "local: start a Ray of our own; auto or host:port: join a cluster")
    dashboard: bool = key(False, "local: start Ray's dashboard (about 700 MB; needs ray[default])")
    object_store_mb: int = key(128, "local: Ray's shared memory")
    cpus_per_actor: float = key(0.1, "Ray CPUs each actor reserves")
    gpus_per_rollout: float = key(0.0, "Ray GPUs per rollout actor")
    gpus_per_judge: float = key(0.0, "Ray GPUs per judge actor")
    gpus_per_learner: float = key(0.0, "Ray GPUs per learner rank")
    rollout_label: str = key("", "rollouts go to nodes with this label, as caprl=gpu; empty: to any")
    judge_label: str = key("", "the same for judges")
    learner_label: str = key("", "the same for learner ranks")
    start_timeout_s: float = key(600.0, "an actor that is not ready by then has failed")
    hang_timeout_s: float = key(60.0, "an actor or driver silent for so long is killed and started again")
    restarts: int = key(5, "deaths of one actor between two learner steps that are borne")
    driver_restarts: int = key(5, "of a driver that dies, hangs or loses Ray; a new checkpoint resets them")


@dataclass
class BandsConfig:
    """[low, high] of metrics; outside there is an alarm. An empty list: none."""

    logprob_gap_fresh_mean: list[float] = key([0.0, 0.05], "engine against learner at equal versions, nats")
    logprob_gap_fresh_p99: list[float] = key([0.0, 0.5], "the same, the worst tokens")
    logprob_gap_mean: list[float] = key([0.0, 0.5], "engine against learner, stale tokens included, nats")
    kl_behaviour: list[float] = key([0.0, 0.1], "KL from the sampling to the current policy per token, nats")
    importance_mean: list[float] = key([0.8, 1.25], "mean importance weight")
    importance_bounded: list[float] = key([0.0, 0.2], "share of tokens whose weight was truncated or masked")
    effective_samples: list[float] = key([0.5, 1.0], "effective share of the tokens")
    clip_fraction: list[float] = key([0.0, 0.4], "share of tokens that the trust region holds")
    kl: list[float] = key([], "estimate of the KL to the start policy per token, nats")
    off_options_mean: list[float] = key([0.0, 0.5], "what the judge answers beside the options")
    hack_answer_leak: list[float] = key([0.0, 0.05], "share of captions that speak of an answer or choice")
    hack_option_letters: list[float] = key([0.0, 1.0], "option marks, as A) or option D, per 100 words")
    hack_question_echo: list[float] = key([0.0, 0.05], "share of captions that ask or repeat a question")
    hack_repetition: list[float] = key([0.0, 0.3], "share of a caption's word 4-grams that came before")
    hack_meta: list[float] = key([0.0, 0.1], "share of captions that talk about or praise themselves")
    hack_truncated: list[float] = key([0.0, 0.3], "share of captions cut at rollout.max_tokens")
    hack_length_corr: list[float] = key([-0.95, 0.95], "correlation of length and reward within groups")
    hack_length_slope: list[float] = key([], "reward gained per 100 tokens, within groups")
    missing_share: list[float] = key([0.0, 0.2], "share of a caption's questions without a score")
    missing_length_corr: list[float] = key([-0.3, 0.3], "correlation of missing verdicts and length")
    missing_reward_corr: list[float] = key([-0.3, 0.3], "correlation of missing verdicts and accuracy")
    gap_heldout: list[float] = key([-1.0, 0.15], "training minus held-out accuracy, of the same judge")
    gap_judges: list[float] = key([-1.0, 0.15], "judge minus held-out judge, held out, since the start")


@dataclass
class ObserveConfig:
    """What a person sees."""

    samples_per_step: int = key(2, "caption groups written to samples.jsonl at each step")
    trackers: list[str] = key(["tensorboard"], "of tensorboard, wandb, trackio, mlflow")
    gallery_images: int = key(12, "held-out images shown before and after in report.html")
    record_batches: bool = key(False, "keep every batch in batches/, as the learner got it, for job=replay")
    bands: BandsConfig = field(default_factory=BandsConfig)
    log_level: str = key("WARNING", "of the libraries; our own messages are always shown")


@dataclass
class Config:
    """A whole conf. `base` (a path, relative to the conf) names a conf that this one extends."""

    job: str = key(
        "train",
        "what to do: train | sft (supervised training) | pretrain (in three stages) | plan (says what it "
        "would need) | curate (makes questions) | annotate (captions images) | evaluate (measures captions) "
        "| compare (evaluations, side by side) | report (a run's page) | inspect (what a run recorded) | "
        "replay (trains on it)",
    )
    run_dir: str = key("runs/run", "everything the job writes is in here")
    resume: bool = key(False, "go on with the run that run_dir holds")
    seed: int = key(0, "of everything that draws")
    steps: int = key(1000, "learner batches; replay: at most up to this one")
    run: str = key("", "report, inspect, replay: the folder of the run that is looked at")
    sample: str = key("", "inspect: train/17, or an attempt of it, train/17@0, or a caption, train/17@0#3")
    begin: int = key(0, "replay: step of the kept checkpoint to begin at; 0: the policy's start")
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    captioner: WriterConfig = field(default_factory=WriterConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    answerer: WriterConfig = field(default_factory=WriterConfig)
    grader: WriterConfig = field(default_factory=WriterConfig)
    questioner: WriterConfig = field(default_factory=WriterConfig)
    checker: WriterConfig = field(default_factory=WriterConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    prism: PrismConfig = field(default_factory=PrismConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
