"""The settings of `gft generate`, declared once, and how any settings file of the toolkit is read.

Frozen pydantic models; an unknown key is an error that names the nearest valid one. Every field's comment is the
documentation that `gft init` and the README show. Paths are relative to the working directory.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, ValidationError, model_validator

from gftdata.errors import UserError
from gftdata.formats import EXPERT_COLUMN, Format
from gftdata.store import named
from gftdata.types import EXPERT, TEACHER_PREFIX, Sampling

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]


class ColumnsConfig(BaseModel):
    """Which columns of the prompt source mean what."""

    model_config = STRICT

    question: str | None = None  # text of the user's message; default `question`
    messages: str | None = None  # or: a whole chat, list of {role, content}
    ground_truth: str | None = None  # what the reward compares with
    expert: str | None = None  # expert demonstration: a text, or a list of texts
    id: str | None = None  # the source's own id of a row
    data_source: str | None = None  # the name of each row's data set, where a file holds several
    extra: tuple[str, ...] = ()  # further columns to carry along

    @model_validator(mode="after")
    def one_of_question_and_messages(self) -> "ColumnsConfig":
        if self.question and self.messages:
            raise ValueError("name either question or messages, not both")
        return self


class ReasoningGymConfig(BaseModel):
    """Prompts from a reasoning-gym task generator."""

    model_config = STRICT

    task: str  # e.g. basic_arithmetic
    size: PositiveInt = 1000
    seed: int = 0
    options: dict[str, Any] = {}  # passed to the task's own config


class EvalSetConfig(BaseModel):
    """Questions that a model will be evaluated on, and that must not be among the prompts."""

    model_config = STRICT

    path: str | None = None  # a .jsonl or .parquet file
    dataset: str | None = None  # or: a data set on the Hub
    subset: str | None = None
    split: str = "test"
    column: str = "question"  # text, or a chat whose last message counts

    @model_validator(mode="after")
    def one_origin(self) -> "EvalSetConfig":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("name exactly one of path and dataset")
        return self


class DuplicatesConfig(BaseModel):
    """What becomes of prompts that come again. They are always counted, unless `near` is `ignore`."""

    model_config = STRICT

    exact: Literal["keep", "remove"] = "keep"  # the same messages and ground truth
    near: Literal["ignore", "keep", "remove"] = "keep"  # another prompt's words, almost
    similarity: Probability = 0.8  # near: estimated Jaccard similarity of the questions' word 5-grams, from here on


class PromptsConfig(BaseModel):
    """Where prompts come from and how a row becomes one."""

    model_config = STRICT

    path: str | None = None  # a .jsonl or .parquet file, or s3://bucket/file
    dataset: str | None = None  # or: a data set on the Hub (or a folder that `datasets` loads)
    subset: str | None = None  # its configuration name
    split: str = "train"
    reasoning_gym: ReasoningGymConfig | None = None  # or: a task generator
    reuse: str | None = None  # or: an earlier data set of response groups, folder or Hub id, with its responses
    format: Format | None = None  # rows as GSM8K or MATH have them: question, ground truth and expert without `columns`
    columns: ColumnsConfig = ColumnsConfig()
    template: str | None = None  # e.g. "{question} Let's think step by step."
    system: str | None = None  # a system message put first
    data_source: str | None = None  # name recorded with each prompt; default: the file's or data set's name
    limit: PositiveInt | None = None  # take the first so many rows
    max_prompt_tokens: PositiveInt = 1024
    on_too_long: Literal["skip", "error"] = "skip"  # a longer prompt is counted and left out, or stops the run
    on_missing_ground_truth: Literal["error", "keep"] = "error"  # keep: its responses stay unjudged

    @model_validator(mode="after")
    def one_origin(self) -> "PromptsConfig":
        if sum(x is not None for x in (self.path, self.dataset, self.reasoning_gym, self.reuse)) != 1:
            raise ValueError("name exactly one of path, dataset, reasoning_gym, reuse")
        unused = {
            "format": self.format is not None,
            "columns": self.columns != ColumnsConfig(),
            "template": self.template is not None,
            "system": self.system is not None,
            "data_source": self.data_source is not None,
            "subset": self.subset is not None,
            "split": self.split != "train",
        }
        if self.reuse is not None and any(unused.values()):
            named = ", ".join(name for name, is_set in unused.items() if is_set)
            raise ValueError(f"reuse takes prompts as they are: {named} cannot be set")
        if self.data_source is not None and self.columns.data_source is not None:
            raise ValueError("data_source names all rows, columns.data_source each of them: set one of the two")
        if self.template is not None and "{question}" not in self.template:
            raise ValueError("template must contain {question}")
        if self.template is not None and self.columns.messages is not None:
            raise ValueError("template applies to a question column, and columns.messages is set")
        if self.format is not None and self.reasoning_gym is not None:
            raise ValueError("format is of files and data sets; reasoning_gym has its own")
        read = self.columns.model_dump(include={"question", "messages", "ground_truth", "expert"}, exclude_none=True)
        if self.format is not None and read:
            raise ValueError(f"format {self.format} reads the columns itself: {', '.join(read)} cannot be set")
        return self

    @property
    def expert_column(self) -> str | None:
        """Where the expert demonstrations are."""
        return EXPERT_COLUMN if self.format is not None else self.columns.expert


class RewardConfig(BaseModel):
    """How responses are judged."""

    model_config = STRICT

    name: str = "math"  # math, numeric, exact, choice, reasoning_gym, or pkg.mod:function
    timeout_s: Annotated[float, Field(gt=0)] = 10.0  # a judgement that takes longer is killed: status timeout
    workers: PositiveInt | None = None  # judging processes; default: by the number of cores
    memory_gb: Annotated[float, Field(gt=0)] = 4.0  # what one judging process may take beyond its libraries


class SamplingConfig(BaseModel):
    """How one source draws its responses."""

    model_config = STRICT

    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Probability = 1.0
    stop: tuple[str, ...] = ()  # texts that end a response, kept in it (an openai endpoint cuts them off)

    def with_limit(self, max_tokens: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, max_tokens, self.stop)


class ExpertConfig(BaseModel):
    """Expert demonstrations, from `prompts.columns.expert`, or those of a reused data set."""

    model_config = STRICT

    count: Annotated[int, Field(ge=0)] = 1
    remove_thinking: bool = False  # leave out what stands before `</think>`


class HfConfig(BaseModel):
    """The embedded engine: transformers in this process, on CPU or GPU."""

    model_config = STRICT

    name: Literal["hf"] = "hf"
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on CPU, bfloat16 on a GPU
    batch_size: PositiveInt = 128  # samples drawn together
    batch_tokens: PositiveInt = 16384  # tokens scored together, padding included


class SglangConfig(BaseModel):
    """SGLang's offline engine in a child process, perhaps in another environment."""

    model_config = STRICT

    name: Literal["sglang"]
    python: str | None = None  # interpreter of an environment that has SGLang; default: this one
    max_in_flight: PositiveInt = 256  # requests with the engine at a time
    options: dict[str, Any] = {}  # of sglang.Engine: tp_size, dp_size, mem_fraction_static, quantization, ...


