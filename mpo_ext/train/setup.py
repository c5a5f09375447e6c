"""Builds the parts of a run from its recipe: accelerator, policy, reference model, data and optimizer."""

import dataclasses
import datetime
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mpo_ext.chat.encoder import ChatEncoder, embedding_rows_of, stop_ids_of
from mpo_ext.chat.template import special_ids
from mpo_ext.checks import check_model_path, environment_integer
from mpo_ext.images import set_max_pixels
from mpo_ext.loss.hf_head import unwrap_model
from mpo_ext.loss.weights import fingerprint
from mpo_ext.processors import check_model, check_supported
from mpo_ext.train.dataset import Collator, RunData, without_responses
from mpo_ext.train.encode import Encoder, Sample
from mpo_ext.train.export import check_mergeable
from mpo_ext.train.masks import prompt_positions
from mpo_ext.train.model import has_vision, load_model, prepare_model, reference_recipe
from mpo_ext.train.optimizer import ParameterGroup, make_optimizer, parameter_groups
from mpo_ext.train.ranks import gather, join_cpu_ranks
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.reference_file import reference_path
from mpo_ext.train.reference_model import check_can_follow
from mpo_ext.train.shared_prefix import SharedLayout, check_shared_prefix, shared_layouts
from mpo_ext.train.trackers import check_trackers
from mpo_ext.train.zero import check_zero_stage, copy_model, is_deepspeed, is_partitioned, prepare_frozen, set_sizes
from mpo_ext.videos import set_video_defaults

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_NEEDED_ACCELERATE = {
    "FSDP2": ("1.14.0", "free the weight of the output head before the loss"),
    "DeepSpeed": ("1.8.0", "step the optimizer after each micro-batch"),
}
_CHECKED_SAMPLES = 2
_SEARCHED_PAIRS = 1000
_ROW_FOR_EACH_PROMPT = "one row for each prompt with its responses"
_LAYOUTS: dict[SharedLayout, str] = {
    "packed": "one row without padding for all pairs of a micro-batch",
    "shared": _ROW_FOR_EACH_PROMPT,
    "masked": _ROW_FOR_EACH_PROMPT,
}
#: Text before the reasons why the layouts that were tried before this layout were rejected.
_FALLBACKS: dict[SharedLayout, str] = {"shared": "not packed", "masked": "with a dense attention mask"}


class RunSetup(NamedTuple):
    """The parts of a run. The models and the optimizer are prepared by accelerate.

    Attributes:
        groups: Parameter groups of the optimizer.
        reference_model: Separate reference model, or None.
        reference_fingerprint: Hash of the reference weights. If the reference log-probs are not precomputed, the hash
            may be "".
        fixed_weights: Hashes of the models whose weights no checkpoint stores. A key is the setting that names the
            model, such as ``model.path``. On ranks other than the main rank, the dict may be empty.
    """

    model: nn.Module
    processor: Any
    optimizer: Any
    groups: list[ParameterGroup]
    data: RunData
    reference_model: nn.Module | None
    reference_fingerprint: str
    fixed_weights: dict[str, str]


