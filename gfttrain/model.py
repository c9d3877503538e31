"""The model in training: float32 master weights, forward pass to losses, sharding, adapters, export.

Shapes: B rows, L positions, N response tokens, D hidden size, V vocabulary.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from gftdata.engines.hf import load_model, token_logprobs
from gftdata.errors import UserError, first_line
from gftdata.store import fsync_file, fsync_folder
from gftdata.tokens import Tokenizer
from gfttrain import lean, onednn
from gfttrain.attention import NAME, build_masks
from gfttrain.config import LoraConfig, TrainConfig
from gfttrain.distributed import World, agree, reshard, sum_gradients
from gfttrain.head import Head, TokenLosses, fused_head
from gfttrain.plan import Cost, Layout
from gfttrain.stream import Batch, Example, collate, singles

# nats a token, on average; rounding stays far below, a leak far above. The largest would not do: bfloat16 logits of 16
# and more are 0.125 apart
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# what costs most to compute and is kept by selective checkpointing
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    *([] if onednn.multiply is None else [onednn.multiply.default]),
]


class Policy(nn.Module):
    """A causal language model with the fused head in its forward pass.

    One module, so that FSDP gathers a head that is tied to the embedding for both of its uses.
    """

    def __init__(self, model: Any, adapter: Any | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head_of(model)
        self._adapter = (adapter,)  # peft's wrapper; in a tuple, so that its parameters are not listed twice

    def forward(
        self, batch: Batch, token_losses: TokenLosses, own_logits: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of losses, losses [N], log-probs [N], entropies [N]); see `fused_head`.

        `own_logits` goes through the model's own head instead and gives log-probs alone: the oracle of the self-check.
        """
        arguments: dict[str, Any] = {
            "input_ids": batch.input_ids_BL,
            "position_ids": batch.position_ids_BL,
            "attention_mask": batch.attention_mask_BL,
            "use_cache": False,
        }
        if batch.segments is not None:
            # a mask that is there already keeps transformers from making one; `attend` looks at the segments
            arguments |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "segments": batch.segments}
            if batch.input_ids_BL.is_cuda:
                config = self.model.config.get_text_config()
                windows = {None, getattr(config, "sliding_window", None)}
                build_masks(batch.segments, windows, getattr(config, "attn_logit_softcapping", None))
        if own_logits:
            logits_NV = self.model(**arguments).logits.flatten(0, 1)[batch.predicts_N]
            logprobs_N = token_logprobs(logits_NV, batch.target_ids_N)
            return logprobs_N.sum(), torch.zeros_like(logprobs_N), logprobs_N, torch.zeros_like(logprobs_N)
        hidden_BLD = self.model.base_model(**arguments).last_hidden_state
        hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, batch.predicts_N)
        output = self.model.get_output_embeddings()
        bias_V = getattr(output, "bias", None)
        return fused_head(hidden_ND, output.weight, bias_V, batch.target_ids_N, token_losses, self.head)


def no_losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
    """For a forward pass of which only the log-probs are wanted."""
    return torch.zeros_like(logprobs_C.detach())


