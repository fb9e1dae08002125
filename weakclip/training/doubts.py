"""Settings that are allowed but seldom meant: a line for each, which a training prints as a warning when it starts."""

from __future__ import annotations

from weakclip.checkpoints import clip_files
from weakclip.training.jobs import Job


def doubts(job: Job, samples: int, ranks: int, earlier: int | None = None) -> list[str]:
    """Return one line for each doubtful setting of a job.

    samples: of all its training sets. earlier: samples of all ranks in the last step before this start, None at the first.
    """
    ours, train, product = job.prefix, job.train, job.batch_product
    batch = train.batch * train.accumulate * ranks
    lines = []
    if job.name == "train" and job.recipe.decoder.score_map:
        unknown = clip_files.words_unknown_to_the_demo(job.recipe.clip, job.names)
        lines += [unknown] if unknown else []
    if job.optim.warmup >= train.steps:
        lines.append(
            f"{ours}optim.warmup={job.optim.warmup} is as long as the training ({ours}train.steps={train.steps}), so the "
            "learning rate never reaches its full value; lower it"
        )
    if batch > samples:
        lines.append(
            f"a step takes {batch} images ({product}), but there are only {samples}, so it repeats images; lower the batch"
        )
    if earlier not in (None, batch):
        lines.append(f"a step takes {batch} images ({product}), but took {earlier} before; the result is that of neither")
    return lines
