"""The job: every field a user can set, typed and closed.

What is written is respected or refused, never silently changed. What is `auto` belongs to the
preflight, which fills it in, says why, and records it in plan.json. The docstring under a field is
its help text: `docs/configuration.md` is generated from it.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, Strict
from pydantic.dataclasses import dataclass

Auto = Literal["auto"]
# Strict: 16.5 is no row count, "yes" is no number and true is not 1. An integer still does for a float.
Flag = Annotated[bool, Strict()]
Text = Annotated[str, MinLen(1)]
MOST = 10**9  # of whatever is counted
LONGEST_ROW = 10**7  # tokens; twenty times what fits one card, and a plan of it takes seconds
PositiveInt = Annotated[int, Strict(), Gt(0), Le(MOST)]
GpusOfANode = Annotated[int, Strict(), Ge(1), Le(64)]
Nodes = Annotated[int, Strict(), Ge(1), Le(1024)]
NonNegativeInt = Annotated[int, Strict(), Ge(0), Le(MOST)]
PositiveFloat = Annotated[float, Strict(), Gt(0)]
NonNegativeFloat = Annotated[float, Strict(), Ge(0)]
Fraction = Annotated[float, Strict(), Ge(0), Le(1)]
FractionBelowOne = Annotated[float, Strict(), Ge(0), Lt(1)]

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Stage = Literal["plan", "train", "evaluate", "export", "bundle"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RowField = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt", "completion",
    "response", "question", "answer", "text", "chosen", "rejected", "label", "kto_tag",
]
"""What is read of a row."""
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass(frozen=True, config=CLOSED)
class ModelConfig:
    name: Text = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id of the base model; also the name that reports and the manifest carry."""
    path: Text | None = None
    """Local folder with config.json, safetensors and tokenizer; used instead of the Hub when set."""
    revision: Text | None = None
    """Hub revision (commit, tag or branch); null is the default branch."""
    package: Text | None = None
    """Installed Python package that ships the model as a GGUF; used when the Hub cannot be reached."""
    chat_template: Text | None = None
    """File with a Jinja chat template, in place of the model's own; a base model has none. Exports carry it on."""


@dataclass(frozen=True, config=CLOSED)
class DataConfig:
    path: Text | list[Text] = "???"
    """What to train on: a file, folder (JSON, JSONL, CSV, Parquet), Hub dataset or shipped:NAME, or a list of these."""
    subset: Text | None = None
    """Subset (configuration) of a Hub dataset that has several; null: its only or default one. Not used for files."""
    split: Text = "train"
    """Split of a Hub dataset; not used for files."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "unpaired"
    ] = "auto"
    """Shape of the rows; auto recognises that of each file from the fields of its first row and says so."""
    columns: dict[RowField, Text] | None = None
    """What the rows call these fields, where it is something else: {prompt: query, completion: reply}."""
    validation: Text | Annotated[float, Strict(), Gt(0), Lt(1)] | None = 0.05
    """Held-out data: a file, or the fraction of the rows to hold out (seeded), or null for none."""
    validation_split: Text = "validation"
    """Split of the Hub dataset that data.validation names, which may be data.path's; not used for files."""
    system: str | None = None
    """System message put before conversations that have none; null leaves the template's default."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Bad rows (broken JSON, missing or empty fields): stop with all of them listed, or skip and count."""
    on_long_row: Literal["cut", "split", "drop", "refuse"] = "cut"
    """Rows longer than sequence_length: cut at the end, split into several, drop (leave out), or refuse to train."""
    packing: Flag = True
    """Pack several rows into one of sequence_length; attention never crosses from one to another."""
    max_rows: PositiveInt | None = None
    """Train on the first so many rows only; null is all."""
    tools: Literal["template", "text"] = "template"
    """Tool definitions and calls: through the model's chat template, or as text (for templates that have none)."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True, config=CLOSED)
class LoraConfig:
    rank: PositiveInt = 16
    """Rank r of the adapter matrices A (r x in) and B (out x r)."""
    alpha: PositiveFloat = 32
    """The adapter's update is scaled by alpha / rank."""
    dropout: FractionBelowOne = 0.0
    """Dropout on the adapter's input; above 0 costs memory for the masks."""
    targets: Text | list[Text] = "all-linear"
    """Linear layers that get an adapter: all-linear (every one but the head), names, or a regular expression."""
    rank_stabilised: Flag = False
    """rsLoRA: scale by alpha / sqrt(rank) instead, which keeps large ranks learning."""
    b_lr_ratio: Annotated[float, Strict(), Ge(1)] = 1.0
    """LoRA+: learning rate of every B over that of A (optimizer.lr); 1 is plain LoRA."""
    dora: Flag = False
    """DoRA: a trained magnitude for each output besides; over a base in bf16 or fp32 (method=lora). Served merged."""
    modules_to_save: list[Text] = ()  # type: ignore[assignment]
    """Modules trained whole beside the adapter, by name: embed_tokens and lm_head (new tokens need them), norms. A head
    that is tied to the embedding stays so: either name trains the one weight of both."""


