"""The settings of `gft train` and `gft eval`, declared once. `gftdata.config.load_config` reads them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, ValidationError, model_validator

from gftdata.config import (
    STRICT,
    EngineConfig,
    HfConfig,
    Name,
    PromptsConfig,
    RewardConfig,
    SamplingConfig,
    ServerConfig,
)

NonNegative = Annotated[float, Field(ge=0.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
LARGEST_MICRO_BATCH = 8192  # tokens
SOURCES = ("expert", "teacher", "self")  # `teacher` is every teacher, `teacher:<name>` one


def _check_sources(key: str, sources: tuple[str, ...]) -> None:
    wrong = [s for s in sources if s not in SOURCES and not s.startswith("teacher:")]
    if wrong or not sources:
        raise ValueError(f"{key}: expected some of {', '.join(SOURCES)} or teacher:<name>, found {wrong or 'none'}")


class ObjectiveConfig(BaseModel):
    """Which responses are trained on, and how a token weighs. The defaults are GFT (arXiv:2604.14258)."""

    model_config = STRICT

    sources: tuple[str, ...] = SOURCES
    min_reward: float | None = None  # use only responses with at least this reward (RFT: 1)
    advantage: Literal["group", "one"] = "group"
    coefficient: Literal["rectified", "clipped_ratio"] = "rectified"
    tau: NonNegative = 0.7  # rectified: 0 is the plain gradient (SFT), above 1 is pi everywhere (DFT);
    # the paper's sweep is best near 0.7, the authors' script uses 0.1, their function's default is 0.5
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2  # clipped_ratio: the ratio stays above 1 - clip_low
    clip_high: Annotated[float, Field(gt=0)] = 0.2  # and below 1 + clip_high
    old_policy: Literal["reference", "refreshed"] = "reference"  # clipped_ratio: whose log-probs the ratio is to
    refresh_every: PositiveInt = 8  # refreshed: the current model becomes the old policy every so many steps
    kl_coef: NonNegative = 0.0  # weight of an elementwise KL penalty to the stored reference
    advantage_floor: Annotated[float, Field(lt=0)] | None = None  # no advantage below it; not the paper's: one wrong
    # answer among eight gets -2.47, which is what this tames

    @model_validator(mode="after")
    def consistent(self) -> "ObjectiveConfig":
        _check_sources("sources", self.sources)
        if self.min_reward is not None and self.advantage == "group":
            raise ValueError("min_reward leaves a group with equal rewards: set advantage to one")
        if self.advantage_floor is not None and self.advantage == "one":
            raise ValueError("advantage_floor is for group advantages; with advantage: one there is nothing below 0")
        return self


class OptimConfig(BaseModel):
    """AdamW on float32 master weights."""

    model_config = STRICT

    lr: Annotated[float, Field(gt=0)] = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = 0.01
    schedule: str = "constant_with_warmup"  # a name of transformers' schedules: linear, cosine, ...
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of all steps
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class BatchConfig(BaseModel):
    """What one optimizer step holds, and how it is cut for the device. The cut does not change the update."""

    model_config = STRICT

    groups_per_step: PositiveInt = 64
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"  # tokens of one forward pass on one device, padding
    # included; auto: up to LARGEST_MICRO_BATCH, less where that saves memory (fit.py)
    layout: Literal["shared_prefix", "packed", "padded"] = "shared_prefix"  # shared_prefix: a prompt is computed once
    # for all responses of its group; packed: with each of them; padded: a response a row, for models whose attention
    # cannot be told what may see what
    shuffle_row_groups: PositiveInt = 16  # groups are mixed within so many row groups

    @property
    def limit(self) -> int:
        """Tokens of a micro-batch, where nothing was found out of model and device yet: the largest."""
        return LARGEST_MICRO_BATCH if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


class FilterConfig(BaseModel):
    """Which groups and responses of the data are looked at. What is left out here is not in N."""

    model_config = STRICT

    min_pass: Share = 0.0  # groups whose pass rate is lower are left out; bounds included
    max_pass: Share = 1.0
    pass_sources: tuple[str, ...] = ("self",)  # whose responses the pass rate is of
    max_prompt_tokens: PositiveInt | None = None  # groups with a longer prompt are left out
    max_response_tokens: PositiveInt | None = None  # longer responses are left out, before the advantages

    @model_validator(mode="after")
    def consistent(self) -> "FilterConfig":
        if self.min_pass > self.max_pass:
            raise ValueError(f"min_pass {self.min_pass} is above max_pass {self.max_pass}: nothing would be left")
        _check_sources("pass_sources", self.pass_sources)
        return self


class LoraConfig(BaseModel):
    """Low-rank adapters (arXiv:2106.09685), by peft: the base model stays frozen."""

    model_config = STRICT

    rank: PositiveInt = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    targets: str | tuple[str, ...] = "all-linear"  # names of modules, or all linear ones but the head


class DrawConfig(BaseModel):
    """What is drawn for each prompt of an evaluation, and how it is judged."""

    model_config = STRICT

    reward: RewardConfig = RewardConfig()
    num_samples: PositiveInt = 16  # per prompt
    sampling: SamplingConfig = SamplingConfig(temperature=0.5)
    max_tokens: PositiveInt = 4096

    @property
    def samples_the_model_itself(self) -> bool:
        """Whether samples follow pi, so that averages of log pi over them estimate entropy and KL."""
        return self.sampling.temperature == 1.0 and self.sampling.top_p == 1.0 and not self.sampling.stop


class MeasureConfig(DrawConfig):
    """And what is measured on it."""

    k: tuple[PositiveInt, ...] | None = None  # pass@k for these; default: 1 and num_samples
    greedy: bool = True  # and the likeliest answer, once for each prompt
    reference: str | None = None  # a model to measure KL(model || reference) to; needs temperature 1 and top_p 1

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k, 1 among them."""
        return tuple(sorted({1, *((self.num_samples,) if self.k is None else self.k)}))