class ServerConfig(BaseModel):
    """A running SGLang server (`python -m sglang.launch_server`), or several that serve the same model."""

    model_config = STRICT

    name: Literal["server"]
    urls: Annotated[tuple[str, ...], Field(min_length=1)]  # e.g. [http://node1:30000, http://node2:30000]
    serves: str | None = None  # the server's own name for the model, where it is not the config's
    max_in_flight: PositiveInt = 256  # requests with the servers at a time, all together
    timeout_s: Annotated[float, Field(gt=0)] = 600.0  # an answer that takes longer is asked for again
    give_up_after_s: Annotated[float, Field(gt=0)] = 600.0  # without any answer (bounds timeout_s): the run ends here


class OpenaiConfig(BaseModel):
    """Any OpenAI-compatible endpoint. It gives text only, so it can be a teacher and never the reference."""

    model_config = STRICT

    name: Literal["openai"]
    base_url: str | None = None  # default: the `openai` client's own (OPENAI_BASE_URL, or OpenAI)
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; the key is written nowhere
    max_in_flight: PositiveInt = 32  # requests at a time
    timeout_s: Annotated[float, Field(gt=0)] = 600.0  # an answer that takes longer is asked for again
    give_up_after_s: Annotated[float, Field(gt=0)] = 600.0  # without any answer (bounds timeout_s): the run ends here
    extra: dict[str, Any] = {}  # further fields of the request body, e.g. {reasoning_effort: low}