@dataclass(frozen=True, config=CLOSED)
class PreferenceConfig:
    beta: PositiveFloat = 0.1
    """dpo, kto: how hard the policy is held to the reference (higher: closer); orpo: weight of the odds ratio."""
    label_smoothing: Annotated[float, Strict(), Ge(0), Lt(0.5)] = 0.0
    """dpo: share of the pairs whose preference is taken to be the wrong way round."""
    desirable_weight: PositiveFloat = 1.0
    """kto: weight of the losses of chosen (or desirable) answers."""
    undesirable_weight: PositiveFloat = 1.0
    """kto: weight of the losses of rejected (or undesirable) answers."""


@dataclass(frozen=True, config=CLOSED)
class OptimizerConfig:
    name: Literal["auto", "adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit", "adafactor"] = "auto"
    """adamw keeps its moments in fp32; the others are lighter. auto: adamw with fp32 masters where they fit."""
    lr: PositiveFloat | Auto = "auto"
    """Peak learning rate; auto: the usual one of method and objective (2e-4 for adapters, 1e-5 for full; sft)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: to min_lr_ratio of the peak by cosine or linearly, or constant; wsd
    (warmup-stable-decay): constant, and linearly down over the last decay_ratio of the steps."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the rate rises linearly from 0."""
    warmup_steps: NonNegativeInt | None = None
    """The same as a number of steps, in place of warmup_ratio; null: by the ratio."""
    decay_ratio: Annotated[float, Strict(), Gt(0), Le(1)] = 0.1
    """wsd: share of the steps, the last of the run, over which the rate falls."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate that the schedule falls to, where the step after the last one would be; a share of the peak."""
    beta1: FractionBelowOne = 0.9
    """Decay of the first moment."""
    beta2: FractionBelowOne = 0.999
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""
    max_skipped_steps: NonNegativeInt = 2
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops."""
    in_backward: Flag | Auto = "auto"
    """Step each layer inside the backward pass and drop its gradients there (2 bytes a parameter less): a step is then
    one micro-batch, and not clipped. auto: where max_grad_norm=0 and it does not fit the GPUs otherwise."""
    master_weights: Flag | Auto = "auto"
    """Keep an fp32 copy of bf16 trainable weights (4 more bytes each); auto: for adapters, and for full if it fits."""


@dataclass(frozen=True, config=CLOSED)
class BatchConfig:
    global_size: PositiveInt = 16
    """Packed rows in one optimizer step, over all GPUs and accumulation steps."""


@dataclass(frozen=True, config=CLOSED)
class CheckpointConfig:
    every_steps: PositiveInt | Auto = "auto"
    """Steps between checkpoints; auto: a tenth of the run, at least 10 steps apart."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Checkpoints with the lowest evaluation loss to keep besides."""
    load_best: Flag = False
    """At the end take the weights of the checkpoint with the lowest evaluation loss, instead of the last ones."""


@dataclass(frozen=True, config=CLOSED)
class EvaluationConfig:
    every_steps: PositiveInt | Auto | None = "auto"
    """Steps between held-out evaluations while training; auto: with each checkpoint; null: only at the end."""
    patience: PositiveInt | None = None
    """End training after so many evaluations in a row without a lower held-out loss; null: all steps are made."""
    task: Literal["none", "json_fields", "exact_match"] = "none"
    """Task metric on generated answers: json_fields (valid JSON and field-level match) or exact_match; none: a few
    answers before and after training are shown, and nothing scores them."""
    max_rows: PositiveInt | None = 200
    """Held-out rows that the task metric generates answers for; null is all."""
    max_new_tokens: PositiveInt = 256
    """Longest generated answer, tokens."""
    batch_size: PositiveInt | Auto = "auto"
    """Answers generated at a time; auto: 16, or what the plan found to fit and to verify exports fastest."""