def make_accelerator(recipe: Recipe) -> Any:
    """Seeds all random generators and returns accelerate's ``Accelerator`` for the recipe.

    Raises:
        ValueError: If accelerate does not find all processes that the launcher started, a tracker is unknown, or
            DeepSpeed runs without ZeRO.
        ImportError: If accelerate is too old for FSDP2 or DeepSpeed, or the package of a tracker is not installed.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin, set_seed

    launched = environment_integer("WORLD_SIZE", 1)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment_integer(name, 0)
    check_trackers(recipe.output.trackers)
    join_cpu_ranks()
    accelerator = Accelerator(
        mixed_precision=_PRECISIONS[recipe.precision],
        # The losses of the micro-batches already add up to that of the step. The default may come from a config file.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # A forward without images leaves the parameters of the vision tower unused.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=list(recipe.output.trackers) or None,
        project_dir=str(Path(recipe.output.dir)),
    )
    if launched != accelerator.num_processes:
        raise ValueError(
            f"processes must be the {launched} that the launcher started, got {accelerator.num_processes} in "
            "accelerate: each process would train on all pairs in the same folder; without GPUs, set "
            "ACCELERATE_USE_CPU=true"
        )
    _check_accelerate(accelerator)
    check_zero_stage(accelerator)
    set_seed(recipe.optim.seed)
    return accelerator


def _check_accelerate(accelerator: Any) -> None:
    from accelerate.utils import compare_versions

    kind = "DeepSpeed" if is_deepspeed(accelerator) else "FSDP2" if getattr(accelerator, "is_fsdp2", False) else None
    if kind is None:
        return
    minimum, fault = _NEEDED_ACCELERATE[kind]
    if compare_versions("accelerate", "<", minimum):
        raise ImportError(
            f"accelerate must be at least {minimum} for {kind}, got {version('accelerate')}: earlier versions "
            f"{fault}; pip install -U accelerate"
        )


def set_up(
    recipe: Recipe, accelerator: Any, model: nn.Module | None, processor: Any, *, date: datetime.date
) -> RunSetup:
    """Loads the models, opens the data, makes the optimizer, and prepares models and optimizer with accelerate.

    If ``model`` is None, the model and the processor are loaded from ``recipe.model.path``. ``date`` is the date that
    the chat template may print in prompts.
    """
    if recipe.data.max_image_pixels is not None:
        set_max_pixels(recipe.data.max_image_pixels)
    set_video_defaults(recipe.data.video_fps, recipe.data.video_max_frames)
    if recipe.reference.path is not None:
        check_model_path("reference.path", recipe.reference.path, recipe.reference.revision)
        check_model(recipe.reference.path, **recipe.reference_hub_options)
    if model is None:
        model, processor = load_model(recipe.model)
    else:
        check_supported(unwrap_model(model).config, processor)
        model = prepare_model(model, recipe.model)
    data = _make_data(recipe, accelerator, model, processor, date)
    # The reference may copy the policy, so it is made before the policy is wrapped or moved.
    reference_model, reference_fingerprint = _make_reference_model(recipe, model, data.encoder.chat)
    if recipe.reference.sync_every and reference_model is not None:
        _check_can_move(recipe, accelerator, model, reference_model)
    # ZeRO-3 gathers the weights on all ranks.
    takes_part = accelerator.is_main_process or is_partitioned(model)
    fixed_weights = _fixed_weights(recipe, model, reference_model) if takes_part else {}
    groups = parameter_groups(model, recipe.optim)
    optimizer: Any = make_optimizer(groups, recipe.optim, model, accelerator)
    set_sizes(recipe, accelerator)
    _choose_wrapped_layers(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if recipe.output.save_merged:  # fail now, not after training
        check_mergeable(model)
    if reference_model is not None:
        reference_model = _prepare_reference_model(accelerator, reference_model)
    return RunSetup(model, processor, optimizer, groups, data, reference_model, reference_fingerprint, fixed_weights)


def _make_data(recipe: Recipe, accelerator: Any, model: nn.Module, processor: Any, date: datetime.date) -> RunData:
    tokenizer = getattr(processor, "tokenizer", processor)
    inner = unwrap_model(model)
    encoder = make_encoder(
        recipe,
        processor,
        inner.config,
        date=date,
        stop_ids=stop_ids_of(inner),
        embedding_rows=embedding_rows_of(inner),
    )
    _add_stop_id(inner, encoder.end_id)
    pad_id = tokenizer.pad_token_id
    collator = Collator(
        "shared",
        pad_id=pad_id if pad_id is not None else encoder.end_id,
        with_rejected=recipe.loss.has_preference,
        positions=prompt_positions(model),
    )
    return RunData(recipe, accelerator, encoder, collator)


def make_encoder(recipe: Recipe, processor: Any, config: Any, **options: Any) -> Encoder:
    """Returns the encoder of a run.

    Args:
        recipe: Recipe of the run.
        processor: Processor of the model, or tokenizer of a text model.
        config: Config of the model.
        **options: Arguments of ``Encoder``: ``date``, ``stop_ids`` and ``embedding_rows``.
    """
    return Encoder(
        processor,
        max_length=recipe.data.max_length,
        too_long=recipe.data.too_long,
        image_token_id=getattr(config, "image_token_id", None),
        chat_template=recipe.model.chat_template,
        chat_template_kwargs=recipe.model.chat_template_kwargs,
        **options,
    )


def _add_stop_id(model: Any, end_id: int) -> None:
    """Adds ``end_id``, the token that ends a turn, to the stop tokens in the model's ``generation_config``."""
    stop_ids = stop_ids_of(model)
    if getattr(model, "generation_config", None) is not None and end_id not in stop_ids:
        model.generation_config.eos_token_id = [*stop_ids, end_id] if stop_ids else end_id


