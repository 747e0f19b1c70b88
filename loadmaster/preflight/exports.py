"""What a format of export cannot hold of a model, as far as its config.json says: a word before training, not after.

The export itself judges by the tensors and the tokenizer (`loadmaster.export.build.streamed`), again before training.
"""

from __future__ import annotations

from collections.abc import Iterator

from loadmaster.config.rules import serving_rules
from loadmaster.config.schema import Job
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.preflight.shape import Matrix, ModelShape
from loadmaster.preflight.tensor_parallel import FP8_BLOCK, INT4_GROUPS, NVFP4_GROUP, block_of, divides

GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type of what GGUF is written for -> llama.cpp's name."""
MIN_QUANTIZED_SHARE = 0.9
"""Of the weights besides embeddings and head; below it the architecture keeps weights outside linear layers."""
WITHOUT_AWQ = ("gemma4_text",)
"""Families of which llm-compressor does not say which norms AWQ may scale (looked up in 0.14; its defaults fail)."""
WHOLE = ("adapter", "bf16", "gguf")
"""Formats that leave linear layers as they are, or treat all matrices alike."""


def counts_exports(job: Job) -> bool:
    """Whether what a plan says of hours, dollars and what will not pass has the export in it."""
    return job.stop_after not in ("train", "evaluate")


def refuse_unholdable(job: Job, shape: ModelShape) -> None:
    """Raises ConfigError where the job ends with an export that cannot be made of this model, or cannot be served."""
    found = list(export_problems(job, shape))
    if found and job.stop_after in ("export", "bundle"):
        raise ConfigError(found)


def export_problems(job: Job, shape: ModelShape) -> Iterator[Problem]:
    """What the exports of a job would come to grief on; of a model that is only estimated no format is judged."""
    if not counts_exports(job):
        return
    problems = {name: problem for name in job.export.formats if (problem := unholdable(name, shape))}
    if problems and not shape.estimate:
        left = [name for name in job.export.formats if name not in problems] or ["bf16"]
        message = "; ".join(f"{name} cannot hold {shape.name}: {problem}" for name, problem in problems.items())
        remedy = f"export.formats=[{','.join(left)}], or stop_after=evaluate"
        yield Problem("export.formats", list(job.export.formats), IN_THE_JOB, message, remedy)
    if job.stop_after != "export":
        yield from _too_long_requests(job, shape)
        yield from _undivided(job, shape)
    renamed = shape.name != job.model.name and job.method != "full" and job.stop_after != "export"
    if renamed and serving_rules.serves_adapter(job):
        message = f"is another model than the one in {job.model.path}, and servers load an adapter's base by its name"
        remedy = f"model.name=ITS-HUB-ID, or {serving_rules.MERGED}"
        yield Problem("model.name", job.model.name, IN_THE_JOB, message, remedy)


def _too_long_requests(job: Job, shape: ModelShape) -> Iterator[Problem]:
    """Requests that the endpoint is to take and the model does not know: no server starts with them, or is right."""
    wanted, (known, named) = job.endpoint, request_limit(job, shape)
    longest, shorter = wanted.max_model_len, ""
    if longest == "auto":
        longest = sum(tokens for tokens in (wanted.prompt_tokens, wanted.output_tokens) if tokens != "auto")
        shorter = ", with a shorter endpoint.prompt_tokens or output_tokens"
    if known and longest > known:
        message = f"requests of {longest:,} tokens are more than {named}"
        remedy = f"endpoint.max_model_len={known}{shorter}"
        yield Problem("endpoint.max_model_len", wanted.max_model_len, IN_THE_JOB, message, remedy)


def _undivided(job: Job, shape: ModelShape) -> Iterator[Problem]:
    """Cards of the endpoint over which vLLM divides the model in none of the formats that may be served."""
    count, serve_as = job.endpoint.count, job.endpoint.serve_as
    forms = job.export.formats if serve_as == "auto" else [serve_as]
    blocks = {block_of(shape, form) for form in forms}
    if count != "auto" and not any(divides(shape, count, block) for block in blocks):
        message = f"vLLM cannot divide {shape.name}, of {shape.heads} attention heads, over so many cards"
        if divides(shape, count):
            message += f" where {min(blocks)} weights share a scale ({', '.join(forms)})"
        able = [str(n) for n in (1, 2, 4, 8) if any(divides(shape, n, block) for block in blocks)]
        yield Problem("endpoint.count", count, IN_THE_JOB, message, f"endpoint.count={' or '.join(able)}")


def request_limit(job: Job, shape: ModelShape) -> tuple[int | None, str]:
    """(tokens of the longest request that the model knows, what that is)."""
    short = shape.short_positions
    if short and (job.sequence_length <= short or job.endpoint.max_model_len == "auto"):
        return short, (
            f"the model's original_max_position_embeddings={short}: a server that may have more turns all it reads by "
            "LongRoPE's long factors, which documents up to that length are not trained with"
        )
    return shape.max_position, f"the model's max_position_embeddings={shape.max_position}"


def unholdable(name: str, shape: ModelShape) -> str | None:
    """Why this format cannot hold this model, or None."""
    if name == "gguf" and shape.family not in GGUF_ARCHITECTURES:
        return f"it is written for {', '.join(GGUF_ARCHITECTURES)}, not for {shape.family}"
    if name in WHOLE:
        return None
    if name == "int4_awq" and shape.family in WITHOUT_AWQ:
        return f"llm-compressor does not know what AWQ may scale in {shape.family}; int4_gptq needs nothing of the kind"
    outside = shape.embedding_parameters + shape.head_parameters
    share = shape.linear_weights / (shape.parameters - outside)
    if share < MIN_QUANTIZED_SHARE:
        return f"only {share:.0%} of its weights are in linear layers, the others in experts, which stay in bf16"
    odd = next(_odd(name, shape), None)
    return None if odd is None else f"{odd[0].name} has {odd[1]}, which is no multiple of {odd[2]}"


def _odd(name: str, shape: ModelShape) -> Iterator[tuple[Matrix, str, int]]:
    for matrix in shape.all_matrices:
        if name == "fp8_block" and matrix.outputs % FP8_BLOCK:
            yield matrix, f"{matrix.outputs} outputs", FP8_BLOCK
        group = {"fp8": 1, "fp8_block": FP8_BLOCK, "nvfp4": NVFP4_GROUP}.get(name, INT4_GROUPS[-1])
        if matrix.inputs % group:
            yield matrix, f"{matrix.inputs} inputs", group