@dataclass(frozen=True, config=CLOSED)
class PlanConfig:
    objective: Literal["time", "cost", "memory"] = "time"
    """What to prefer among the plans that fit: the fastest, the cheapest, or the smallest."""
    trace: Flag = False
    """Also trace one real training step under fake tensors on the CPU and report its peak."""
    reserve: Annotated[float, Strict(), Ge(0), Lt(0.5)] = 0.03
    """Share of the device's memory that a plan leaves free."""
    methods: list[Literal["full", "lora", "qlora"]] = ("full", "lora", "qlora")  # type: ignore[assignment]
    """What method=auto may choose from, most faithful first."""
    prices_usd_per_hour: dict[str, PositiveFloat] | None = None
    """Your own price of one GPU, US dollars an hour, by its catalogue name ({h100_80gb: 2.5}); null: list prices."""


@dataclass(frozen=True, config=CLOSED)
class HardwareConfig:
    gpu: Text = "local"
    """local, cpu, or a GPU of the catalogue: a100_80gb, h100_80gb and so on (docs/preflight.md has all)."""
    count: GpusOfANode | Auto = "auto"
    """GPUs in each node; auto: what the machine has, or 1."""
    nodes: Nodes = 1
    """Machines."""


@dataclass(frozen=True, config=CLOSED)
class ThresholdsConfig:
    """What an export must reach to be published, against the model as trained; null is the shipped limit."""

    max_perplexity_ratio: PositiveFloat | None = None
    """Perplexity of the export over that of the trained model."""
    max_mean_kl: PositiveFloat | None = None
    """Mean KL divergence per token of the next-token distributions, nats."""
    max_p99_kl: PositiveFloat | None = None
    """99th percentile of the same over tokens, nats."""
    min_top1_agreement: Fraction | None = None
    """Share of tokens whose most likely next token is the same."""
    min_task_retention: Fraction | None = None
    """Task metric of the export over that of the trained model."""
    max_flipped_answers: Fraction | None = None
    """Share of greedy answers that are not the trained model's, text for text."""
    min_tuned_share: PositiveFloat | None = None
    """Least share of the fine-tune that is in the export: 1 is all of it, 0 is the base model."""
    max_tuned_share: PositiveFloat | None = None
    """Most of it: an adapter applied twice, or at too large a scale, is above 1."""


ExportFormat = Literal["adapter", "bf16", "fp8", "fp8_block", "int4", "int4_gptq", "int4_awq", "nvfp4", "gguf"]
ServedFormat = Literal["auto", "adapter", "bf16", "fp8", "fp8_block", "int4", "int4_gptq", "int4_awq", "nvfp4"]


@dataclass(frozen=True, config=CLOSED)
class ExportConfig:
    formats: list[ExportFormat] = ("bf16",)  # type: ignore[assignment]
    """Formats to write: adapter (as trained), bf16, fp8, fp8_block (128 x 128), int4 (the better of GPTQ and rounding),
    int4_gptq, int4_awq, nvfp4, gguf (llama.cpp, Ollama)."""
    gguf_type: Literal["q8_0", "bf16", "f16"] = "q8_0"
    """How gguf stores matrices; q8_0 is 8 bits with a scale for every 32 weights."""
    calibration_rows: PositiveInt = 64
    """Training rows that GPTQ, AWQ and nvfp4 calibrate on; rendered with the chat template."""
    verification_rows: PositiveInt = 32
    """Held-out packed rows that each export is scored on."""
    thresholds: dict[ExportFormat, ThresholdsConfig] | None = None
    """Limits by format (those of fp8 also hold fp8_block, of int4 its variants); null is the shipped defaults."""