def check_reference_tokens(path: str, chat: ChatEncoder, processor: Any, embedding_rows: int | None) -> None:
    """Checks that the reference model at ``path`` reads the token ids of the policy as the policy does.

    A special token of the policy may have another name in the reference, such as that of a reserved token.

    Args:
        path: ``reference.path``, for the message.
        chat: Encoder of the policy.
        processor: Processor or tokenizer of the reference model.
        embedding_rows: Number of rows of the reference's input embedding; None: unknown.

    Raises:
        ValueError: If a token of the policy has another id in the reference, or its id has no embedding row there.
    """
    policy_ids, ids = (getattr(one, "tokenizer", one).get_vocab() for one in (chat.tokenizer, processor))
    special, known = special_ids(chat.tokenizer), set(ids.values())
    different = [
        token
        for token, index in policy_ids.items()
        if ids.get(token, index) != index or (token not in ids and index in known and index not in special)
    ]
    if different:
        token = min(different, key=policy_ids.__getitem__)
        raise ValueError(
            f"reference.path must be a model with the token ids of model.path, got {path}, in which "
            f"{len(different):,} of {len(policy_ids):,} tokens have another id, such as {token!r}: "
            f"{ids.get(token, 'none')} instead of {policy_ids[token]}"
        )
    largest = max(policy_ids.values(), default=0)
    if chat.embedding_rows is not None:
        largest = min(largest, chat.embedding_rows - 1)
    if embedding_rows is not None and embedding_rows <= largest:
        raise ValueError(
            f"reference.path must be a model with an embedding row for each token id of model.path, got {path} with "
            f"{embedding_rows:,} rows for ids up to {largest:,}"
        )


def _make_reference_model(recipe: Recipe, policy: nn.Module, chat: ChatEncoder) -> tuple[nn.Module | None, str]:
    """Returns ``(model, fingerprint)``: the separate reference model, and a hash of the reference weights.

    ``model`` is None if the run needs no separate model. ``fingerprint`` may be "" if the reference log-probs are not
    precomputed. ``chat`` is the encoder of the policy.

    Raises the errors of ``check_reference_tokens``.
    """
    kind, path = recipe.reference_kind, recipe.reference.path
    digest = fingerprint(policy) if kind == "precomputed" else ""
    model: nn.Module | None = None
    if path is not None and kind in ("copy", "precomputed"):
        model, processor = load_model(reference_recipe(recipe))
        check_reference_tokens(path, chat, processor, embedding_rows_of(unwrap_model(model)))
        digest = fingerprint(model)
    elif kind == "copy":
        model = copy_model(policy)
    if kind == "precomputed" and reference_path(recipe).exists():
        model = None
    return model, digest


def _fixed_weights(recipe: Recipe, policy: nn.Module, reference: nn.Module | None) -> dict[str, str]:
    """Returns hashes of the weights that no checkpoint stores. A resuming run must load the same weights again.

    A key is the setting that names the model, such as ``model.path``. No checkpoint stores the frozen parameters of a
    policy, or a reference model without updates. For quantized models, the dict is empty.
    """
    if recipe.model.lora is not None and recipe.model.lora.quantization is not None:
        return {}
    is_copied = recipe.reference_kind == "copy" and not recipe.reference.sync_every
    has_frozen = not all(parameter.requires_grad for parameter in policy.parameters())
    fixed = {}
    if has_frozen or (is_copied and recipe.reference.path is None):
        fixed["model.path"] = fingerprint(policy)
    if is_copied and recipe.reference.path is not None and reference is not None:
        fixed["reference.path"] = fingerprint(reference)
    return fixed


def _check_can_move(recipe: Recipe, accelerator: Any, policy: nn.Module, reference: nn.Module) -> None:
    """Raises ``ValueError`` if the reference model cannot be updated towards the policy or stored in a checkpoint."""
    every = recipe.reference.sync_every
    sharding = accelerator.distributed_type.value
    if sharding == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        sharding = "FSDP of fsdp_version 1"
    if sharding in ("DEEPSPEED", "MEGATRON_LM", "FSDP of fsdp_version 1"):
        raise ValueError(
            f"reference.sync_every must be 0 under {sharding}, got {every}: "
            "its shards of policy and reference cannot be mixed here or stored in a checkpoint; FSDP2 and DDP can"
        )
    check_can_follow(reference, policy, every)