def _engine_name(value: Any) -> str:
    return str(value.get("name", "hf") if isinstance(value, Mapping) else getattr(value, "name", "hf"))


# What runs a model; `name` says which, and hf is the default.
EngineConfig = Annotated[
    Annotated[HfConfig, Tag("hf")] | Annotated[SglangConfig, Tag("sglang")] | Annotated[ServerConfig, Tag("server")],
    Discriminator(_engine_name),
]
# A teacher is only sampled, so text without ids and log-probs will do.
TeacherEngineConfig = Annotated[
    Annotated[HfConfig, Tag("hf")]
    | Annotated[SglangConfig, Tag("sglang")]
    | Annotated[ServerConfig, Tag("server")]
    | Annotated[OpenaiConfig, Tag("openai")],
    Discriminator(_engine_name),
]
TAGGED = {(key, name) for key in ("engine", "reference_engine") for name in ("hf", "sglang", "server", "openai")}
# What changes how an engine computes and not what: a run may continue with other values.
COMPUTE_SETTINGS = {
    "batch_size",
    "batch_tokens",
    "device",
    "python",
    "max_in_flight",
    "urls",
    "base_url",
    "api_key_env",
    "timeout_s",
    "give_up_after_s",
}
COMPUTE_OPTIONS = {
    "tp_size",
    "dp_size",
    "pp_size",
    "device",
    "mem_fraction_static",
    "max_total_tokens",
    "max_running_requests",
    "chunked_prefill_size",
    "attention_backend",
    "disable_cuda_graph",
    "disable_overlap_schedule",
    "log_level",
}


COMPUTED: dict[str, Any] = dict.fromkeys(COMPUTE_SETTINGS, True) | {"options": COMPUTE_OPTIONS}  # not in a recipe


class TeacherConfig(BaseModel):
    """Responses of a stronger model: a column that holds them, or a model to sample."""

    model_config = STRICT

    name: Name  # the source is recorded as teacher:<name>
    column: str | None = None  # given responses: a text, or a list of texts
    reused: str | None = None  # or: a source of the data set in prompts.reuse, e.g. teacher:qwen, or self
    model: str | None = None  # or: a model to sample
    engine: TeacherEngineConfig | None = None  # what runs that model; default: the config's engine
    count: PositiveInt = 3
    sampling: SamplingConfig = SamplingConfig()
    template: str | None = None  # how this model is asked, e.g. "{question} Think first."; default: as the prompt is
    system: str | None = None  # its system message, in place of the prompt's
    remove_thinking: bool = False  # leave out what stands before `</think>`

    @model_validator(mode="after")
    def one_origin(self) -> "TeacherConfig":
        if sum(x is not None for x in (self.column, self.reused, self.model)) != 1:
            raise ValueError("name exactly one of column, reused and model")
        if self.model is None and not (self.template is None and self.system is None and self.engine is None):
            raise ValueError("template, system and engine apply to a model that is sampled")
        if self.template is not None and "{question}" not in self.template:
            raise ValueError("template must contain {question}")
        return self

    @property
    def source(self) -> str:
        return TEACHER_PREFIX + self.name


class SelfConfig(BaseModel):
    """Samples of the starting model itself."""

    model_config = STRICT

    count: Annotated[int, Field(ge=0)] = 4
    sampling: SamplingConfig = SamplingConfig()