def head_of(model: Any) -> Head:
    """Scale and cap of the logits, as the families that have them name them. The self-check finds another."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))


def load_for_training(config: TrainConfig, world: World) -> Policy:
    """A model with float32 weights on this rank's device, sharded over the ranks: bfloat16 weights would lose updates.

    Without dropout, whatever its config says: with it, log-ratios would be noise and the update would depend on the cut
    into micro-batches.
    """
    error, model = None, None
    if world.rank == 0:
        try:
            model = load_model(config.model, torch.float32, torch.device("cpu"))
        except UserError as found:
            error = found
    agree(world, error)
    if model is None:  # the weights come from rank 0; nothing is read and no memory touched here
        with no_init_weights():
            read = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(read, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if config.batch.layout != "padded":
        model.set_attn_implementation(NAME)
    adapter = None if config.lora is None else add_adapter(model, config.lora, config.seed)
    if config.gradient_checkpointing:
        # transformers 5 renames it on the way; the older name warns where both are there
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        context = {"context_fn": _keep_products} if config.gradient_checkpointing == "selective" else {}
        enable({"use_reentrant": False, **context})
        if config.lora is not None:
            model.enable_input_require_grads()
    policy = Policy(model, adapter).train()
    if config.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    else:
        lean.use_in(model, gated=not config.gradient_checkpointing)
        if world.device.type == "cpu":
            onednn.use_in(model)
    if world.size == 1:
        policy.to(world.device)
    else:
        _shard(policy, config, world)
    return policy


def _keep_products() -> Any:
    """The contexts of selective checkpointing: the backward pass computes a layer again but for its products."""
    return create_selective_checkpoint_contexts(PRODUCTS)


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The precision of the forward pass."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of every forward pass."""
    dtype = compute_dtype(config, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself would not split over devices: what is sharded and compiled as one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # by all names of a class: FSDP puts its own in front
    return [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def _shard(policy: Policy, config: TrainConfig, world: World) -> None:
    """FSDP2: parameters, gradients and optimizer state are split over the ranks; layers are gathered as they come."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    state = policy.state_dict() if world.rank == 0 else {}
    dtype = compute_dtype(config, world.device)
    # without reduce_once, gradients are reduced in float32 whatever the forward pass is in
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(policy.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    sum_gradients(policy)  # N is that of all ranks
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(policy, state, options=options)


def reduce_now(policy: Policy, *, last: bool, world: World, once: bool) -> None:
    """Before a micro-batch: whether its backward pass sums gradients over ranks (`reduce_once`: only the last one)."""
    if world.size > 1 and once:
        policy.set_requires_gradient_sync(last)  # type: ignore[operator]


def add_adapter(model: Any, lora: LoraConfig, seed: int) -> Any:
    """Freeze a model and put low-rank adapters in, with peft. Returns peft's wrapper of it."""
    try:
        import peft
    except ImportError:
        raise UserError("lora needs peft; install it with pip install 'gft-toolkit[lora]'") from None
    torch.manual_seed(seed)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers for an attribute that it has renamed
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"lora.targets {lora.targets}: {first_line(error)}; the linear modules are {', '.join(linear)}"
        ) from None


def outline(model: str) -> Any:
    """A model without weights, for its shape: nothing is read but its configuration."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # what a library makes of damaged or hostile files: anything
        raise UserError(f"{model}: cannot load this model: {first_line(error)[:300]}") from None


def check_layout(outlined: Any, layout: Layout) -> None:
    """Raise UserError for a model whose layers cannot be told what may see what."""
    if layout == "padded":
        return
    config = outlined.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    name = type(outlined).__name__
    if kinds:
        reason = f"has layers of kind {', '.join(sorted(kinds))}, which would mix the responses of a packed row"
    elif not getattr(outlined, "_supports_attention_backend", False):
        reason = "does not take its attention through transformers' attention interface"
    else:
        return
    raise UserError(f"{name} {reason}; set batch.layout=padded")


def parameter_counts(outlined: Any) -> tuple[int, int]:
    """(all parameters, those of the decoder layers). Tied ones count once."""
    inside = sum(p.numel() for layer in decoder_layers(outlined) for p in layer.parameters())
    return sum(p.numel() for p in outlined.parameters()), inside


def training_cost(outlined: Any) -> Cost:
    """FLOPs of training this model: 6 a weight and token, 12 a query, key, head and its size, of each layer.

    2 for the product of a forward pass, 4 for the two of its backward pass; what activation checkpointing computes
    again is not counted, and a mixture of experts counts all of its experts. The attention of sliding-window layers is
    counted as full.
    """
    config = outlined.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Cost(
        per_token=6.0 * parameter_counts(outlined)[1],
        per_pair=12.0 * heads * head_dim * config.num_hidden_layers,
        per_response_token=6.0 * config.vocab_size * config.hidden_size,
    )


@torch.no_grad()
def self_check(
    policy: Policy, examples: Sequence[Example], layout: Layout, context: Callable[[], Any], dtype: torch.dtype
) -> float:
    """The mean difference between log-probs of packed responses and those that the model itself gives each alone.

    Raises UserError where it is more than rounding. Not every family separates responses by what `segments` says:
    models that take positions or a bias from the mask run over the border; and a head that does something
    to its logits that `head_of` does not know shows here as well. Every rank must call it.
    """
    device = next(policy.parameters()).device
    with context():
        *_, packed_N, _ = policy(collate(examples, layout).to(device), no_losses)
        alone = [
            policy(collate([one], "padded").to(device), no_losses, own_logits=True)[2]
            for example in examples
            for one in singles(example)
        ]
    alone_N = torch.cat(alone)
    if not alone_N.isfinite().all():
        raise UserError("the starting model gives log-probs that are not finite: its weights are damaged")
    gap = float((packed_N - alone_N).abs().mean())
    if not gap <= SELF_CHECK_TOLERANCE[dtype]:
        raise UserError(
            f"{type(policy.model).__name__}: log-probs of packed responses differ from those of each alone by {gap:.3g}"
            " nats a token; set batch.layout=padded"
        )
    return gap


def trained_state(policy: Policy) -> dict[str, torch.Tensor]:
    """The trained parameters, whole, on the CPU, by their names in the model. Every rank must call it."""
    reshard(policy)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = whole.detach().cpu()
    return found


def with_weights(config: TrainConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Any, Any | None]:
    """The base model, loaded anew on the CPU, with `trained_state` in it; and peft's wrapper of it, with lora."""
    model = load_model(config.model, dtype, torch.device("cpu"))
    adapter = None if config.lora is None else add_adapter(model, config.lora, config.seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    return model, adapter


def export(state: dict[str, torch.Tensor], config: TrainConfig, tokenizer: Tokenizer, target: Path) -> None:
    """Write a folder that `from_pretrained` loads, in the base model's own width; there whole or not at all.

    With adapters it holds the merged model; the adapter alone is in `adapter` beside it.
    """
    model, adapter = with_weights(config, state, AutoConfig.from_pretrained(config.model).dtype or torch.float32)
    staged = target.with_name(f".{target.name}.staged")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        if adapter is not None:
            adapter.save_pretrained(target.with_name("adapter"))
            model = adapter.merge_and_unload()
        model.save_pretrained(staged)
        _save_tokenizer(tokenizer, staged)
        for path in staged.iterdir():  # durable before its name says that the run is finished
            fsync_file(path)
        fsync_folder(staged)
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        fsync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target}: cannot be written, and the last checkpoint is whole: mend that, and the same command goes on "
            f"from it ({first_line(error)})"
        ) from None


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        tokenizer.backend.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # how the tokenizers library says that a file cannot be written
        raise OSError(first_line(error)) from None
