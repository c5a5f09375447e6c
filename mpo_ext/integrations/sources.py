"""The tested versions of other trainers, and hashes of the functions that mpo_ext replaces or calls.

A hash is the first 16 hexadecimal digits of the SHA-256 of the source that ``inspect.getsource`` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class KnownSources(NamedTuple):
    """The tested versions of a package and the hashes of its functions.

    Attributes:
        package: Name of the distribution.
        module: Module of ``mpo_ext.integrations`` that uses the package.
        versions: Dict from a tested minor version, such as "1.16", to the hashes of this version. The hashes are a
            dict such as ``{"module:Class.method": "5e58a1699e0d76cd"}``. Its keys may also be "module:function" or
            "module:Class".
    """

    package: str
    module: str
    versions: Mapping[str, Mapping[str, str]]


def _methods(owner: str, **hashes: str) -> dict[str, str]:
    return {f"{owner}.{name}": value for name, value in hashes.items()}


#: Digests of DPOTrainer's methods _compute_loss, compute_ref_log_probs and _precompute_ref_logps, by version of TRL.
_TRL_DIGESTS = {
    "0.29": ("24593b630a1b08cd", "cfec9f76537446de", "de45080643403437"),
    "1.0": ("5ee5385c3af48a7d", "37eec8ae841baa33", "de45080643403437"),
    "1.1": ("605d10adbf1dac85", "8eac3c7b74a938f5", "de45080643403437"),
    "1.2": ("605d10adbf1dac85", "6c73c56ee9ed43e7", "de45080643403437"),
    "1.3": ("151685605b018465", "6c73c56ee9ed43e7", "de45080643403437"),
    "1.4": ("60580c2af1653790", "6c73c56ee9ed43e7", "de45080643403437"),
    "1.5": ("60580c2af1653790", "6c73c56ee9ed43e7", "de45080643403437"),
    "1.9": ("6a433f54b1ffecb9", "a251e32eb2bcb4f8", "7f9e173f104d4cab"),
    "1.10": ("36174ff2b52233aa", "a251e32eb2bcb4f8", "b2175b938afcaa4a"),
    "1.11": ("36174ff2b52233aa", "a251e32eb2bcb4f8", "b2175b938afcaa4a"),
    "1.12": ("36174ff2b52233aa", "a251e32eb2bcb4f8", "b2175b938afcaa4a"),
    "1.13": ("299a8fa4943459ef", "a251e32eb2bcb4f8", "b2175b938afcaa4a"),
    "1.14": ("6be3a70c5a4b126e", "d643beaac47db303", "f2c098c7da6ca701"),
    "1.15": ("5e58a1699e0d76cd", "90611af9cbadb8ec", "f2c098c7da6ca701"),
    "1.16": ("5e58a1699e0d76cd", "90611af9cbadb8ec", "f2c098c7da6ca701"),
}
_TRL = {
    version: _methods(
        "trl.trainer.dpo_trainer:DPOTrainer",
        _compute_loss=loss,
        compute_ref_log_probs=reference,
        _precompute_ref_logps=precompute,
    )
    for version, (loss, reference, precompute) in _TRL_DIGESTS.items()
}
_AXOLOTL = {"axolotl.core.trainers.dpo.trainer:AxolotlDPOTrainer": "f75fa969844acca6"}
_LLAMA_FACTORY = _methods(
    "llamafactory.train.dpo.trainer:CustomDPOTrainer",
    get_batch_loss_metrics="bc6da1ac2acdb40a",
    compute_reference_log_probs="23f066dddd125afd",
    compute_preference_loss="cb1b42bd9100b74e",
    concatenated_forward="01052d609c8d238c",
    bco_loss="ae311d85f60042ca",
)
_MS_SWIFT = _methods(
    "swift.rlhf_trainers.dpo_trainer:DPOTrainer",
    get_batch_loss_metrics="e7a23b99175f80a9",
    compute_ref_log_probs="2f67b12779beed76",
    dpo_loss="1aaa4687df01d236",
    concatenated_forward="c2a0011554fcb631",
)

KNOWN: Mapping[str, KnownSources] = {
    "trl": KnownSources("trl", "trl", _TRL),
    "axolotl": KnownSources("axolotl", "axolotl", {"0.19": _AXOLOTL}),
    "llama-factory": KnownSources("llamafactory", "llama_factory", {"0.9": _LLAMA_FACTORY}),
    "ms-swift": KnownSources("ms-swift", "ms_swift", {"4.6": _MS_SWIFT}),
    "openrlhf": KnownSources(
        "openrlhf", "openrlhf", {"0.11": {"openrlhf.models.utils:log_probs_from_logits": "92a21e3351d3ab12"}}
    ),
    "verl": KnownSources(
        "verl", "verl", {"0.9": {"verl.utils.torch_functional:logprobs_from_logits": "dffd21fe40eb806b"}}
    ),
    "unsloth": KnownSources(
        "unsloth", "unsloth", {"2026.10": {"unsloth.models.rl:selective_log_softmax": "73c9d10f8c306e18"}}
    ),
}