class ResponsesConfig(BaseModel):
    """The group of each prompt. The paper's: 1 expert + 3 teacher + 4 self."""

    model_config = ConfigDict(**STRICT, populate_by_name=True)

    expert: ExpertConfig = ExpertConfig()
    teachers: tuple[TeacherConfig, ...] = ()
    own: SelfConfig = Field(default=SelfConfig(), alias="self")
    max_tokens: PositiveInt = 2048  # samples stop here; a longer given text is left out and counted

    @model_validator(mode="after")
    def something_to_do(self) -> "ResponsesConfig":
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"two teachers have the same name: {names}")
        if self.size == 0:
            raise ValueError("every count is 0: a group needs at least one response")
        return self

    @property
    def size(self) -> int:
        """K: responses of a complete group."""
        return self.expert.count + sum(teacher.count for teacher in self.teachers) + self.own.count

    @property
    def given_counts(self) -> dict[str, int]:
        """Source -> count, for the sources that come with the prompts."""
        given = {EXPERT: self.expert.count} if self.expert.count else {}
        return given | {teacher.source: teacher.count for teacher in self.teachers if teacher.model is None}

    def removes_thinking(self, source: str) -> bool:
        """Whether responses of a source lose what stands before `</think>`."""
        return (source == EXPERT and self.expert.remove_thinking) or any(
            teacher.remove_thinking for teacher in self.teachers if teacher.source == source
        )


class ShardsConfig(BaseModel):
    """How the data set is cut into files."""

    model_config = STRICT

    groups_per_shard: PositiveInt = 256
    row_group_size: PositiveInt = 64
    logprob_dtype: Literal["float32", "float16"] = "float32"