def _choose_wrapped_layers(accelerator: Any, model: nn.Module) -> None:
    """Sets the layer classes that FSDP wraps. Classes in accelerate's config file take precedence.

    The default is all classes in ``_no_split_modules`` that the model contains. LLaVA and Gemma 3 also list classes
    that the model does not contain. accelerate would raise an error for such classes.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap:
        return
    classes = {type(module).__name__ for module in model.modules()}
    names = getattr(unwrap_model(model), "_no_split_modules", None) or ()
    plugin.transformer_cls_names_to_wrap = sorted(classes.intersection(names)) or None


def _prepare_reference_model(accelerator: Any, model: nn.Module) -> nn.Module:
    """Moves the reference model to the policy's device and shards it like the policy."""
    model.eval().requires_grad_(False)
    if is_deepspeed(accelerator):
        return prepare_frozen(accelerator, model)
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    return accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)


def choose_layout(model: nn.Module, data: RunData, reference_model: nn.Module | None = None) -> str | None:
    """Chooses the arrangement of pairs in sequence rows (``Batch.layout``), and sets it in ``data``.

    Layouts with a shared prompt are tried before separate rows. Such a layout must fulfil three conditions:

    - The recipe allows the layout.
    - The model supports the layout. If ``reference.path`` is set, the reference model also supports it.
    - The first pairs have the same log-probs as in separate rows.

    The function also sets the sample for dummy batches and the argument ``blank`` of ``collate``.

    Returns:
        A line for the console, or None if no usable pair was found.
    """
    recipe, accelerator = data.recipe, data.accelerator
    samples, with_images = _find_samples(data, search_images=has_vision(model))
    if not samples:
        return None
    if with_images is not None:
        if with_images not in samples:
            samples[-1] = with_images
        if accelerator.num_processes > 1:  # all ranks must run the same parts of the model
            data.collator = dataclasses.replace(data.collator, blank=without_responses(with_images))
    data.set_dummy(samples[0])
    models = [model]
    if recipe.reference.path is not None and reference_model is not None:
        models.append(reference_model)
    reasons: list[str] = []
    for layout in shared_layouts(models, recipe.loss.shared_prefix, reasons):
        reason = _check_layout(models, samples, data, layout)
        if reason is None:
            data.collator = dataclasses.replace(data.collator, layout=layout)
            why = f", {_FALLBACKS[layout]}: {'; '.join(dict.fromkeys(reasons))}" if reasons else ""
            return f"{_LAYOUTS[layout]} (shared prefix), checked on the first pairs{why}"
        reasons.append(reason)
    data.collator = dataclasses.replace(data.collator, layout="separate")
    return f"separate rows for chosen and rejected responses: {'; '.join(dict.fromkeys(reasons))}"


def _check_layout(
    models: Sequence[nn.Module], samples: Sequence[Sample], data: RunData, layout: SharedLayout
) -> str | None:
    """Returns the reason why a model cannot use a layout of sequence rows; None if all models on all ranks can use it.

    All ranks must call this function.
    """
    pad_id, positions, device = data.collator.pad_id, data.collator.positions, data.accelerator.device
    for model in models:
        with data.accelerator.autocast():
            reason = check_shared_prefix(
                model, samples, pad_id=pad_id, positions=positions, device=device, layout=layout,
                from_logits=data.recipe.loss.from_logits,
            )  # fmt: skip
        reason = next((text for text in gather(data.accelerator, reason) if text is not None), None)
        if reason is not None:
            return reason
    return None


def _find_samples(data: RunData, *, search_images: bool) -> tuple[list[Sample], Sample | None]:
    """Returns the first two samples of the run, and the first sample with images.

    At most 1000 pairs are read. Without a sample with images, the second result is None. If ``search_images`` is
    False, the search ends after two samples.
    """
    steps = data.steps()
    samples: list[Sample] = []
    with_images: Sample | None = None
    for index in data.sampler.order(0)[:_SEARCHED_PAIRS]:
        result = steps.encode(int(index))
        if not isinstance(result, Sample):
            continue
        if len(samples) < _CHECKED_SAMPLES:
            samples.append(result)
        if result.image_inputs and with_images is None:
            with_images = result
        if len(samples) == _CHECKED_SAMPLES and (with_images is not None or not search_images):
            break
    return samples, with_images
