"""The upload of the final model to the Hugging Face hub (``output.push_to_hub``)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_ext.train.output_recipe import HubRecipe
from mpo_ext.train.ranks import gather

# Files of an earlier model that would change how the new model loads. Other files of the repository stay. In these
# patterns, * also stands for /, so none may begin with it: the repository may have other models in folders.
_MODEL_FILES = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*", "adapter_*",
    "merged/*", "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template*", "additional_chat_templates/*", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt",
)  # fmt: skip


class HubUpload:
    """Uploads the folder of the final model to a repository of the Hugging Face hub, from the main process.

    All ranks must call each method. If a method fails, all ranks raise the error.
    """

    def __init__(self, recipe: HubRecipe, accelerator: Any) -> None:
        self._recipe, self._accelerator = recipe, accelerator
        self._name = recipe.repo_id

    def prepare(self) -> None:
        """Checks the token and creates the repository. A call before training reveals errors early.

        Raises:
            ValueError: If HF_HUB_OFFLINE is set, there is no token, or the name is invalid. Also if the repository is
                public although ``push_to_hub.private`` is True, or the hub rejects the token or cannot be reached.
        """
        if text := self._on_main(self._prepare):
            raise ValueError(text)

    def push(self, folder: Path) -> str:
        """Uploads a folder and returns the URL of the commit. Files that the repository already has are not sent.

        The commit deletes the files of an earlier model that the folder lacks, such as its adapters.

        Raises:
            RuntimeError: If the upload fails.
        """
        urls: list[str] = []

        def upload() -> str | None:
            from huggingface_hub import HfApi

            try:
                commit = HfApi().upload_folder(
                    repo_id=self._name,
                    folder_path=folder,
                    commit_message="Model trained with mpo_ext",
                    delete_patterns=list(_MODEL_FILES),
                )
            except Exception as error:  # the clients of the hub raise errors of several libraries
                return (
                    f"output.push_to_hub: the upload of {folder} failed: {_describe(error)}; the model is complete "
                    "there, and the same command uploads it again"
                )
            urls.append(str(getattr(commit, "commit_url", commit)))
            return None

        if text := self._on_main(upload):
            raise RuntimeError(text)
        return next(url for rank in gather(self._accelerator, urls) for url in rank)

    def _prepare(self) -> str | None:
        """Checks the token and creates the repository. Returns an error message, or None if there is no error."""
        from huggingface_hub import HfApi

        name = self._recipe.repo_id
        try:
            check_access(self._recipe)
        except ValueError as error:
            return str(error)
        try:
            api = HfApi()
            if "/" not in name:
                self._name = f"{api.whoami()['name']}/{name}"
            api.create_repo(self._name, private=self._recipe.private, exist_ok=True)
            is_private = api.repo_info(self._name).private
        except Exception as error:  # the clients of the hub raise errors of several libraries
            return f"output.push_to_hub: {name!r} cannot be created or read on the hub: {_describe(error)}"
        if self._recipe.private and not is_private:
            return f"output.push_to_hub.private must be false for {self._name!r}, which exists and is public, got true"
        return None

    def _on_main(self, action: Callable[[], str | None]) -> str | None:
        """Runs ``action`` on the main process only. Returns the result on all ranks: an error message or None."""
        text = action() if self._accelerator.is_main_process else None
        return gather(self._accelerator, text)[0]


def check_access(recipe: HubRecipe) -> None:
    """Raises ``ValueError`` if HF_HUB_OFFLINE is set or there is no token. This check does not contact the hub."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"output.push_to_hub must be None with HF_HUB_OFFLINE=1, got {recipe.repo_id!r}")
    if get_token() is None:
        raise ValueError(
            f"output.push_to_hub needs a token of the hub for {recipe.repo_id!r}: set HF_TOKEN, or run hf auth login"
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
