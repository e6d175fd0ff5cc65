"""Open a trained model on disk, whatever holds it: a run folder, one of its checkpoints, or a
Hugging Face folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headway.checkpoint import checkpoint_dir, run_folder
from headway.checkpoint.load import Weights
from headway.checkpoint.tensor_reader import TensorReader
from headway.config import Config, UsageError
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.hub.folder import HubFolder, is_hub_folder, read_json
from headway.hub.tokenizer_files import load_hub_tokenizer


@dataclass(frozen=True)
class Trained:
    """An open model: what is known of it, and its weights under our names."""

    folder: Path
    """Where the files of the tokenizer are: the run folder, or the Hugging Face folder."""
    source: Path
    """The checkpoint, or the Hugging Face folder, that is read."""
    problems: tuple[str, ...]
    """One sentence for each newer checkpoint that is damaged."""
    config: Config
    """Of the run, or what a run with the model of the Hugging Face folder starts from."""
    tokenizer: Tokenizer
    family: str
    """The `model_type` that the model came from; "" where it was trained here."""
    weights: Weights

    def __post_init__(self) -> None:
        size, n_ids = self.config.model.vocab_size, self.tokenizer.vocab_size
        if size < n_ids:
            raise UsageError(
                f"{self.folder} has a model of vocab_size={size} and a tokenizer of {n_ids} ids; "
                "restore the model's tokenizer"
            )

    @property
    def max_len(self) -> int:
        """Return the longest context in tokens."""
        return self.config.model.max_len or self.config.data.seq_len


@contextmanager
def open_trained(path: Path) -> Iterator[Trained]:
    """Open the model of a run folder (its latest undamaged checkpoint), of one checkpoint inside a
    run, or of a Hugging Face folder.

    Raises: UsageError where `path` is none of the three, or there is no undamaged checkpoint or no
    run.json above it; where the tokenizer is not the model's; for a Hugging Face folder as
    `HubFolder`."""
    if is_hub_folder(path):
        with HubFolder(path) as weights:
            config, tokenizer = weights.run_config(path), load_hub_tokenizer(path)
            yield Trained(path, path, (), config, tokenizer, weights.family.name, weights)
        return
    run_dir, checkpoint, problems = find_trained(path)
    config = run_folder.read_config(run_dir)
    family = read_json(run_dir / "run.json").get("imported", {}).get("family", "")
    tokenizer = tokenizer_of(run_dir, config)
    with TensorReader(checkpoint, "model") as weights:
        yield Trained(run_dir, checkpoint, problems, config, tokenizer, family, weights)


def find_trained(path: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """Return the run folder, the checkpoint to read and one sentence per damaged newer one."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}; give a run folder, a checkpoint or a Hugging Face folder")
    if (path / "run.json").is_file():
        checkpoint, problems = run_folder.find_checkpoint(path)
        if checkpoint is None:
            fix = f"train it first: headway train --resume {path}"
            raise UsageError(f"{path} holds no checkpoint yet; {fix}")
        return path, checkpoint, tuple(problems)
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        if problem := checkpoint_dir.verify(path):
            fix = "give the run folder for the one before"
            raise UsageError(f"checkpoint {path} is damaged: {problem}; {fix}")
        return path.absolute().parent.parent, path, ()
    raise UsageError(
        f"{path} is neither a run folder, nor a checkpoint, nor a Hugging Face folder (it "
        "holds neither run.json nor config.json); give the --run of a `headway train`"
    )


def tokenizer_of(run_dir: Path, config: Config) -> Tokenizer:
    """Return the tokenizer of a run; an imported run holds its own."""
    inside = (run_dir / "tokenizer.json").is_file()
    return load_tokenizer(str(run_dir) if inside else config.data.vocabulary)
