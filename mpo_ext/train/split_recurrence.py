"""Runs recurrent and convolutional layers on sequence rows ``[prompt | response | response ...]``.

A layer runs over the prompt first and keeps its final states: the recurrent state and the last inputs of the
convolution. Each response then starts from the states of its prompt. Gradients flow through the states.

The supported layers are Gated DeltaNet, Mamba 2 and short convolutions. They read and write states by the methods of
transformers' ``Cache``. The keyword argument ``row_segments`` describes the prompts and responses of each row. Without
this argument, the layers run as in transformers.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mpo_ext.train.split_attention import RowSegments, is_marker

#: The responses of a call are padded to the longest. A response shorter than this fraction of it goes to another call.
SHORTEST = 0.75

#: Minimum number of tokens of a call with initial states: for a single token, a layer overwrites the given state.
MIN_TOKENS = 2

_CHECKED_TOKENS = 24, 16  # numbers of tokens of the sequence in ``_check`` and of its prompt


class _States:
    """Convolution and recurrent states of one layer for B sequences.

    This object takes the place of transformers' ``Cache`` in the layers. The states keep their autograd graph. Each
    attribute is a dict from ``state_idx`` to a tensor, because a layer may have several states.

    Attributes:
        conv: Last inputs of a convolution with C channels and K taps, ``[B, C, K - 1]``.
        recurrent: State of a recurrence, ``[B, ...]``.
    """

    def __init__(self) -> None:
        self.conv: dict[int, Tensor] = {}
        self.recurrent: dict[int, Tensor] = {}

    @staticmethod
    def join(states: Sequence[tuple["_States", int]]) -> "_States":
        """Combines the states of several sequences into one batch.

        For each sequence, ``states`` has a tuple: the states of a batch, and the index of the sequence in this batch.
        """
        joined = _States()
        first = states[0][0]
        joined.conv = {i: torch.cat([s.conv[i][row, None] for s, row in states]) for i in first.conv}
        joined.recurrent = {i: torch.cat([s.recurrent[i][row, None] for s, row in states]) for i in first.recurrent}
        return joined

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent.get(state_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # the layer then changes no state in place

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> Tensor:
        """Appends ``inputs`` ``[B, C, n]`` to the stored inputs of the convolution, and returns the result.

        The last ``conv_kernel_size - 1`` inputs are stored for the next call.
        """
        if state_idx in self.conv:
            inputs = torch.cat([self.conv[state_idx].to(inputs.dtype), inputs], -1)
        surplus = inputs.shape[-1] - (conv_kernel_size - 1)
        self.conv[state_idx] = inputs[..., max(surplus, 0) :] if surplus >= 0 else F.pad(inputs, (-surplus, 0))
        return inputs

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.recurrent[state_idx] = state
        return state


class _Piece(NamedTuple):
    """Consecutive tokens of a row that a layer processes as one sequence, or the padding of the row.

    Attributes:
        size: Number of tokens.
        prompt: Index of the piece whose final states are the initial states of this piece; None: no initial states.
        keeps_states: Whether other pieces start from the final states of this piece.
        is_padding: Whether the layer skips these tokens.
    """

    size: int
    prompt: int | None = None
    keeps_states: bool = False
    is_padding: bool = False


def _pieces(segments: RowSegments) -> list[_Piece]:
    """Divides the rows into pieces. A layer processes each piece as one sequence.

    A prompt with a single response is one piece together with the response. Otherwise, the prompt and each response
    are separate pieces.
    """
    parts = segments.parts
    lengths = {part.prompt: part.prompt_length for part in parts if part.prompt is not None and part.prompt_length}
    pieces: list[_Piece] = []
    places: dict[int | None, int] = {}
    for number, part in enumerate(parts):
        rest, start = part.size, places.get(part.prompt)
        if number in lengths:
            places[number] = start = len(pieces)
            pieces.append(_Piece(lengths[number], keeps_states=True))
            rest -= lengths[number]
        if rest:
            pieces.append(_Piece(rest, start, is_padding=part.is_padding))
    return pieces


def _groups(sizes: dict[int, int], shortest: float) -> Iterator[list[int]]:
    """Divides the keys of ``sizes`` into groups, so that the sizes in a group are similar.

    In each group, the smallest size is at least ``shortest`` times the largest size.
    """
    group: list[int] = []
    for number in sorted(sizes, key=lambda number: -sizes[number]):
        if group and sizes[number] < shortest * sizes[group[0]]:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


class _SplitForward:
    """Replaces ``layer.forward``, so that the layer also supports rows with several responses.

    ``cache_name`` is the argument of ``layer.forward`` that takes the states, such as "cache_params".
    """

    def __init__(self, layer: nn.Module, cache_name: str) -> None:
        self._layer = layer
        self._forward: Callable[..., Tensor] = layer.forward
        self._cache_name = cache_name
        self._is_checked = False
        #: The instance attribute ``forward`` that the layer had before, or None.
        self.before: Any = vars(layer).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the layer's output, ``[R, L, D]`` for hidden states ``[R, L, D]``.

        With the keyword argument ``row_segments``, the layer computes each prompt once. The responses continue from
        the states at the end of their prompt. The output for padding is 0. Without ``row_segments``, the layer runs as
        in transformers.

        Raises:
            RuntimeError: If the layer ignores the states of a prompt. Also raised if the mask is a marker (see
                ``window_marker``), but ``row_segments`` is missing.
            ValueError: If a call with ``row_segments`` also passes a cache, a second positional argument or another
                tensor.
        """
        segments, mask = kwargs.pop("row_segments", None), kwargs.get("attention_mask")
        kind = type(self._layer).__name__
        if segments is None:
            if is_marker(mask):
                raise RuntimeError(f"the model must pass row_segments on to {kind}, got none")
            return self._forward(*args, **kwargs)
        hidden = kwargs.pop("hidden_states") if not args else args[0]
        others = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and not is_marker(value)}
        if len(args) > 1 or others or kwargs.pop(self._cache_name, None) is not None:
            names = ", ".join(others) or self._cache_name
            raise ValueError(f"{kind} must get hidden_states alone in rows with several responses, got {names}")
        options = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        pieces = _pieces(segments)
        if any(piece.keeps_states for piece in pieces):
            self._check(hidden, options)
        rows, length, _ = hidden.shape
        return self._run(hidden.flatten(0, 1), pieces, options).unflatten(0, (rows, length))

    def _run(self, tokens: Tensor, pieces: Sequence[_Piece], options: dict[str, Any]) -> Tensor:
        """Runs the layer on all pieces of the hidden states ``tokens`` ``[N, D]``. Returns the outputs ``[N, D]``."""
        inputs = tokens.split([piece.size for piece in pieces])
        outputs: dict[int, Tensor] = {}
        finals: dict[int, tuple[_States, int]] = {}
        prompts = {i: piece.size for i, piece in enumerate(pieces) if piece.keeps_states}
        for group in _groups(prompts, 1.0):  # groups of equal length, because padding would change the final states
            states = _States()
            outputs |= self._call(group, inputs, states, options)
            finals |= {number: (states, row) for row, number in enumerate(group)}
        others = {i: piece.size for i, piece in enumerate(pieces) if not (piece.keeps_states or piece.is_padding)}
        for group in _groups({i: size for i, size in others.items() if pieces[i].prompt is None}, SHORTEST):
            outputs |= self._call(group, inputs, None, options)
        for group in _groups({i: size for i, size in others.items() if pieces[i].prompt is not None}, SHORTEST):
            initial = _States.join([finals[pieces[number].prompt] for number in group])  # type: ignore[index]
            outputs |= self._call(group, inputs, initial, options)
        example = next(iter(outputs.values()), tokens)
        return torch.cat([
            outputs[i] if i in outputs else example.new_zeros(piece.size, example.shape[1])
            for i, piece in enumerate(pieces)
        ])  # fmt: skip

    def _call(
        self, group: Sequence[int], inputs: Sequence[Tensor], states: _States | None, options: dict[str, Any]
    ) -> dict[int, Tensor]:
        """Runs the layer on several pieces as one batch, padded on the right.

        ``group`` has the indices of the pieces in ``inputs``. ``states`` has the initial states or is None. The layer
        overwrites the initial states with the final states. Returns a dict from the index of a piece to its output.
        """
        pieces = [inputs[number] for number in group]
        batch = pieces[0].unsqueeze(0) if len(pieces) == 1 else pad_sequence(pieces, batch_first=True)
        if states is not None and (states.conv or states.recurrent):
            batch = F.pad(batch, (0, 0, 0, max(0, MIN_TOKENS - batch.shape[1])))
        out = self._forward(batch, **{self._cache_name: states}, **options)
        return {number: out[row, : len(inputs[number])] for row, number in enumerate(group)}

    def _check(self, hidden: Tensor, options: dict[str, Any]) -> None:
        """Raises ``RuntimeError`` if the layer does not continue correctly from the states of a prompt.

        Some kernels ignore the initial state, or the gradient of the final state. The check therefore runs the layer
        three times on random tokens, which are divided into a prompt and a response:

        1. The prompt and the response are one sequence. The results of this run are the truth.
        2. The response starts from the states of the prompt.
        3. The response starts without states.

        The error of run 2 must be at most a quarter of the error of run 3, or within the rounding errors.
        """
        if self._is_checked or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return
        length, prompt = _CHECKED_TOKENS
        noise = torch.randn(2, length, hidden.shape[2], generator=torch.Generator().manual_seed(0))
        tokens, direction = noise.to(hidden.device, hidden.dtype)
        whole, parts = [_Piece(length)], [_Piece(prompt, keeps_states=True), _Piece(length - prompt, 0)]
        apart = [_Piece(prompt), _Piece(length - prompt)]
        # Gradient checkpointing counts the tensors that a forward saves. The hooks hide the tensors of this check.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            results = []
            for pieces in (whole, parts, apart):
                sequence = tokens.clone().requires_grad_()
                out = self._run(sequence, pieces, options)[prompt:]
                (grad,) = torch.autograd.grad((out * direction[prompt:]).sum(), sequence)
                results.append((out.detach().double(), grad.double()))
        device = hidden.device.type
        dtypes = [hidden.dtype]
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        if hidden.is_cuda:
            dtypes.append(torch.float16)  # TF32 has the mantissa of float16
        # Recurrences compute in float32 whatever the dtype of the model.
        rounding = max(64 * torch.finfo(torch.float32).eps, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
        half = (length - prompt) // 2
        # The states of a convolution affect only the first outputs, those of a recurrence all outputs. Gradients are
        # compared before the end of the prompt, where only a recurrence affects them.
        for name, index, places in (
            ("outputs", 0, slice(half)),
            ("outputs", 0, slice(half, None)),
            ("gradients", 1, slice(prompt - half)),
        ):
            truth, ours, without = (result[index] for result in results)
            error, effect = ((other - truth)[places].norm() for other in (ours, without))
            if not error <= max(effect / 4, rounding * truth.norm()):
                raise RuntimeError(
                    f"{type(self._layer).__name__} must continue from the states of a prompt, got {name} that differ "
                    f"by {error.item():.2g} from those of one sequence; without states they differ by "
                    f"{effect.item():.2g}"
                )
        self._is_checked = True


@functools.cache
def _cache_name(kind: type[nn.Module]) -> str | None:
    """Returns the name of the argument with the states of a layer, such as "cache_params".

    Returns None if layers of this class have no states.

    Raises:
        ValueError: If the class does not take its states from a ``Cache``, or its recurrence takes no initial state.
    """
    try:
        code, names = inspect.getsource(kind.forward), inspect.signature(kind.forward).parameters
    except (OSError, TypeError, ValueError):
        return None
    has_recurrence = ".get_recurrent_state(" in code
    if not has_recurrence and ".get_conv_state(" not in code:
        return None
    name = next((name for name in ("cache", "cache_params", "past_key_values") if name in names), None)
    if name is None or "hidden_states" not in names:
        raise ValueError(f"{kind.__name__} takes its states in another way than from transformers' Cache")
    if has_recurrence and "initial_state" not in code:
        raise ValueError(f"the recurrence of {kind.__name__} takes no initial state")
    return name


def split_layers(decoder: nn.Module) -> str | None:
    """Makes the recurrent and convolutional layers of a decoder support rows with several responses.

    Each such layer gets an instance attribute ``forward``, which is not saved with the model.

    Returns:
        None if all such layers are supported. Otherwise, the reason why a layer is not supported; all layers are then
        unchanged.
    """
    try:
        names = [(layer, _cache_name(type(layer))) for layer in decoder.modules()]  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    for layer, name in names:
        if name is not None and not isinstance(layer.forward, _SplitForward):
            layer.forward = _SplitForward(layer, name)  # type: ignore[assignment]
    return None


def join_layers(decoder: nn.Module) -> None:
    """Undoes ``split_layers``; does nothing for an unchanged decoder."""
    for layer in decoder.modules():
        forward = vars(layer).get("forward")
        if isinstance(forward, _SplitForward):
            del layer.forward
            if forward.before is not None:
                layer.forward = forward.before


def has_split_layers(decoder: nn.Module) -> bool:
    """Returns whether ``split_layers`` has changed a layer of the decoder."""
    return any(isinstance(vars(layer).get("forward"), _SplitForward) for layer in decoder.modules())
