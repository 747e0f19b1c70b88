"""`loadmaster push RUN --repo org/name`: an exported format to a Hub repository of its own, with a model card.

One quantization a repository, because endpoints that cache a repository download all of it. What does not verify is
not pushed. The upload is huggingface_hub's own: one commit, large files first, those that are there already skipped, so
a push that was cut off goes on where it stopped. The token is the one of HF_TOKEN or of `hf auth login`; it is handed
to huggingface_hub and to nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from loadmaster.config.compose import read_job
from loadmaster.config.rates import peak_rate
from loadmaster.endpoint.model_card import model_card
from loadmaster.errors import ExportRejected, LoadmasterError, ProviderError, UsageError
from loadmaster.export.manifest import NAME, exported, no_export, read_manifest, verify_manifest
from loadmaster.files import read_json
from loadmaster.launch.record import away, copied_by
from loadmaster.rundir import object_in
from loadmaster.words import without_password

CARD = "README.md"
KEPT = (".gitattributes",)
"""Of a repository: the Hub's own."""
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 4, 1.0, 30.0
TEMPORARY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Push:
    """What is to be uploaded: the files of a manifest, the manifest, and the card."""

    folder: Path
    manifest: dict[str, Any]
    repository: str
    private: bool

    @property
    def paths(self) -> list[str]:
        return sorted([entry["path"] for entry in self.manifest["files"]] + [NAME])

    def bytes_of(self, path: str) -> int:
        return (self.folder / path).stat().st_size


def push(
    run_dir: Path, format_name: str | None, repository: str, private: bool, dry_run: bool, echo: Callable[[str], None]
) -> str | None:
    """Upload run_dir/export/<format>; returns the commit's URL, None for a dry run.

    Raises ExportRejected for an export that is not there or does not verify, ProviderError when the Hub refuses.
    """
    what = Push(run_dir / "export" / chosen(run_dir, format_name), {}, repository, private)
    if left := away(run_dir, what.folder):
        how = f"loadmaster fetch {run_dir}" if left.volume else copied_by(left, run_dir)
        raise ExportRejected(f"the files of {what.folder} are where the job ran; first {how}")
    if problems := verify_manifest(what.folder):
        raise ExportRejected(f"{what.folder} does not verify, so it is not pushed:\n  " + "\n  ".join(problems))
    manifest = read_manifest(what.folder)
    if (manifest.get("verification") or {}).get("passed") is not True:
        raise ExportRejected(f"{what.folder} has not passed verification against the trained model: export it again.")
    what = Push(what.folder, manifest, repository, private)
    hub = Hub(repository)
    licence = None if dry_run else hub.licence(manifest["base_model"]["name"])
    card = model_card(manifest, repository, _job_facts(run_dir, manifest), licence)
    echo(f"{hub.url} ({'private' if private else 'public'}), {manifest['format']}:")
    for path in what.paths:
        echo(f"  {what.bytes_of(path) / 1e6:10.2f} MB  {path}")
    echo(f"  {len(card.encode()) / 1e6:10.2f} MB  {CARD}")
    if dry_run:
        echo(f"\n{card}\nNothing was uploaded (--dry-run).")
        return None
    return hub.upload(what, card, echo)


def chosen(run_dir: Path, format_name: str | None) -> str:
    """The format to push: as asked for, the only one, or the one that the bundle serves."""
    found = exported(run_dir)
    if not found:
        raise no_export(run_dir)
    if format_name is None and len(found) > 1:
        format_name = object_in(run_dir / "bundle" / NAME).get("format")
    if format_name is None and len(found) > 1:
        raise ExportRejected(f"{run_dir} has the exports {', '.join(found)}: say which one with --format.")
    if format_name not in (None, *found):
        raise ExportRejected(f"{run_dir} has no export {format_name}; it has {', '.join(found)}.")
    return format_name or found[0]


