"""The settings of `gft train` and `gft eval`, declared once. `gftdata.config.load_config` reads them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, model_validator

from gftdata.config import STRICT, HfConfig, PromptsConfig, RewardConfig, SamplingConfig

NonNegative = Annotated[float, Field(ge=0.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class ObjectiveConfig(BaseModel):
    """Which responses are trained on, and how a token weighs. The defaults are GFT (arXiv:2604.14258)."""

    model_config = STRICT

    sources: tuple[str, ...] = ("expert", "teacher", "self")  # `teacher` is every teacher, `teacher:<name>` one
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

    @model_validator(mode="after")
    def consistent(self) -> "ObjectiveConfig":
        known = ("expert", "teacher", "self")
        wrong = [s for s in self.sources if s not in known and not s.startswith("teacher:")]
        if wrong or not self.sources:
            raise ValueError(f"sources: expected some of {', '.join(known)} or teacher:<name>, found {wrong or 'none'}")
        if self.min_reward is not None and self.advantage == "group":
            raise ValueError("min_reward leaves a group with equal rewards: set advantage to one")
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
    micro_batch_tokens: PositiveInt = 8192  # tokens of one forward pass, padding included
    layout: Literal["padded", "packed"] = "padded"  # packed: responses one after the other in one long row
    shuffle_row_groups: PositiveInt = 16  # groups are mixed within so many row groups


class CheckpointConfig(BaseModel):
    """When to save, and how many to keep."""

    model_config = STRICT

    every_steps: PositiveInt = 100
    keep: PositiveInt = 2


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class TrainConfig(BaseModel):
    """All of `gft train`."""

    model_config = STRICT

    model: str  # the model that generated the data's self samples
    data: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]  # folders of gft generate
    out: str  # run folder
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None  # stop earlier
    unjudged_groups: Literal["error", "skip"] = "error"  # groups of which no response could be judged
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward pass; auto: bfloat16 on a GPU
    gradient_checkpointing: bool = False
    seed: int = 0

    def recipe(self) -> dict[str, Any]:
        """The settings that change the trained weights beyond rounding; a run resumes only where these are the same."""
        computed = {"out": True, "device": True, "checkpoint": True, "gradient_checkpointing": True}
        return self.model_dump(mode="json", exclude={**computed, "batch": {"micro_batch_tokens", "layout"}})


class EvalConfig(BaseModel):
    """All of `gft eval`."""

    model_config = STRICT

    model: str
    prompts: PromptsConfig
    reward: RewardConfig = RewardConfig()
    num_samples: PositiveInt = 16  # per prompt
    k: tuple[PositiveInt, ...] = (1, 16)  # pass@k for these
    greedy: bool = True
    sampling: SamplingConfig = SamplingConfig(temperature=0.5)
    max_tokens: PositiveInt = 4096
    reference: str | None = None  # a model to measure KL(model || reference) to; needs temperature 1 and top_p 1
    engine: HfConfig = HfConfig()
    out: str | None = None  # JSON file of the result
    seed: int = 0

    @model_validator(mode="after")
    def consistent(self) -> "EvalConfig":
        if max(self.k, default=1) > self.num_samples:
            raise ValueError(
                f"pass@{max(self.k)} needs num_samples of at least {max(self.k)}, found {self.num_samples}"
            )
        if self.reference and not self.samples_the_model_itself:
            raise ValueError("reference: the KL estimate needs sampling.temperature 1 and top_p 1")
        return self

    @property
    def samples_the_model_itself(self) -> bool:
        """Whether samples follow pi, so that averages of log pi over them estimate entropy and KL."""
        return self.sampling.temperature == 1.0 and self.sampling.top_p == 1.0 and not self.sampling.stop