class TrainEvalConfig(DrawConfig):
    """An evaluation of the model in training, every so many steps."""

    every_steps: PositiveInt
    prompts: PromptsConfig
    num_samples: PositiveInt = 4
    max_tokens: PositiveInt = 1024
    engine: HfConfig = HfConfig()
    stop_when_worse: bool = True  # save and end the run where pass@1 stays below what it was before training


class CheckpointConfig(BaseModel):
    """When to save, and how many to keep."""

    model_config = STRICT

    every_steps: PositiveInt = 100
    keep: PositiveInt = 2


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# Folders of gft generate, or hf://datasets/<id> and s3://<bucket>/<path>.
Data = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class TrainSettings(BaseModel):
    """How to train: what stays the same when objectives are compared."""

    model_config = STRICT

    filter: FilterConfig = FilterConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    lora: LoraConfig | None = None
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None  # stop earlier
    unjudged_groups: Literal["error", "skip"] = "error"  # groups of which no response could be judged
    max_reference_gap: Annotated[float, Field(gt=0)] = 0.15  # nats a token: a run whose starting model is further from
    # the stored reference log-probs, on average, does not start
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward pass; auto: bfloat16 on a GPU
    gradient_checkpointing: bool | Literal["selective"] = False  # recompute activations for less memory: all of a
    # layer's (true: a third more work), or those between its matrix products (selective: little more work)
    compile: bool = False  # torch.compile the decoder layers
    reduce_once: bool = False  # several ranks: sum gradients once a step, not once a micro-batch; holds them whole
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl
    evaluation: TrainEvalConfig | None = None


class TrainConfig(TrainSettings):
    """All of `gft train`."""

    model: str  # the model that generated the data's self samples
    data: Data
    out: str  # run folder
    objective: ObjectiveConfig = ObjectiveConfig()
    seed: int = 0

    def recipe(self) -> dict[str, Any]:
        """The settings that change the trained weights beyond rounding; a run resumes only where these are the same."""
        computed = ("out", "device", "checkpoint", "gradient_checkpointing", "compile", "reduce_once", "loggers")
        watched = ("evaluation", "max_reference_gap")
        left_out: dict[str, Any] = dict.fromkeys((*computed, *watched), True)
        return self.model_dump(mode="json", exclude={**left_out, "batch": {"micro_batch_tokens", "layout"}})


class BenchmarkConfig(MeasureConfig):
    """One set of prompts to evaluate on; what it does not say of the measurement is as the whole config says."""

    name: Name  # of its line, and of its folder in OUT/evals/
    prompts: PromptsConfig

    @model_validator(mode="after")
    def consistent(self) -> "BenchmarkConfig":
        if max(self.ks) > self.num_samples:
            raise ValueError(
                f"pass@{max(self.ks)} needs num_samples of at least {max(self.ks)}, found {self.num_samples}"
            )
        if self.reference and not self.samples_the_model_itself:
            raise ValueError("reference: the KL estimate needs sampling.temperature 1 and top_p 1")
        return self


class EvalSettings(MeasureConfig):
    """How to evaluate a model. What `MeasureConfig` has stands here for all benchmarks, in one of them for it alone."""

    benchmarks: Annotated[tuple[BenchmarkConfig, ...], Field(min_length=1)]
    engine: EngineConfig = HfConfig()
    reference_engine: EngineConfig | None = None  # what scores with the reference; default: the config's engine
    seed: int = 0  # of the samples

    @model_validator(mode="before")
    @classmethod
    def inherit(cls, data: Any) -> Any:
        """Complete each benchmark's block by the settings for all."""
        if not isinstance(data, Mapping) or not isinstance(data.get("benchmarks"), list | tuple):
            return data
        shared = {key: value for key, value in data.items() if key in MeasureConfig.model_fields}
        try:
            MeasureConfig.model_validate(shared)
        except ValidationError:  # said of the whole config, once, and not of each benchmark again
            return data
        return {**data, "benchmarks": [_completed(block, shared) for block in data["benchmarks"]]}

    @model_validator(mode="after")
    def consistent(self) -> "EvalSettings":
        names = [benchmark.name.lower() for benchmark in self.benchmarks]  # some file systems know no case
        if len(set(names)) != len(names):
            raise ValueError(f"two benchmarks have the same name: {', '.join(names)}")
        referred = any(benchmark.reference is not None for benchmark in self.benchmarks)
        if referred and self.reference_engine is None and isinstance(self.engine, ServerConfig):
            raise ValueError(
                "reference needs an engine of its own (reference_engine): the config's is servers of the model"
            )
        return self


class EvalConfig(EvalSettings):
    """All of `gft eval`."""

    model: str
    out: str | None = None  # folder of the results; default: the run, where the model is one of gft train


def _completed(block: Any, shared: Mapping[str, Any]) -> Any:
    if not isinstance(block, Mapping):
        return block
    return {**block, **{key: _merged(value, block[key]) if key in block else value for key, value in shared.items()}}


def _merged(shared: Any, own: Any) -> Any:
    return {**shared, **own} if isinstance(shared, Mapping) and isinstance(own, Mapping) else own