@dataclass(frozen=True, config=CLOSED)
class EndpointConfig:
    server: Text = "vllm"
    """Server that exports are written for: vllm, sglang, or a version of one (vllm==0.27.1); a worker runs vLLM."""
    serve_as: ServedFormat = "auto"
    """Which exported format the bundle serves; auto: the smallest that passed and goes over endpoint.count."""
    max_model_len: PositiveInt | Auto = "auto"
    """Longest request, prompt and answer, tokens; auto: sequence_length, or what the model knows if less."""
    worker: Literal["worker-vllm", "handler"] = "worker-vllm"
    """What runs on the endpoint: the provider's vLLM worker, or the bundle's own handler in an image that you build."""
    image: Text | None = None
    """Container image to deploy; null is worker-vllm's. The handler's has to be built and pushed first."""
    weights: Literal["volume", "image"] = "volume"
    """Where a worker finds the weights: on a network volume, or baked into the handler's image."""
    gpu: Text = "auto"
    """A GPU of the catalogue; auto: the cheapest that carries the load below."""
    count: PositiveInt | Auto = "auto"
    """GPUs of one worker, joined by tensor parallelism; auto: with gpu."""
    kv_cache_dtype: Literal["bf16", "fp8"] = "bf16"
    """fp8 holds twice the tokens; uncalibrated here, so check long contexts."""
    gpu_memory_utilization: Annotated[float, Strict(), Gt(0), Lt(1)] = 0.9
    """Share of each card's memory that the server may take."""
    requests_per_second: PositiveFloat = 0.05
    """Load that the endpoint is sized for, mean."""
    arrivals: Text = "poisson"
    """How requests come: poisson, bursty (ten times the rate for a minute, then silence), or a CSV of times."""
    prompt_tokens: PositiveInt | Auto = "auto"
    """Of a usual request; auto: three quarters of max_model_len."""
    output_tokens: PositiveInt | Auto = "auto"
    """Of a usual answer, its reasoning included; auto: a quarter of max_model_len."""
    best_of_n: PositiveInt = 1
    """Answers generated for each prompt."""
    prefix_share: FractionBelowOne = 0.0
    """Share of the prompt that all requests have in common (a system message), found in the prefix cache."""
    p99_first_token_ms: PositiveFloat | None = None
    """Milliseconds to the first token that 99% of requests to a warm worker stay below; null: no limit."""
    min_workers: NonNegativeInt = 0
    """Workers that are always up (Active); 0 is Flex alone, which costs nothing while nobody asks."""
    max_workers: PositiveInt | Auto = "auto"
    """auto: twice what the load needs, at least 2."""
    idle_timeout_s: Annotated[int, Strict(), Ge(1), Le(3600)] = 10
    """Seconds that an idle worker waits, billed, before it ends."""
    flashboot: Flag = True
    """Ask the provider to keep ended workers' state for faster starts; no time is promised."""
    active_discount: FractionBelowOne = 0.0
    """Discount of Active workers that you agreed with the provider; there is no public one."""
    max_slowdown: Annotated[float, Strict(), Ge(1)] = 5.0
    """A deployed endpoint that is more times slower than planned is taken back; the plan is modelled, not measured."""


@dataclass(frozen=True, config=CLOSED)
class LaunchConfig:
    name: Literal["local", "runpod", "slurm", "ssh"] = "local"
    """Where the job runs: this machine, a rented one that is terminated at its end, a Slurm cluster, hosts by SSH."""
    nodes: Nodes | Auto = "auto"
    """Machines; auto: hardware.nodes, or as many as launch.hosts. Several rented ones are an Instant Cluster."""
    force_pods: Flag = False
    """Rent plain Pods for several nodes although nothing fast joins them; launch.max_hours must be given."""
    hosts: list[Text] = ()  # type: ignore[assignment]
    """ssh: the machines, user@host or user@host:port; the first one is where the others meet."""
    ssh_config: Text | None = None
    """ssh: OpenSSH client configuration (ssh -F) to use instead of your own."""
    python: Text = "auto"
    """ssh, slurm: the interpreter there that has this version of loadmaster; auto: ssh python3, slurm this very one."""
    folder: Text = "loadmaster"
    """ssh: folder there for jobs and runs, from the login's home; several hosts share it."""
    sbatch: list[Text] = ()  # type: ignore[assignment]
    """slurm: further options of sbatch, each with its value (--partition=gpu)."""
    gpus: list[Text] | Auto = "auto"
    """GPUs to choose from, of the catalogue, with a count or any (h100_80gb:2, l40s); auto: all, or hardware.gpu."""
    objective: Literal["cost", "time"] = "cost"
    """Which machine to prefer among those that fit: the cheapest for the whole job, or the fastest."""
    max_usd_per_hour: PositiveFloat | None = None
    """Dearest machine to take, US dollars an hour."""
    max_usd: PositiveFloat | None = None
    """Most to spend: what is rented ends then, a run here stops before, at the plan's price. Null: max_hours alone."""
    max_hours: PositiveFloat | Auto = "auto"
    """Hours until the job is ended; slurm: of each of its runs (--time); auto: twice the plan and one, where rented."""
    grace_s: PositiveFloat = 120
    """Seconds from SIGTERM to a saved checkpoint; what still runs then is killed, and the checkpoint before counts."""
    hang_timeout_s: PositiveFloat | Auto = "auto"
    """Seconds that a step may stand still in a run of several processes; auto: 20 times the slowest, at least 300."""
    cloud: Literal["secure", "community"] = "secure"
    """The provider's own data centres, or other people's hosts, which cost less and have no network volumes."""
    data_centers: list[Text] = ()  # type: ignore[assignment]
    """Data centres to choose from; none named: all."""
    image: Text = "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"
    """Container image, with a tag or digest; its entry point must run the arguments that it is given."""
    package: Text | None = "auto"
    """What pip installs there: pinned (name==1.2.3, a URL with a hash or commit), or a wheel here, which travels; auto:
    this very code as a wheel, or with an image of your own nothing; null: nothing, it is in the image."""
    disk_gb: PositiveInt | Auto = "auto"
    """Container disk, GB; auto: room for the image and, without a volume, for the run."""
    volume: Text | None = "loadmaster"
    """Network volume (name or id) for checkpoints and exports, made when there is none of that name; null: none."""
    volume_gb: PositiveInt | Auto = "auto"
    """Size of a volume that is made, GB (10 to 4096); auto: what the plan writes, and the base model twice."""
    fetch: Flag = False
    """Bring the exports home from the volume once the machine has ended; false: `loadmaster fetch` does, any time."""
    env: dict[str, str] | None = None
    """Environment variables of the job; no secrets."""
    secrets: dict[str, str] | None = None
    """Environment variables from secrets of the provider (ssh, slurm: variables here): variable, name of the secret."""
    yes: Flag = False
    """Rent without asking."""
    dry_run: Flag = False
    """Print the exact requests that would be sent, and stop. Needs no key."""


