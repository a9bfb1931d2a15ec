"""What the hub's errors mean, and what the operator can do about each."""

from http import HTTPStatus

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer, before an earlier download is used."""


def explain(
    error: Exception, revision: str | None, variant: str | None = None
) -> tuple[str, str] | None:
    """Why the hub does not provide a repository, and the remedy; None if the error does not say.

    The hub answers 401 for a model that does not exist too, if the caller has no token.
    """
    match error:
        case GatedRepoError():
            return (
                "access to it is restricted",
                "accept its licence on the hub, and set HF_TOKEN to a token of that account",
            )
        case RepositoryNotFoundError():
            return (
                "there is no such model, or it is private",
                "check its name and HF_TOKEN, or give a folder",
            )
        case RevisionNotFoundError():
            return (
                f"it has no revision {revision or 'main'!r}",
                "check the branch, tag or commit after @",
            )
        case RemoteEntryNotFoundError():
            return "it has no model_index.json", "give a pipeline, as diffusers saves it"
        case HfHubHTTPError() if error.response.status_code == HTTPStatus.UNAUTHORIZED:
            return "the hub does not accept the token", "check HF_TOKEN"
        case ValueError() if variant and f"variant={variant}" in str(error):
            return f"it has no weights of variant {variant!r}", "leave --variant out"
    return None
