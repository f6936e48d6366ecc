"""Uploading an exported folder, with its card, to the hub."""

from __future__ import annotations

from pathlib import Path

from moe_models.errors import RunError, one_line


def upload(
    folder: Path, repository: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """Create ``repository`` where it does not exist, upload ``folder`` as one commit, and return its address.

    Args:
        folder: what has its final name: it is whole and proven.
        repository: ``name`` (of the user whose token it is) or ``owner/name``.
        private: of a new repository; None is the owner's default.
        token: None is the one that ``hf auth login`` or HF_TOKEN left.
        revision: branch; None is the main one.

    Raises:
        RunError: if the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message="Upload by moe-recipes"
        )
    except Exception as error:  # the hub's, those of names, and what its HTTP client raises without a network
        raise RunError(
            f"{folder}: is whole, but was not uploaded to {repository}: {one_line(error)[:300]}; try again with: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(commit.commit_url)
