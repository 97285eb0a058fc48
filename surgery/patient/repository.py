"""What a repository on the Hub can be called."""

from __future__ import annotations

from surgery.errors import BadSettings


def repository_name(repo: str) -> str:
    """The name of a repository; BadSettings for what cannot be one."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # takes a while

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadSettings(f"{repo!r} is not a Hub repository; write it as user/name.") from error
    return repo