@dataclass(frozen=True, config=CLOSED)
class TrackerConfig:
    name: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "tensorboard"
    """Experiment tracker; metrics.jsonl is written in any case."""
    project: Text = "loadmaster"
    """Project (or experiment) name in the tracker."""


@dataclass(frozen=True, config=CLOSED)
class Job:
    recipe: Text = "custom"
    """Name of the recipe that this job was composed from; names the run directory."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sequence_length: Annotated[int, Strict(), Ge(2), Le(LONGEST_ROW)] = 2048
    """Tokens in a packed row; the longest context trained on."""
    objective: Literal["sft", "dpo", "orpo", "kto"] = "sft"
    """sft: the likelihood of answers; dpo, orpo, kto: preference between pairs of answers (kto: or labelled ones)."""
    preference: PreferenceConfig = PreferenceConfig()
    method: Literal["auto", "lora", "qlora", "full"] = "auto"
    """lora: adapters on a frozen bf16 base; qlora: on an nf4 base; full: every weight."""
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Compute dtype; fp8: a frozen base held in FP8 (lora), or products on FP8 units over bf16 weights (full).
    auto: bf16, or fp8 where that is faster; fp32 on a CPU. A GPU takes fp32 for models that cap scores (Gemma 2)."""
    lora: LoraConfig = LoraConfig()
    neftune_alpha: NonNegativeFloat = 0.0
    """NEFTune: uniform noise on the embeddings in training, up to this over the root of a document's tokens times the
    hidden size; 0: none, 5 is usual."""
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    micro_batch_size: PositiveInt | Auto = "auto"
    """Packed rows on one GPU at a time."""
    epochs: Annotated[float, Strict(), Gt(0), Le(MOST)] = 1.0
    """Passes over the packed training rows."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps; null is the number that epochs gives."""
    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto"
    """Recompute activations in the backward pass instead of keeping them: of each decoder layer all but large products
    and attention (selective), all (full), or all, its input in host memory and its MLP by pieces (offload, for very
    long rows)."""
    checkpointed_layers: PositiveInt | Auto = "auto"
    """With activation_checkpointing=full: so many of the first decoder layers; auto: all, or as few as there is room
    for where activation_checkpointing is auto too."""
    compile: Flag | Auto = "auto"
    """Compile decoder layers (torch.compile); auto: on a GPU. The first step waits for it, a minute or less."""
    sharding: Literal["auto", "none", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    """How weights, gradients and optimizer states are spread over GPUs."""
    offload: Literal["auto", "none", "optimizer", "all"] = "auto"
    """What lives in host memory instead of the GPU's."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Annotated[int, Strict(), Ge(0), Lt(2**63)] = 42
    """Seeds data order, initialisation and dropout."""
    run_dir: Text | Auto = "auto"
    """Run directory; auto: the newest of this very job under runs/<recipe>/, else a new one."""
    stop_after: Stage = "bundle"
    """Last stage to run."""
    plan: PlanConfig = PlanConfig()
    hardware: HardwareConfig = HardwareConfig()
    export: ExportConfig = ExportConfig()
    endpoint: EndpointConfig = EndpointConfig()
    launch: LaunchConfig = LaunchConfig()
    tracker: TrackerConfig = TrackerConfig()