class Hub:
    """The Hub that HF_ENDPOINT names, and one repository on it; every error becomes a ProviderError."""

    def __init__(self, repository: str):
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repository)
            if "/" not in repository:  # the Hub would make it under the account, and look for it elsewhere
                raise HFValidationError(f"whose it is has to stand before it, as in --repo ORG/{repository}")
        except HFValidationError as error:
            raise UsageError(f"--repo {repository} is no name of a repository: {error}") from None
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.endpoint = without_password(endpoint)
        self.repository, self.url = repository, f"{self.endpoint}/{repository}"
        self._token = get_token()
        self._api = HfApi(endpoint=endpoint, token=self._token or False, library_name="loadmaster")

    def licence(self, model: str) -> str | None:
        """The licence that a model's card names; None where it cannot be found out."""
        try:
            card = self._api.model_info(model, timeout=10).card_data
        except Exception:  # a local model, no network, a gated repository: none stops a push
            return None
        return getattr(card, "license", None)

    def upload(self, what: Push, card: str, echo: Callable[[str], None]) -> str:
        """Make the repository where there is none, and commit everything at once; returns the commit's URL."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self._token is None:
            raise LoadmasterError(
                f"{self.endpoint} needs a token that may write to {self.repository}: set HF_TOKEN, or `hf auth login`"
            )
        self._ask("create the repository", lambda: self._api.create_repo(
            self.repository, private=what.private, exist_ok=True
        ))
        is_private = self._ask("look at the repository", lambda: self._api.repo_info(self.repository).private)
        if what.private and is_private is False:
            raise ProviderError(
                f"{self.url} is public already: give --public, or the name of another repository"
            )
        if is_private and not what.private:
            echo(f"{self.url} is private already, and stays so")
        there = self._ask("list the repository", lambda: self._api.list_repo_files(self.repository))
        self._refuse_other_model(what.manifest["format"], there)
        stale = sorted(set(there) - {*what.paths, CARD, *KEPT})

        def commit() -> Any:
            # Anew for each attempt: huggingface_hub marks operations as it goes.
            added = [CommitOperationAdd(path, str(what.folder / path)) for path in what.paths]
            return self._api.create_commit(
                self.repository,
                [*added, CommitOperationAdd(CARD, card.encode()), *map(CommitOperationDelete, stale)],
                commit_message=f"{what.manifest['recipe']}: {what.manifest['format']}",
            )

        done = self._ask("upload", commit, echo)
        url = without_password(str(done.commit_url))
        echo(f"pushed: {url}")
        return url

    def _refuse_other_model(self, format_name: str, there: list[str]) -> None:
        """A repository that holds something else is left alone."""
        if not [path for path in there if path not in (CARD, *KEPT)]:
            return
        if NAME not in there:
            raise ProviderError(f"{self.url} holds a model that was not pushed from here: give another repository.")
        held = self._ask("read the repository's manifest", lambda: read_json(Path(
            self._api.hf_hub_download(self.repository, NAME)
        )))
        holds = held.get("format") if isinstance(held, dict) else "no manifest that can be read"
        if holds != format_name:
            raise ProviderError(
                f"{self.url} holds {holds}: one quantization a repository, so push {format_name} elsewhere"
            )

    def _ask(self, what: str, ask: Callable[[], Any], echo: Callable[[str], None] = lambda text: None) -> Any:
        from httpx import HTTPError, TransportError
        from huggingface_hub.errors import HfHubHTTPError

        def is_temporary(error: BaseException) -> bool:
            status = getattr(getattr(error, "response", None), "status_code", None)
            return isinstance(error, TransportError) or status in TEMPORARY

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            said = self._without_token(str(error)).splitlines() or [type(error).__name__]  # a timeout may say nothing
            echo(f"  {what}: {said[0]}; trying again")

        try:
            return Retrying(
                retry=retry_if_exception(is_temporary), stop=stop_after_attempt(ATTEMPTS), reraise=True,
                wait=wait_exponential(FIRST_WAIT_S, LONGEST_WAIT_S), before_sleep=say,
            )(ask)
        except (HfHubHTTPError, HTTPError, OSError, ValueError, KeyError) as error:
            raise ProviderError(
                f"{self.url}: could not {what}: {self._without_token(str(error))}\n"
                "fix: check the name, that the token may write there, and the connection; what is uploaded already "
                "is not uploaded again"
            ) from None

    def _without_token(self, text: str) -> str:
        return without_password(text.replace(self._token, "***") if self._token else text)


def _job_facts(run_dir: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the job besides the manifest; nothing where config.yaml is gone."""
    if not (run_dir / "config.yaml").is_file():
        return {}
    job = read_job(run_dir / "config.yaml", to_run=False).job
    lr = peak_rate(job, (manifest.get("plan") or {}).get("method", job.method))
    return {
        "data": [_without_folders(each) for each in job.data.paths], "epochs": job.epochs, "max_steps": job.max_steps,
        "lr": lr, "sequence_length": job.sequence_length, "global_batch": job.batch.global_size, "lora": job.lora,
        "task": job.evaluation.task, "seed": job.seed,
        "taken_step": object_in(run_dir / "result.json").get("taken_step"),
    }


def _without_folders(source: str) -> str:
    """A path of this machine, or of the one that trained, means nothing elsewhere, and is nobody's business."""
    path = Path(source)
    is_path = path.exists() or path.is_absolute() or source.startswith(("~", "."))
    return path.name if is_path else source