class GenerateConfig(BaseModel):
    """All of `gft generate`."""

    model_config = STRICT

    model: str  # the starting model: draws the self samples and gives the reference log-probs
    out: str  # folder of the data set, or s3://bucket/path
    prompts: PromptsConfig
    duplicates: DuplicatesConfig = DuplicatesConfig()
    decontaminate: tuple[EvalSetConfig, ...] = ()  # prompts that share 8 words in a row with these are left out
    reward: RewardConfig = RewardConfig()
    responses: ResponsesConfig = ResponsesConfig()
    engine: EngineConfig = HfConfig()
    shards: ShardsConfig = ShardsConfig()
    seed: int = 0
    extend: str | None = None  # a finished data set of this recipe with fewer prompts or responses, to add to

    @model_validator(mode="after")
    def given_sources_have_an_origin(self) -> "GenerateConfig":
        for teacher in self.responses.teachers:
            if (
                isinstance(self.engine, ServerConfig)
                and teacher.model not in (None, self.model)
                and teacher.engine is None
            ):
                raise ValueError(
                    f"{teacher.source} needs an engine of its own: the config's is servers of {self.model}, and "
                    f"the teacher is {teacher.model}"
                )
            if teacher.reused is not None and self.prompts.reuse is None:
                raise ValueError(f"{teacher.source} is reused from a data set, and prompts.reuse names none")
            if teacher.column is not None and self.prompts.reuse is not None:
                raise ValueError(
                    f"{teacher.source} is a column, and prompts.reuse has none: name the source with `reused`"
                )
        if self.prompts.reuse is not None:
            return self
        if self.responses.expert.count and self.prompts.expert_column is None:
            raise ValueError(
                f"responses.expert.count is {self.responses.expert.count} but prompts.columns.expert names no column: "
                "name it, or set the count to 0"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """The settings that change the output; a run continues only where these are the same."""
        return self.model_dump(
            mode="json",
            by_alias=True,
            exclude={
                "out": True,
                "engine": COMPUTED,
                "reward": {"workers"},
                "responses": {"teachers": {"__all__": {"engine": COMPUTED}}},
            },
        )


Config = TypeVar("Config", bound=BaseModel)


def load_config(
    kind: type[Config], path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML settings file, apply `a.b=value` overrides (the value is YAML) and `values` (as they are), validate.

    In a list of named blocks the name says which: `responses.teachers.qwen.count=2`.

    Raises UserError, in one line, for a missing file, bad YAML, an unknown key (with the nearest valid one) or a value
    of the wrong type.
    """
    path = Path(path)
    return load_settings(kind, read_settings(path), str(path), overrides, values)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping of a YAML settings file, not validated. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such config file; `gft init` writes a starter config")
    try:
        with named(path):
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    return data


def load_settings(
    kind: type[Config],
    data: dict[str, Any],
    where: str,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """As `load_config`, for settings that are in no file; `data` is changed."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"--set {override}: expected key=value, for example --set optim.lr=2e-6")
        try:
            _put(data, key, yaml.safe_load(value))
        except yaml.YAMLError:
            raise UserError(f"--set {override}: the value is not valid YAML") from None
    for key, value in (values or {}).items():
        _put(data, key, value)
    return validate_config(kind, data, where)


def validate_config(kind: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Validate settings held in a mapping; `where` opens the error line."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(kind, e) for e in _telling(error))) from None


def _telling(error: ValidationError) -> list[dict[str, Any]]:
    """Errors of the file: not that a list whose entries are wrong has none left."""
    found = error.errors()
    inner = {each["loc"][:n] for each in found for n in range(len(each["loc"]))}
    return [dict(each) for each in found if each["type"] != "too_short" or each["loc"] not in inner]


def recipe_differences(before: Any, now: Any) -> str:
    """The settings in which two recipes differ, for an error of one line; empty where they are the same."""
    differing = list(_differences(before, now, ""))
    if not differing:
        return ""
    key, old, new = differing[0]
    others = ", ".join(f"`{other}`" for other, *_ in differing[1:])
    more = f" (also different: {others})" if others else ""
    return f"`{key}` was {old!r} and is now {new!r}{more}"


def _differences(before: Any, now: Any, path: str) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(k for k in now if k not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield path, before, now


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    block: Any = data
    for parent in parents:
        block = _named(block, parent, key) if isinstance(block, list) else block.setdefault(parent, {})
        if not isinstance(block, dict | list):
            raise UserError(f"--set {key}: `{parent}` is not a block of settings")
    if isinstance(block, list):
        raise UserError(f"--set {key}: say what of `{leaf}` to set, as in {key}.KEY=VALUE")
    block[leaf] = value


def _named(blocks: list[Any], name: str, key: str) -> Any:
    """The block of a list, such as teachers or benchmarks, that has this name."""
    names = [block.get("name") if isinstance(block, dict) else None for block in blocks]
    if name not in names:
        raise UserError(f"--set {key}: nothing is named `{name}` there; there are: {', '.join(map(str, names))}")
    return blocks[names.index(name)]


def _explain(kind: type[BaseModel], error: dict[str, Any]) -> str:
    # pydantic puts the chosen engine's tag after `engine`; the file has no such level
    parts = [p for before, p in zip((None, *error["loc"]), error["loc"], strict=False) if (before, p) not in TAGGED]
    location = ".".join(str(part) for part in parts)
    if error["type"] == "union_tag_invalid":
        return f"`{location}.name`: expected one of {error['ctx']['expected_tags']}, found '{error['ctx']['tag']}'"
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys here: {', '.join(valid)}"
        return f"unknown key `{location}`; {hint}"
    if error["type"] == "missing":
        return f"missing key `{location}`"
    message = str(error["msg"]).removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f", found {error['input']!r}"
    return f"`{location}`: {message}{found}" if location else message


def _valid_keys(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Names of the settings in the block at `location`, found by walking the models' annotations."""
    choices: list[type[BaseModel]] = [kind]
    for part in location:
        if isinstance(part, int):
            continue
        tagged = [
            c
            for c in choices
            if len(choices) > 1 and part in getattr(c.model_fields["name"].annotation, "__args__", ())
        ]
        if tagged:
            choices = tagged
            continue
        field = next(f for name, f in choices[0].model_fields.items() if part in (name, f.alias))
        choices = list(_models_in(field.annotation))
    kind = choices[0]
    return [field.alias or name for name, field in kind.model_fields.items()]


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
